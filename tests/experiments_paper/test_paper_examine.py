# SPDX-License-Identifier: Apache-2.0
"""Examination against responses worked out token by token, without cache, batch or stop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import examine as module
from experiments.paper.examine import examine, read_problems, standard_error
from rlp_jax.checkpoints_io.load import Loaded, load
from rlp_jax.config import ConfigError
from rlp_jax.data import compose

COUNT = 12


@pytest.fixture(scope="module")
def quickstart():
    return load("quickstart")


def likeliest_of(loaded):
    """The likeliest token after a sequence of any length up to 64, by the whole sequence each time."""

    @jax.jit
    def logits(tokens_1T):
        return loaded.model.apply(loaded.params, tokens_1T)[0][0]

    def likeliest(tokens):
        padded = jnp.array([[*tokens, *[0] * (64 - len(tokens))]])
        return int(jnp.argmax(logits(padded)[len(tokens) - 1]))

    return likeliest


def write_problems(folder, problems, split="test"):
    path = folder / f"problems_{split}" / "compose.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"question": q, "answer": a, "thought": ""}) + "\n" for q, a in problems))


def test_accuracies_are_those_of_responses_worked_out_by_hand(quickstart, quick_compiles, tmp_path):
    """Every other answer is what the model says, the rest is what it does not say."""
    likeliest, tokenizer = likeliest_of(quickstart), quickstart.tokenizer
    lines = compose.random_lines(np.random.default_rng(5), COUNT, compose.TRAIN_STEPS)
    said, plain = [], []
    for line in lines:
        question = tokenizer.encode(line.question())
        tokens = [*tokenizer.encode(compose.INSTRUCTION), *question, *tokenizer.encode(compose.OPEN)]
        start = len(tokens)
        while tokens[-1] != tokenizer.encode(".")[0] and len(tokens) < start + 18:
            tokens.append(likeliest(tokens))
        words = tokenizer.decode(tokens[start:]).split()
        said.append(words[words.index(compose.CLOSE) + 1])
        plain.append(tokenizer.decode([likeliest(question)]))
    other = {state: compose.STATES[(i + 1) % 8] for i, state in enumerate(compose.STATES)}
    answers = [answer if i % 2 else other[answer] for i, answer in enumerate(said)]
    write_problems(tmp_path, [(line.question(), answer) for line, answer in zip(lines, answers, strict=True)])
    scores = examine(quickstart, tmp_path, "test", benchmarks=["compose"])["compose"]
    assert scores["greedy"] == 0.5
    assert scores["greedy_se"] == pytest.approx(np.std([0, 1] * (COUNT // 2), ddof=1) / COUNT**0.5)
    assert scores["plain"] == np.mean([a == b for a, b in zip(plain, answers, strict=True)])
    fewer = examine(quickstart, tmp_path, "test", limit=COUNT - 1, benchmarks=["compose"])["compose"]
    assert fewer["greedy"] == (COUNT // 2 - 1) / (COUNT - 1)  # whoever its neighbours are


def test_samples_are_right_as_often_as_the_bases_thoughts_are(quickstart, tmp_path):
    """The base works a quarter of its thoughts out rightly, and wrong ones lead to an answer by chance: the truth is
    said a little more often than that, and a wrong answer as often as chance has it."""
    lines = compose.random_lines(np.random.default_rng(6), 64, compose.TRAIN_STEPS)
    write_problems(tmp_path, [(line.question(), line.answer) for line in lines])
    right = examine(quickstart, tmp_path, "test", benchmarks=["compose"])["compose"]
    assert 0.2 < right["pass1"] < 0.5 and right["plain"] < 0.35
    assert 0.01 < right["pass1_se"] < 0.06  # of a mean over problems of means of four


def test_wrong_settings_are_said(quickstart, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"no file .*problems_validation/compose\.jsonl"):
        examine(quickstart, tmp_path, "validation", benchmarks=["compose"])
    write_problems(tmp_path, [("a flip turn =", "a b")])
    with pytest.raises(ConfigError, match=r"compose: an answer is not one token"):
        examine(quickstart, tmp_path, "test", benchmarks=["compose"])
    (tmp_path / "problems_test" / "compose.jsonl").write_text('{"question": "a flip ="}\n')
    with pytest.raises(ConfigError, match=r"compose\.jsonl:1: no question and answer"):
        read_problems(tmp_path, "compose", "test")
    monkeypatch.setattr("sys.argv", ["examine", "quickstart", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("examine: no file ")


def test_standard_error():
    assert standard_error([1.0]) == 0
    assert standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx((1 / 3) ** 0.5 / 2)


def test_kept_weights_are_the_models_own(quickstart, tmp_path):
    """In place of what was there."""
    directory = tmp_path / "weights"
    (directory / "old").mkdir(parents=True)
    module.save_weights(Loaded(*quickstart), directory)
    again = load(directory)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again.params, quickstart.params))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"] and not (directory / "old").exists()
