# SPDX-License-Identifier: Apache-2.0
"""The experiment that kills runs: what it would notice, and a few of its kills."""

import collections
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rlp_jax.checkpoint import Checkpoints, Position
from rlp_jax.config import CheckpointConfig, OptimizerConfig
from rlp_jax.optimizer import make_optimizer
from rlp_jax.state import init_state

FILE = Path(__file__).parents[1] / "experiments" / "reliability" / "kill.py"


@pytest.fixture(scope="module")
def kill():
    spec = importlib.util.spec_from_file_location("kill", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill"] = module
    spec.loader.exec_module(module)
    return module


def finished_run(run_dir, steps, nudge=0.0, seconds=0.5, loss=0.25, data=3):
    """A run directory as a finished run leaves it, as far as it is compared."""
    run_dir.mkdir()
    rows = [{"step": n, "loss": loss, "seconds_learn": seconds, "goodput": seconds} for n in range(1, steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("eval.jsonl", "thoughts.jsonl", "summary.json", "config.json"):
        (run_dir / name).write_text("{}\n")
    state = init_state({"kernel": jnp.linspace(0, 1, 7)}, make_optimizer(OptimizerConfig(), 10))
    moved = jax.tree.map(lambda leaf: leaf.at[3].add(nudge) if leaf.shape == (7,) else leaf, state.opt_state)
    state = state._replace(step=jnp.int32(steps), opt_state=moved)
    position = Position({"next": data}, {"metrics.jsonl": int(100 * seconds)}, {"productive": seconds}, "f")
    with Checkpoints(run_dir, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, position)
    return run_dir


def test_any_difference_is_found(kill, tmp_path):
    reference = finished_run(tmp_path / "reference", kill.STEPS)
    assert kill.differences(finished_run(tmp_path / "same", kill.STEPS, seconds=0.75), reference) == []
    changed = {"metrics.jsonl": {"loss": 0.25000001}, "['mu']['kernel']": {"nudge": 1e-30}, "the place in": {"data": 4}}
    for i, (what, change) in enumerate(changed.items()):
        found = kill.differences(finished_run(tmp_path / str(i), kill.STEPS, **change), reference)
        assert found and any(what in name for name in found), (what, found)
    other = finished_run(tmp_path / "gap", kill.STEPS)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    (other / "eval.jsonl").write_text("{}\n{}\n")
    (other / "checkpoints" / "9.damaged").mkdir()
    found = kill.differences(other, reference)
    assert found[:2] == ["metrics.jsonl", "eval.jsonl"] and "9.damaged" in found[2]


def test_kills_follow_from_the_seed_and_vary_with_it(kill):
    first, second = kill.plan(200, 0), kill.plan(200, 1)
    assert first == kill.plan(200, 0) != second and first[:30] == kill.plan(30, 0)
    assert set(collections.Counter(k.target for k in first).values()) == {25, 50}
    moments = [k.moment for k in first + second]
    assert len(set(moments)) == 400 and min(moments) < 0.05 and max(moments) > 0.95
    assert kill.config().checkpoint.every == 1


@pytest.mark.slow
def test_runs_that_are_killed_end_like_one_that_is_not(tmp_path):
    command = [sys.executable, str(FILE), "--kills", "2", "--seed", "1", "--json", "--record", str(tmp_path)]
    done = subprocess.run(command, cwd=FILE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary["kills"] == 2 and summary["bitwise_equal"] is True
    assert sum(summary["kills_by_phase"].values()) == 2 and summary == json.loads(
        (tmp_path / "summary.json").read_text()
    )
    records = [json.loads(row) for row in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert sum(record["code"] == -9 for record in records) == 2
