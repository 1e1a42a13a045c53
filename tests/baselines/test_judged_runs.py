# SPDX-License-Identifier: Apache-2.0
"""Whole runs of RPT and RLVR through the loop: what they log, and that a run which was stopped goes on as if it had not
been."""

import dataclasses
import io
import json

import numpy as np
import pytest
from eight_devices import on_eight_devices
from rich.console import Console
from tiny_run import hasty_compilation, tiny_config

from rlp_jax.checkpoint import load_run
from rlp_jax.config import ConfigError, MeshConfig, RLVRConfig, RPTConfig, Template
from rlp_jax.train import train

TIMINGS = ("seconds", "per_s", "goodput")
ANSWERS = dict(answer_after="", answer_open="", answer_close=">")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    with hasty_compilation(root / "cache"):
        yield root


def judged_config(root, algorithm, **changes):
    config = tiny_config(root, algorithm=algorithm, template=Template(instruction="", open="<", close=">", end=">"))
    rlp = dataclasses.replace(config.rlp, group_size=4)
    rpt = RPTConfig(**ANSWERS, entropy_threshold=0.5, rounds=2)
    rlvr = RLVRConfig(**ANSWERS, verifier="exact")
    data = dataclasses.replace(config.data, answer="{text}")
    return dataclasses.replace(config, rlp=rlp, rpt=rpt, rlvr=rlvr, data=data, **changes)


def rows(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not any(timing in key for timing in TIMINGS)}
        for line in lines
    ]


def lucky(monkeypatch):
    """Rewards of 0 and 1 from what a response says, so that some groups teach something."""
    from rlp_jax.baselines import rlvr, rpt

    def reward(text, *_):
        return float(sum(map(ord, text)) % 2)

    monkeypatch.setitem(rlvr.VERIFIERS, "exact", reward)
    monkeypatch.setattr(rpt, "prefix_reward", reward)
    monkeypatch.setattr(rpt, "first_answer", lambda tokens, decode, _: (decode(tokens), len(tokens)))


@pytest.mark.parametrize("algorithm", ["rpt", "rlvr"])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(root, monkeypatch, algorithm):
    lucky(monkeypatch)
    quiet = Console(file=io.StringIO())
    whole, stopped = root / f"{algorithm}-whole", root / f"{algorithm}-stopped"
    train(judged_config(root, algorithm, steps=4), whole, quiet)
    train(judged_config(root, algorithm, steps=2), stopped, quiet)
    train(judged_config(root, algorithm, steps=4), stopped, quiet)
    assert rows(stopped) == rows(whole)
    for row in rows(whole):
        assert 0 <= row["groups_dropped"] <= row["groups_judged"] and row["finite"] == 1
        assert row["sampled_tokens"] >= row["thought_tokens"]
    assert any(row["positions"] > 0 for row in rows(whole))
    if algorithm == "rpt":
        assert any(row["rounds"] > 1 for row in rows(whole))
    one, two = (load_run(run_dir).params for run_dir in (whole, stopped))
    for name in ("final_norm", "embed"):
        for a, b in zip(one[name].values(), two[name].values(), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    thoughts = [json.loads(line) for line in (whole / "thoughts.jsonl").read_text().splitlines()]
    assert all(thought["reward"] in (0.0, 1.0) for row in thoughts for thought in row["thoughts"])


def first_row(root, algorithm, mesh):
    """What the first step logs, on a mesh."""
    run_dir = root / f"{algorithm}-{mesh.data}-{mesh.fsdp}-{mesh.tensor}"
    train(judged_config(root, algorithm, steps=1, mesh=mesh), run_dir, Console(file=io.StringIO()))
    return rows(run_dir)[0]


ON_EIGHT = """
import json, pathlib, sys
import pytest
from baselines.test_judged_runs import MeshConfig, first_row, hasty_compilation, lucky
root = pathlib.Path(sys.argv[1])
lucky(pytest.MonkeyPatch())
with hasty_compilation(root / "cache"):
    print(json.dumps(first_row(root, sys.argv[2], MeshConfig(data=2, fsdp=2, tensor=2))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rpt", "rlvr"])
def test_eight_devices_judge_like_one(root, monkeypatch, algorithm):
    lucky(monkeypatch)
    one = first_row(root, algorithm, MeshConfig())
    eight = json.loads(on_eight_devices(ON_EIGHT, str(root), algorithm).splitlines()[-1])
    assert eight.keys() == one.keys() and one["positions"] > 0
    for name in one.keys() - {"padding"}:  # what was sampled and judged is the same; the rest is sums in another order
        counted = name.startswith(("groups", "positions", "rounds", "sampled", "thought", "step", "reward", "stop"))
        tolerance = 1e-6 if counted else 1e-4
        np.testing.assert_allclose(eight[name], one[name], rtol=tolerance, atol=1e-6, err_msg=name)


def test_what_cannot_work_writes_nothing(root):
    config = judged_config(root, "rpt")
    without_end = dataclasses.replace(config, template=dataclasses.replace(config.template, end=""))
    with pytest.raises(ConfigError, match=r"template.end is ''.*no end-of-text token"):
        train(without_end, root / "nothing", Console(file=io.StringIO()))
    other = dataclasses.replace(config, rpt=dataclasses.replace(config.rpt, proxy="quickstart"))
    with pytest.raises(ConfigError, match=r"rpt.proxy is 'quickstart'"):
        train(other, root / "nothing", Console(file=io.StringIO()))
    question = judged_config(root, "rlvr")
    question = dataclasses.replace(question, data=dataclasses.replace(question.data, answer=""))
    with pytest.raises(ConfigError, match=r"documents.jsonl:1: no answer"):
        train(question, root / "nothing", Console(file=io.StringIO()))
    assert not (root / "nothing").exists()
