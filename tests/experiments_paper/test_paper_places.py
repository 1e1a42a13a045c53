# SPDX-License-Identifier: Apache-2.0
"""Where thoughts pay: rows of runs to rows of the report."""

import copy

import pytest
import written

from experiments.paper import places, results


@pytest.fixture
def records(tmp_path):
    """Two seeds of RLP, whose gain at answers differs by 0.5, a base, and a run that nobody asked."""
    other = copy.deepcopy(written.WHERE)
    other["where"]["span"][1]["gain"] += 0.5
    other["alarms"] = {"empty_thoughts": "thoughts are empty"}
    spell = {"kind": "shrinking", "first": 3, "last": 7, "steps": 4, "message": "shorter"}
    written.write(tmp_path, "base", 0, 0.2, where=written.WHERE)
    written.write(tmp_path, "rlp", 1, 0.5, where=written.WHERE, alarms=[])
    again = spell | {"first": 9, "last": 9, "steps": 1}
    written.write(tmp_path, "rlp", 2, 0.5, where=other, alarms=[spell, again])
    written.write(tmp_path, "cpt_tokens", 1, 0.5)
    return results.load(tmp_path)


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_gains_are_means_over_seeds(records):
    text = places.places_text(records)
    assert "| base (1) | RLP (2) |" in text and "CPT" not in text
    answers = cells(text, "where it was trained to think | answers")
    assert answers[2] == "+0.75 (+1.00)"
    # Seeds 0.75 and 1.25: mean 1, half width 12.706 * sd / sqrt(2) with sd = 0.5 / sqrt(2).
    assert answers[3] == "+1.00 ± 3.18 (+1.00)"
    assert cells(text, "entropy of the plain prediction | highest fifth")[2] == "+0.40 (+0.80)"
    assert cells(text, "place in the document | 4 of 4")[2] == "+0.30 (+0.60)"  # fewer bins are counted


def test_quotes(records):
    row = cells(places.quotes_text(records), "decoder | base")
    assert row[3:] == ["25.0", "12.5", "+12.5", "+0.500", "+0.750", "−0.250", "−1.000", "−1.250"]


def test_alarms_are_of_runs_and_of_their_ends(records):
    text = places.alarms_text(records)
    assert "Of 2 runs whose warnings were kept, 1 raised none" in text
    assert cells(text, "decoder--rlp--seed2 | shrinking")[2:] == ["3 to 9", "5"]
    assert cells(text, "decoder--rlp--seed2 | empty_thoughts")[2:] == ["at its end", "–"]


def test_nothing_without_runs(tmp_path):
    assert places.places_text([]) is places.quotes_text([]) is places.alarms_text([]) is None
