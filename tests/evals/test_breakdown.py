# SPDX-License-Identifier: Apache-2.0
"""Tables of records made by hand, and intervals against resampling and against those of documents of equal size."""

import numpy as np
import pytest

from rlp_jax.evals.breakdown import BINS, GAINS, bin_edges, clustered, of_quotes, split, summarise, tables
from rlp_jax.evals.likelihood import interval
from rlp_jax.evals.probes import Quotes
from rlp_jax.evals.where_table import lines

NOTHING = dict.fromkeys(Quotes._fields, False)


def record(document, position=3, think=((1.0,), (2.0,)), own=(NOTHING, NOTHING), other=(NOTHING, NOTHING), **changes):
    """One scored token, two thoughts: plain 3.0, empty 2.5, shuffled 2.25 on average."""
    ce = {"no_think": [3.0], "no_think_policy": [2.75], "empty": [2.5], "shuffled": [[2.0], [2.5]]}
    ce["think"] = [list(values) for values in think]
    row = {
        "document": document, "position": position, "tokens": 9, "target": ["x"], "class": ["number"],
        "in_span": [True], "entropy": [1.0], "thought": ["a", "b"], "length": [4, 6], "stopped": [True, False],
        "known": True, "ce_removed": [None, None], "ce_removed_other": [None, None],
        "quotes": {name: [quotes[name] for quotes in own] for name in Quotes._fields},
        "quotes_shuffled": {name: [quotes[name] for quotes in other] for name in Quotes._fields},
        **{f"ce_{name}": value for name, value in ce.items()},
    }  # fmt: skip
    mean = np.mean(ce["think"])
    gains = {"gain": 3.0 - mean, "format": 0.5, "generic": 0.25, "content": 2.25 - mean}
    return row | {name: [float(value)] for name, value in gains.items()} | changes


def test_the_split_by_hand():
    # Documents' mean cross-entropies: 1.5 and 2.0 (of two positions each 1.5 and 2.5), so gains 1.5 and 1.0.
    rows = [record(1), record(2), record(2, think=((2.0,), (3.0,)))]
    result = split(rows)
    assert (result["gain"], result["format"], result["generic"], result["content"]) == (1.25, 0.5, 0.25, 0.5)
    assert result["drift"] == 0.25 and result["ce_think"] == 1.75
    assert result["gain_ci95"] == pytest.approx([1.25 - 1.96 * 0.25, 1.25 + 1.96 * 0.25])  # of 1.5 and 1.0
    assert result["format_ci95"] == [0.5, 0.5]


def test_the_split_adds_up():
    rng = np.random.default_rng(0)
    rows = [
        record(int(rng.integers(5)), think=rng.random((2, 1)).tolist(), ce_no_think=rng.random(1).tolist(),
               ce_empty=rng.random(1).tolist(), ce_shuffled=rng.random((2, 1)).tolist())
        for _ in range(40)
    ]  # fmt: skip
    result = split(rows)
    assert result["gain"] == pytest.approx(result["format"] + result["generic"] + result["content"], abs=1e-14)


def test_intervals_by_document():
    rng = np.random.default_rng(1)
    value_DN = rng.normal(size=(7, 5)) + rng.normal(size=(7, 1))
    mean, ci95 = clustered(value_DN.ravel(), np.repeat(np.arange(7), 5))
    assert mean == pytest.approx(value_DN.mean()) and ci95 == pytest.approx(interval(value_DN.mean(1)))
    assert clustered([1.0, 2.0], [3, 3]) == (1.5, None)
    # Documents of unlike size: against the spread of means of documents drawn anew.
    sizes = rng.integers(1, 12, 200)
    values = [rng.normal(size=n) + rng.normal() for n in sizes]
    _, (low, high) = clustered(np.concatenate(values), np.repeat(np.arange(200), sizes))
    draws = [np.concatenate([values[i] for i in rng.integers(200, size=200)]).mean() for _ in range(2000)]
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(draws), rel=0.08)


def test_tables_by_hand():
    rows = [
        record(1, 2, entropy=[0.5], **{"class": ["answer"]}),
        record(2, 5, think=((0.0,), (0.0,)), entropy=[1.5], in_span=[False], **{"class": ["number"]}),
        record(2, 7, entropy=[2.5], **{"class": ["number"]}),
    ]
    found = tables(rows)
    assert [(row["label"], row["count"], row["documents"], row["gain"]) for row in found["class"]] == [
        ("number", 2, 1, 2.25), ("answer", 1, 1, 1.5),
    ]  # fmt: skip
    assert found["class"][0]["gain_ci95"] is None and found["class"][0]["content"] == 1.5
    assert [(row["label"], row["count"]) for row in found["span"]] == [("in data.span", 2), ("outside", 1)]
    assert [row["label"] for row in found["entropy"]] == ["0.5 to 1.5", "1.5 to 2.5"]
    assert [row["count"] for row in found["entropy"]] == [1, 2]
    assert [(row["low"], row["high"]) for row in found["place"]] == [(2, 5), (5, 7)]
    # Two scored tokens a position: each stands in its own class and place.
    two = record(1, 2) | {name: [1.0, 3.0] for name in (*GAINS, "entropy")}
    two |= {"target": ["x", "y"], "class": ["a", "b"], "in_span": [True, False]}
    found = tables([two])
    assert {row["label"]: row["gain"] for row in found["class"]} == {"a": 1.0, "b": 3.0}
    assert {row["label"]: row["gain"] for row in found["span"]} == {"in data.span": 1.0, "outside": 3.0}
    assert (found["place"][0]["low"], found["place"][-1]["high"]) == (2, 3)


