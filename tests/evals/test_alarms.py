# SPDX-License-Identifier: Apache-2.0
"""Alarms over a finished run are those it gave while it ran, and the rule for bare thoughts."""

import pytest
from rich.console import Console

from rlp_jax.evals.alarms import BARE_SHARE, of_evaluation, of_run
from rlp_jax.rows import Progress, watch
from rlp_jax.writers import RunLog

HEALTHY, SHRUNK, EMPTY, ENDLESS = (12.0, 0.9), (2.5, 0.9), (1.0, 1.0), (16.0, 0.0)


def rows_of(*phases):
    """(thought_len, stop_rate) and how often, one after the other."""
    values = [value for value, count in phases for _ in range(count)]
    return [{"step": n, "thought_len": a, "stop_rate": b, "finite": 1.0} for n, (a, b) in enumerate(values, 1)]


def test_by_hand():
    rows = rows_of((HEALTHY, 6), (SHRUNK, 2), (HEALTHY, 1), (EMPTY, 3), (ENDLESS, 1))
    spells = of_run(rows, close_tokens=1)
    assert [(spell["kind"], spell["first"], spell["last"], spell["steps"]) for spell in spells] == [
        ("thought_length", 7, 8, 2), ("thought_length", 10, 12, 3), ("empty_thoughts", 10, 12, 3),
        ("stop_rate", 13, 13, 1),
    ]  # fmt: skip
    assert spells[0]["message"] == "thoughts have shrunk to 2.5 tokens from 12.0 at the start"
    assert of_run(rows_of((HEALTHY, 20)), 1) == of_run([], 1) == of_run([{"step": 1, "loss": 2.0}], 1) == []


def test_the_same_as_while_it_ran(tmp_path):
    rows = rows_of((HEALTHY, 5), (SHRUNK, 3), (HEALTHY, 2), (EMPTY, 2), (HEALTHY, 1), (ENDLESS, 2))
    rows[3] |= {"thought_len": float("nan"), "stop_rate": float("nan")}
    for row in rows[10:]:
        row |= {"reward_mean": -1.5, "reward_std": 0.01}
    progress = Progress()
    with RunLog(tmp_path, len(rows), console=Console(quiet=True)) as log:
        warned = {row["step"]: set(watch(progress, row, 1, log)["warnings"]) for row in rows}
    rows[3] |= {"thought_len": None, "stop_rate": None}  # as metrics.jsonl holds what is not finite
    spells = of_run(rows, 1)
    for step, messages in warned.items():
        assert len(messages) == sum(spell["first"] <= step <= spell["last"] for spell in spells)
    assert {spell["message"] for spell in spells} <= set().union(*warned.values())
    assert sum(spell["steps"] for spell in spells) == sum(map(len, warned.values())) > 0


@pytest.mark.parametrize(
    ("own", "low", "alarmed"),
    [(0.5, 0.2, True), (0.5, -0.01, False), (BARE_SHARE, 0.05, False), (0.11, 0.05, True), (0.9, None, False)],
)
def test_bare_thoughts(own, low, alarmed):
    interval = None if low is None else [low, 0.9]
    bare = {"own": own, "shuffled": 0.05, "excess": own - 0.05, "excess_ci95": interval}
    alarms = of_evaluation({"quotes": {"bare": bare}}, 9.0, 0.9, 1)
    assert list(alarms) == (["bare_target"] if alarmed else [])
    assert list(of_evaluation({"quotes": {"bare": bare | {"own": 0.0}}}, 1.0, 1.0, 1)) == ["empty_thoughts"]
