# SPDX-License-Identifier: Apache-2.0
"""RLVR: what is asked, what is checked, what travels with a batch, and that right answers become likelier."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import optax
import pytest
from reference import PLAIN, rough_params
from slow_step import ADAM, TEMPLATE, batch_of, configure, small
from tiny_run import byte_tokenizer

from rlp_jax.baselines import grpo, rlvr
from rlp_jax.config import ConfigError, DataConfig, RLVRConfig
from rlp_jax.data.pipeline import load_documents, train_batches
from rlp_jax.learner import Samples
from rlp_jax.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compiles")
NO_TAGS = RLVRConfig(verifier="exact", answer_after="", answer_open="", answer_close="c")


def letters(ids):
    return "".join(chr(ord("a") + i) for i in ids)


@pytest.mark.parametrize(
    ("verifier", "response", "truth", "reward"),
    [
        ("exact", r"x</think> \boxed{ e }", "e", 1),
        ("exact", r"x</think> \boxed{e f}", "e", 0),
        ("exact", r"\boxed{e}</think>", "e", 0),  # in the thought
        ("exact", r"x</think> e", "e", 0),
        ("choice", r"x</think> The answer is (B).", "B", 1),
        ("choice", r"x</think> \boxed{B}", "(b)", 1),
        ("choice", r"x</think> \boxed{C}", "B", 0),
        ("choice", r"The answer is (B).</think>", "B", 0),
        ("choice", r"x</think> none of them", "B", 0),
    ],
)
def test_verifiers(verifier, response, truth, reward):
    assert rlvr.VERIFIERS[verifier](response, truth, RLVRConfig()) == reward


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra eval")
def test_mathematics_in_any_spelling():
    settings = RLVRConfig()
    assert rlvr.math(r"so</think> \boxed{\frac{1}{2}}", "0.5", settings) == 1
    assert rlvr.math(r"so</think> \boxed{\frac{1}{3}}", "0.5", settings) == 0
    assert rlvr.math(r"\boxed{\frac{1}{2}}, so", "0.5", settings) == 0  # the thought is not over
    assert rlvr.math(r"so</think> \boxed{72}", "24+48=72 in all\n#### 72", settings) == 1
    assert rlvr.math(r"so</think> the answer is 71.", "24+48=72 in all\n#### 72", settings) == 0
    assert rlvr.math(r"so</think> it is x^2 + 72", "72", settings) == 0  # the last number, by luck
    assert rlvr.math(r"\boxed{1,200}, so", "1200", dataclasses.replace(settings, answer_after="")) == 1


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra reasoning_gym")
def test_the_scorers_of_reasoning_gym():
    config = DataConfig(sources=("reasoning_gym/chain_sum:20",), min_tokens=1, heldout_fraction=0.1)
    document = load_documents(config, byte_tokenizer(), 3, questions=True).train[0]
    from rlp_jax.data.reasoning_gym import open_dataset

    name, seed, size, i = json.loads(document.answer)
    entry = open_dataset(name, seed, size)[i]
    assert (name, seed, size) == ("chain_sum", 3, 20)
    right = rf"</think>\boxed{{{entry['answer']}}}"
    assert rlvr.by_reasoning_gym(right, document.answer.decode(), RLVRConfig()) == 1
    assert rlvr.by_reasoning_gym(r"</think>\boxed{no}", document.answer.decode(), RLVRConfig()) < 0.5
    assert rlvr.by_reasoning_gym("", document.answer.decode(), RLVRConfig()) == 0
    with pytest.raises(ConfigError, match="reasoning_gym/nothing"):
        open_dataset("nothing", 0, 1)


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="it is there")
def test_reasoning_gym_is_asked_for():
    with pytest.raises(ConfigError, match=r"pip install 'rlp_jax\[reasoning_gym\]'"):
        load_documents(DataConfig(sources=("reasoning_gym/chain_sum:20",)), byte_tokenizer(), 0)


# ---------------------------------------------------------------------------------------------- questions


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return DataConfig(sources=(str(path),), text="{q} {a}", span="{a}", min_tokens=1, document_tokens=16)


RECORDS = [{"q": f"{i} plus {i}?", "a": f"= {2 * i}", "final": f"{2 * i} €" * (i % 3 + 1)} for i in range(30)]


def test_answers_travel_with_their_questions(tmp_path):
    config = write(tmp_path / "q.jsonl", [*RECORDS, {"q": "much too long to be asked?", "a": "= 0", "final": "0"}])
    config = dataclasses.replace(config, answer="{final}", heldout_fraction=0.2)
    splits = load_documents(config, byte_tokenizer(), 0, questions=True)
    assert splits.report["too_long"] == 1 and splits.report["train"] + splits.report["heldout"] == 30
    by_question = {f"{r['q']} ": r["final"] for r in RECORDS}
    batches = train_batches(splits.train, 4, 16, 0, seed=1)
    for _ in range(8):
        batch = next(batches)
        assert batch[grpo.ANSWER].shape == (4, len("56 €56 €56 €".encode()))  # room for the longest, always
        length_B = rlvr.question_length(batch["length_B"], batch["span_BT"])
        for b in range(4):
            question = byte_tokenizer().decode(batch["tokens_BT"][b, : length_B[b]].tolist())
            assert bytes(batch[grpo.ANSWER][b]).rstrip(b"\0").decode() == by_question[question]


def test_without_an_answer_field_the_span_is_the_answer(tmp_path):
    config = write(tmp_path / "q.jsonl", RECORDS)
    splits = load_documents(config, byte_tokenizer(), 0, questions=True)
    answers = {byte_tokenizer().decode(d.tokens_T[~d.span_T].tolist()): d.answer for d in splits.train}
    assert answers["7 plus 7? "] == b"= 14"
    plain = load_documents(config, byte_tokenizer(), 0)
    assert grpo.ANSWER not in next(train_batches(plain.train, 4, 16, 0, seed=1))


def test_a_question_without_an_answer_is_named(tmp_path):
    config = dataclasses.replace(write(tmp_path / "q.jsonl", RECORDS), text="{q}", span="")
    with pytest.raises(ConfigError, match=r"q.jsonl:1: no answer to check responses against.*data.answer"):
        load_documents(config, byte_tokenizer(), 0, questions=True)
    with pytest.raises(ConfigError, match="no field 'solution'"):
        load_documents(dataclasses.replace(config, answer="{solution}"), byte_tokenizer(), 0, questions=True)


def test_questions_end_where_spans_begin():
    span_BT = np.zeros((3, 6), bool)
    span_BT[0, 2:4], span_BT[1, :5] = True, True
    np.testing.assert_array_equal(rlvr.question_length(np.array([6, 5, 4], np.int32), span_BT), [2, 5, 4])


# ---------------------------------------------------------------------------------------------- the step


def test_a_judge_by_hand():
    config = dataclasses.replace(configure(group_size=2, positions=1, thought_tokens=4), rlvr=NO_TAGS)
    thought_BKGL = np.array([[[[4, 2, 0, 0], [5, 2, 0, 0]]], [[[4, 2, 0, 0], [4, 2, 4, 4]]]], np.int32)
    thought_BKGL[0, 0, 0, 2] = 15  # an end-of-text token, spelled p
    length_BKG = np.array([[[3, 2]], [[2, 4]]], np.int32)
    samples = Samples(
        np.full((2, 1), 3), np.ones((2, 1), bool), np.zeros((2, 1, 1), np.float32), thought_BKGL, length_BKG,
        length_BKG < 4, np.zeros(thought_BKGL.shape, np.float32),
    )  # fmt: skip
    batch = {grpo.ANSWER: np.array([[ord("e"), 0], [ord("e"), 0]], np.uint8)}
    seen = []

    def verifier(response, truth, settings):
        seen.append((response, truth))
        return rlvr.exact(response, truth, settings)

    judged = rlvr.judge(config, verifier, (15,), batch, samples, letters, None)
    assert seen == [("ec", "e"), ("fc", "e"), ("ec", "e"), ("ecee", "e")]
    np.testing.assert_array_equal(judged.verdict.reward_BKG[:, 0], [[1, 0], [1, 1]])
    np.testing.assert_array_equal(judged.valid_BK[:, 0], [True, False])
    np.testing.assert_array_equal(judged.verdict.advantage_BKG[:, 0], [[1, -1], [0, 0]])


def test_a_response_sees_the_question_alone():
    """What follows the question in its document changes nothing of what is sampled and learnt."""
    model = small()
    config = dataclasses.replace(configure(positions=1, thought_tokens=3), algorithm="rlvr", rlvr=NO_TAGS)
    template = TEMPLATE._replace(end=(2,))
    batch = batch_of(16, length_B=(9, 7, 6, 9)) | {grpo.ANSWER: np.full((4, 1), ord("e"), np.uint8)}
    other = batch | {"tokens_BT": np.where(np.arange(9) < 4, batch["tokens_BT"], 11)}
    step = rlvr.make_step(model, ADAM, template, config, verifier=lambda response, truth, _: len(response) % 2)
    results = []
    for data in (batch, other):
        state = init_state(rough_params(model), ADAM)
        samples = jax.device_get(step.sample(state.params, state.ema_params, data, jax.random.key(1)))
        np.testing.assert_array_equal(samples.position_BK[:, 0], 4)
        judged = step.judge(data, samples, letters, None)
        results.append((judged, *step.learn(state, data, judged)))
    assert results[0][0].valid_BK.any()
    for one, two in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(one, two)


def test_right_answers_become_likelier():
    """Questions of one token, answers of one token: the question itself. What learns it is the reward alone."""
    model, template = small("llama", vocab_size=12), PLAIN._replace(open=(1,), end=(2,))
    settings = configure(positions=1, group_size=16, thought_tokens=1, temperature=1.0)
    config = dataclasses.replace(settings, algorithm="rlvr", rlvr=NO_TAGS)
    optimizer = optax.adam(1e-2)
    tokens_BT = np.array([[4], [6], [8], [10]] * 2, np.int32)
    batch = {"tokens_BT": tokens_BT, "length_B": np.ones(8, np.int32), "span_BT": np.ones((8, 1), bool)}
    batch |= {"document_B": np.arange(8), grpo.ANSWER: (ord("a") + tokens_BT).astype(np.uint8)}
    step = rlvr.make_step(model, optimizer, template, config, verifier=lambda response, truth, _: response == truth)
    state, rewards = init_state(rough_params(model), optimizer), []
    for n in range(60):
        samples = jax.device_get(step.sample(state.params, state.ema_params, batch, jax.random.key(n)))
        state, metrics, _ = step.learn(state, batch, step.judge(batch, samples, letters, None))
        rewards.append(float(metrics["reward_mean"]))
    assert np.mean(rewards[:5]) < 0.3 and np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.4


def test_every_verifier_of_the_settings_is_there():
    from typing import get_args

    from rlp_jax.config import Verifier

    assert set(rlvr.VERIFIERS) == set(get_args(Verifier))
    rlvr.check_verifier(RLVRConfig(verifier="exact"))  # needs nothing