def test_bins_are_equally_full_and_never_empty():
    counts = np.histogram(np.arange(1000), bin_edges(np.arange(1000)))[0]
    assert len(counts) == BINS and set(counts) <= {199, 200, 201}
    rng = np.random.default_rng(2)
    for n in (1, 2, 3, 7, 50):
        value_N = rng.integers(0, 6, n).astype(float)
        edges = bin_edges(value_N)
        counts = np.histogram(value_N, edges)[0] if edges[0] < edges[-1] else np.array([n])
        assert counts.sum() == n and counts.min() > 0


def test_quotes_by_hand():
    target = NOTHING | {"target": True, "whole": True}
    rows = [
        # One of two thoughts quotes: gains 2.0 and 1.0, without the quote 0.5; without another token 1.75.
        record(1, own=(target, NOTHING), other=(target, target), ce_removed=[[2.5], None],
               ce_removed_other=[[1.25], None]),
        # Both quote a new token, gains 2.0 and 1.0, without it 1.0 and 1.0; one holds nothing else.
        record(2, own=(target, target | {"bare": True}), known=False, ce_removed=[[2.0], [2.0]],
               ce_removed_other=[[1.0], None]),
    ]  # fmt: skip
    result = of_quotes(rows)
    quotes, quoting = result["quotes"], result["quoting"]
    assert (quotes["target"]["own"], quotes["target"]["shuffled"], quotes["target"]["excess"]) == (0.75, 0.5, 0.25)
    assert quotes["target"]["excess_ci95"] == pytest.approx([0.25 - 1.96 * 0.75, 0.25 + 1.96 * 0.75])
    assert (quotes["target_known"]["own"], quotes["target_known"]["positions"]) == (0.5, 1)
    assert quotes["target_new"]["own"] == 1.0 and quotes["bare"]["own"] == 0.25
    assert quoting["thoughts"] == 3 and quoting["known"] == pytest.approx(1 / 3)
    assert quoting["gain"] == pytest.approx(5 / 3) and quoting["gain_of_others"] == 1.0
    assert quoting["difference"] == 1.0 and quoting["difference_ci95"] is None
    assert quoting["gain_without"] == pytest.approx(2.5 / 3) and quoting["carried"] == pytest.approx(2.5 / 3)
    assert quoting["carried_other"] == pytest.approx(0.125)  # 0.25 and 0
    assert quoting["carried_beyond_other"] == pytest.approx((1.25 + 1.0) / 2)
    assert result["gain"] == 1.5 and result["gain_without"] == pytest.approx((0.5 + 1.0 + 1.0 + 1.0) / 4)


def test_nothing_to_quote():
    rows = [record(n) for n in (1, 2)]
    for row in rows:
        row["quotes"]["ahead"] = row["quotes_shuffled"]["ahead"] = [None, None]
    result = summarise(rows, 1)
    assert result["probes"]["quotes"]["ahead"] is None and result["probes"]["quotes"]["target_new"] is None
    quoting = result["probes"]["quoting"]
    assert quoting["thoughts"] == 0 and quoting["gain_of_others"] == 1.5
    assert {value for name, value in quoting.items() if not name.startswith(("thoughts", "gain_of"))} == {None}
    text = "\n".join(lines(result | {"warnings": []}))
    assert "0 thoughts quote" in text and "the 3 tokens after" not in text and "raised no collapse warning" in text


def test_lines_and_alarms():
    bare = NOTHING | {"target": True, "bare": True}
    rows = [
        record(n, own=(bare, bare), ce_removed=[[2.0], [2.0]], length=[2, 2], in_span=[n > 1]) for n in (1, 2, 3)
    ]  # fmt: skip
    result = summarise(rows, 1)
    assert (result["documents"], result["positions"], result["scored_tokens"]) == (3, 3, 3)
    assert (result["thought_len"], result["stop_rate"]) == (2.0, 0.5) and list(result["alarms"]) == ["bare_target"]
    spell = {"kind": "thought_length", "first": 7, "last": 9, "steps": 3, "message": "thoughts have shrunk"}
    text = lines(result | {"warnings": [spell]})
    assert text[1].split() == ["gain", "+1.500", "[+1.500,", "+1.500]"]
    assert any(line.split()[:3] == ["in", "data.span", "2"] for line in text)
    assert text[-2].startswith("alarm: 100% of thoughts are nothing but")
    assert text[-1] == "alarm of the run, steps 7 to 9: thoughts have shrunk"
