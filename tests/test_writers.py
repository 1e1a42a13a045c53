# SPDX-License-Identifier: Apache-2.0
"""What a run writes: strict JSON lines, TensorBoard events, lines on the console."""

import io
import json

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from rlp_jax.writers import RunLog, strict, write_atomically

EVALUATION = {
    "step": 0, "gain": -0.5, "gain_ci95": [-0.6, -0.4], "gain_empty": -0.1, "gain_shuffled": -0.2, "ce_think": 2.0,
    "ce_no_think": 1.5, "acc_think": 0.25, "acc_no_think": 0.5,
}  # fmt: skip


def row(step, **more):
    return {"step": step, "loss": 0.5, "reward_mean": 0.25, "seconds": 1.5, "warnings": []} | more


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def scalars(directory):
    """(tag, step, value) of every event: the TFRecord framing read by hand."""
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return found


def printed(run_dir, terminal, steps=3):
    out = io.StringIO()
    with RunLog(run_dir, steps, console=Console(file=out, force_terminal=terminal, width=80)) as log:
        log.evaluation(EVALUATION)
        for step in range(1, steps + 1):
            log.step(row(step))
        log.thoughts([{"step": 1, "thoughts": [{"text": "two\nlines — é"}]}])
    return out.getvalue()


def test_files_hold_strict_json_and_positions_are_their_sizes(tmp_path):
    with RunLog(tmp_path, steps=2, console=Console(file=io.StringIO())) as log:
        log.step(row(1, grad_norm=float("nan")))
        log.step(row(2, warnings=["short"]))
        log.thoughts([{"step": 2, "thoughts": [{"text": "two\nlines — é", "reward": float("inf")}]}])
        positions = log.positions()
    files = [tmp_path / name for name in positions]
    assert positions == {file.name: file.stat().st_size if file.exists() else 0 for file in files}
    assert sum(map(bool, positions.values())) == 2
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines(tmp_path / "metrics.jsonl")]
    assert [r["step"] for r in rows] == [1, 2]
    assert rows[0]["grad_norm"] is None
    assert rows[1]["warnings"] == ["short"]
    (thought,) = [json.loads(line) for line in lines(tmp_path / "thoughts.jsonl")]
    assert thought["thoughts"] == [{"text": "two\nlines — é", "reward": None}]


def test_plain_lines_away_from_a_terminal(tmp_path):
    out = printed(tmp_path, terminal=False)
    assert "\x1b" not in out and "\r" not in out
    rows = out.splitlines()
    assert rows[0].startswith("held-out after step 0: gain -0.500 [-0.600, -0.400], empty thought -0.100")
    assert rows[1].split()[:2] == ["step", "gain"]
    assert rows[2].split()[:3] == ["1", "+0.250", "-"]
    assert len(rows) == 5 and rows[-1].endswith("0:00 left")


def test_progress_bar_on_a_terminal(tmp_path):
    out = printed(tmp_path, terminal=True)
    assert "3/3" in out and "training" in out and "+0.250" in out


def test_a_long_run_prints_few_rows(tmp_path):
    out = printed(tmp_path, terminal=False, steps=200)
    assert 20 <= sum("+0.250" in line for line in out.splitlines()) <= 22


def test_tensorboard_holds_finite_scalars_only(tmp_path):
    with RunLog(tmp_path, steps=2, console=Console(file=io.StringIO())) as log:
        log.evaluation(EVALUATION)
        log.step(row(1, loss=0.125))
        log.step(row(2, loss=float("nan")))
    found = scalars(tmp_path / "tensorboard")
    assert [(step, value) for tag, step, value in found if tag == "train/loss"] == [(1, 0.125)]
    assert ("eval/gain", 0, -0.5) in found


def test_resuming_appends(tmp_path):
    printed(tmp_path, terminal=False, steps=2)
    with RunLog(tmp_path, steps=4, start=2, console=Console(file=io.StringIO())) as log:
        log.step(row(3))
    assert [json.loads(line)["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_atomic_write_replaces_and_leaves_no_rest(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_strict():
    assert strict({"a": [1.0, float("-inf")], "b": ("x", True, None)}) == {"a": [1.0, None], "b": ["x", True, None]}
