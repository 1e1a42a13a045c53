# SPDX-License-Identifier: Apache-2.0
"""Recorded documents on their way to the page: gathered over runs, the damaged left out, text made safe."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import documents_row, write_rows, write_run

from rlp_jax.report.documents import gather
from rlp_jax.report.recorded import is_document
from rlp_jax.report.run import Run, read_run
from rlp_jax.report.text import UNSEEN, script_json, visible

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_the_same_text_of_several_recordings_is_one_document(tmp_path):
    one = write_run(tmp_path / "one", documents=3)
    two = write_run(tmp_path / "two", documents=1)  # the same seed: its document is the first of the other run
    found = gather([read_run(one), read_run(two)], ["one", "two"])
    assert [recording["label"] for recording in found.index["recordings"]] == [
        "one, before training", "one, after training", "two, before training", "two, after training",
    ]  # fmt: skip
    rows = read_run(one).documents
    lines = [json.loads(line) for line in found.lines]
    assert len(lines) == len(found.index["documents"])
    for number, (line, entry) in enumerate(zip(lines[:3], found.index["documents"], strict=False)):
        assert line["tokens"] == rows[number]["tokens"] and entry["tokens"] == 20
        for recording, row in (("0", rows[number]), ("1", rows[3 + number])):
            shown = line["shown"][recording]
            assert shown["gain"] == row["gain"] and shown["position"] == row["position"]
            assert shown["thoughts"][4][1]["reward"] == row["thoughts"][4][1]["reward"]
            assert entry["gain"][int(recording)] == pytest.approx(np.mean(row["gain"]), abs=1e-4)
    gains = np.abs([gain for row in [*rows, *read_run(two).documents] for gain in row["gain"]])
    assert np.quantile(gains, 0.9) < found.index["scale"]["gain"] <= gains.max()


def test_what_a_run_does_not_train_on_counts_for_nothing_but_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    row = documents_row(0, 1, np.random.default_rng(0), tokens=4)
    row |= {"gain": [-50.0, 1.0, 2.0], "trained": [False, True, True]}
    write_rows(run / "documents.jsonl", [row])
    found = gather([read_run(run)], ["run"])
    assert found.index["documents"][0]["gain"] == {0: 1.5} and found.index["scale"]["gain"] <= 2 and found.index["some"]
    shown = json.loads(found.lines[0])["shown"]["0"]
    assert shown["gain"][0] == -50 and shown["trained"] == [False, True, True]


def test_damaged_rows_are_counted_and_left_out(tmp_path):
    run = write_run(tmp_path / "run", documents=2)
    good = [json.loads(line) for line in (run / "documents.jsonl").read_text().splitlines()]
    bad = copy.deepcopy(good[0])
    bad["gain"][3] = math.nan
    with open(run / "documents.jsonl", "a") as file:
        file.write(json.dumps(bad) + '\n{"step": 3}\n{"step": 0, "tok')
    read = read_run(run)
    assert read.documents == sorted(good, key=lambda row: row["step"]) and read.unreadable == {"documents.jsonl": 3}
    assert gather([read], ["run"]) is not None


@given(st.data(), JSON)
def test_whatever_stands_in_a_row_it_is_refused_or_can_be_shown(data, value):
    row = documents_row(0, 1, np.random.default_rng(0), tokens=3, group=1)
    place = data.draw(
        st.sampled_from([("row", key) for key in row] + [("thought", key) for key in row["thoughts"][0][0]])
    )
    target = row if place[0] == "row" else row["thoughts"][0][0]
    target[place[1]] = value
    if place[1] != "step" and is_document(row):
        run = Run(Path(), {}, [], [], [], [row], {}, {})
        found = gather([run], ["run"])
        json.loads(found.lines[0])
        script_json(found.index)


@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
def test_text_in_a_script_element(text):
    seen = visible(text)
    assert not UNSEEN.search(seen)
    seen.encode("utf-8")
    assert seen == text or UNSEEN.search(text)
    encoded = script_json({"text": seen, text.encode("utf-8", "replace").decode(): 1})
    assert encoded.isascii() and not set("<>&\n") & set(encoded)
    assert json.loads(encoded)["text"] == seen
