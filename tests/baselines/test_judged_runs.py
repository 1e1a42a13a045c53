# SPDX-License-Identifier: Apache-2.0
"""Whole runs of RPT and RLVR through the loop: what they log, and that a run which was stopped goes on as if it had not
been."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console
from tiny_run import hasty_compilation, tiny_config

from rlp_jax.checkpoint import load_run
from rlp_jax.config import ConfigError, RLVRConfig, RPTConfig, Template
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
