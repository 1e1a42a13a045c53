# SPDX-License-Identifier: Apache-2.0
"""RPT: the reward on bytes, the entropy that chooses positions, rounds of sampling, and that it is a pure function."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from reference import apply, rough_params
from slow_step import ADAM, TEMPLATE, batch_of, configure, small

from rlp_jax.baselines import rpt
from rlp_jax.checkpoints_io.load import open_model
from rlp_jax.config import Config, ConfigError, RPTConfig
from rlp_jax.learner import Samples
from rlp_jax.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compiles")
PIECES = ["The", " dog", " runs", ".", " f", "ür", " 🙂"]
END = TEMPLATE._replace(end=(2,))
NO_TAGS = RPTConfig(answer_after="", answer_open="", answer_close="c", entropy_threshold=0.5)


def joined(ids):
    return "".join(PIECES[i] for i in ids)


def as_bytes(ids):
    """A token a byte."""
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("prediction", "reward"),
    [
        (" dog", 1), (" dog runs", 1), (" dog runs.", 1), (" dog runs. für 🙂", 1),
        ("dog", 0), (" do", 0), (" dog ", 0), (" dog run", 0), (" Dog", 0), (" dog walks", 0), (" dogs", 0),
        ("", 0), (" ", 0), (" dog runs. für 🙂!", 0),
    ],
)  # fmt: skip
def test_the_reward_is_an_exact_prefix_that_ends_with_a_token(prediction, reward):
    tokens = list(range(7))
    rest, ends = rpt.continuation(tokens, 1, joined), rpt.token_ends(tokens, 1, joined, 100)
    assert rest == " dog runs. für 🙂".encode()
    assert ends == {4, 9, 10, 12, 15, 20}  # cumulative bytes: ü is two of them, the smiley four
    assert rpt.prefix_reward(prediction, rest, ends) == reward


def test_tokens_that_are_parts_of_characters():
    tokens = list("aüb".encode())
    assert rpt.continuation(tokens, 1, as_bytes) == "üb".encode()
    assert rpt.token_ends(tokens, 1, as_bytes, 9) == {2, 3}  # not 1: no text ends inside ü
    assert rpt.continuation(tokens, 2, as_bytes) == b""  # nor begins there
    assert rpt.prefix_reward("ü", "üb".encode(), frozenset({2, 3})) == 1.0
    assert rpt.prefix_reward("�", "üb".encode(), frozenset({2, 3})) == 0.0


def test_ends_are_found_no_further_than_asked():
    assert rpt.token_ends(list(range(7)), 1, joined, 9) == {4, 9}


def test_words_that_the_tokenizer_joins_with_spaces():
    _, tokenizer, _ = open_model("quickstart", "float32")
    tokens = tokenizer.encode("c flip turn = b . d swap =")
    rest, ends = rpt.continuation(tokens, 4, tokenizer.decode), rpt.token_ends(tokens, 4, tokenizer.decode, 4)
    assert rest.startswith(b" b . d") and ends == {2, 4}
    settings = RPTConfig(answer_open="", answer_close=" .")
    response = tokenizer.encode("c flip h turn f </think> b .")
    answer, count = rpt.first_answer(response, tokenizer.decode, settings)
    assert rpt.prefix_reward(answer, rest, ends) == 1.0 and count == len(response)


# ---------------------------------------------------------------------------------------------- positions


def test_entropy_over_the_likeliest_tokens():
    model = small("qwen3")
    params, batch = rough_params(model), batch_of(290)
    logits_BTV = np.float64(apply(model, params, batch["tokens_BT"])[0])
    top_BTn = np.sort(logits_BTV, -1)[..., -16:]
    p_BTn = np.exp(top_BTn) / np.exp(top_BTn).sum(-1, keepdims=True)
    wanted_BT = -(p_BTn * np.log(p_BTn)).sum(-1)
    hidden_BTD, _ = model.hidden(params, batch["tokens_BT"])
    entropy_BT = jax.jit(functools.partial(rpt.top_entropy, model, top=16))(params, hidden_BTD)
    np.testing.assert_allclose(entropy_BT, wanted_BT, rtol=1e-4)
    assert wanted_BT.min() > 0.3 and wanted_BT.max() < np.log(16)
    everything = rpt.top_entropy(model, params, hidden_BTD, 1000)  # more than there are
    whole_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    np.testing.assert_allclose(everything, -(whole_BTV * np.log(whole_BTV)).sum(-1), rtol=1e-4)


@functools.cache
def run(threshold=0.0, positions=2, **changes):
    """Model, parameters, batch and step. The template's closing token 2 ends a response, and is the letter c."""
    settings = dataclasses.replace(NO_TAGS, entropy_threshold=threshold, **changes)
    config = dataclasses.replace(configure(positions=positions), algorithm="rpt", rpt=settings)
    model = small()
    batch = batch_of(16, length_B=(9, 7, 2, 9))
    return model, rough_params(model), batch, config, rpt.make_step(model, ADAM, END, config)


def letters(ids):
    return "".join(chr(ord("a") + i) for i in ids)


def coarse(ids):
    """The closing c, and all other tokens as one letter: then right and wrong responses are both common."""
    return "".join("c" if i == 2 else "x" for i in ids)


def entropy_of(model, params, batch):
    plain_BT = np.concatenate([np.full((4, 1), TEMPLATE.plain[0]), batch["tokens_BT"]], 1)
    hidden_BTD, _ = model.hidden(params, plain_BT)
    return np.asarray(rpt.top_entropy(model, params, hidden_BTD, 16))[:, :-1]


def test_positions_are_those_where_the_proxy_is_unsure():
    model, params, batch, *_ = run()
    entropy_BT = entropy_of(model, rough_params(model, 1), batch)  # of the moving average, not of the policy
    inside_BT = np.arange(9) < batch["length_B"][:, None]
    threshold = float(np.median(entropy_BT[inside_BT]))
    step = run(threshold=threshold)[-1]
    samples = step.sample(params, rough_params(model, 1), batch, jax.random.key(3))
    high_BT = (entropy_BT > threshold) & inside_BT
    assert 0 < high_BT.sum() < inside_BT.sum()
    for b in range(4):
        chosen = set(np.asarray(samples.position_BK)[b][np.asarray(samples.valid_BK)[b]])
        assert len(chosen) == min(2, high_BT[b].sum()) and all(high_BT[b, t] for t in chosen)


def test_another_model_as_the_proxy(tmp_path):
    from tiny_run import byte_tokenizer, tiny_config, write_model

    own = tiny_config(tmp_path)
    rpt.check_proxy(dataclasses.replace(own, rpt=RPTConfig(proxy=own.model)), byte_tokenizer())
    with pytest.raises(ConfigError, match=r"rpt.proxy is 'quickstart'.*tokenizer"):
        rpt.check_proxy(dataclasses.replace(own, rpt=RPTConfig(proxy="quickstart")), byte_tokenizer())
    model, _, read = open_model(str(write_model(tmp_path / "again")), "float32")
    from rlp_jax.checkpoints_io.leaves import Target

    params, other = read(Target(None)), jax.tree.map(lambda x: x + 0.3, read(Target(None)))
    batch = {"tokens_BT": np.arange(40, 56)[None].repeat(2, 0) % 256, "length_B": np.array([16, 16], np.int32)}
    batch |= {"span_BT": np.ones((2, 16), bool), "document_B": np.arange(2)}
    settings = dataclasses.replace(own.rpt, entropy_threshold=1.0, proxy=own.model)
    config = dataclasses.replace(own, rpt=settings)
    template = END._replace(plain=(), context=())
    by_path = rpt.make_step(model, ADAM, template, config).sample(params, other, batch, jax.random.key(0))
    as_average = dataclasses.replace(config, rpt=dataclasses.replace(settings, proxy=""))
    by_average = rpt.make_step(model, ADAM, template, as_average).sample(params, params, batch, jax.random.key(0))
    chex.assert_trees_all_equal(by_path, by_average)


def test_rounds_draw_without_replacement():
    _, params, batch, _, step = run(positions=2)
    first = step.sample(params, params, batch, jax.random.key(3))
    tried_BT = np.zeros((4, 9), bool)
    row, k = np.nonzero(first.valid_BK)
    tried_BT[row, np.asarray(first.position_BK)[row, k]] = True
    second = step.sample(params, params, batch, jax.random.key(3), tried_BT)
    both = run(positions=4)[-1].sample(params, params, batch, jax.random.key(3))
    for b in range(4):
        rounds = [p for x in (first, second) for p in np.asarray(x.position_BK)[b][np.asarray(x.valid_BK)[b]].tolist()]
        assert sorted(rounds) == np.asarray(both.position_BK)[b][np.asarray(both.valid_BK)[b]].tolist()
        assert len(set(rounds)) == len(rounds)


# ---------------------------------------------------------------------------------------------- the judge

PLENTY = Config(
    rlp=configure(positions=1, group_size=2, thought_tokens=8).rlp, rpt=dataclasses.replace(NO_TAGS, rounds=3)
)


def responses(positions, texts, valid=True):
    """One position a document, two responses each, as text; the cap is 8."""
    B = len(positions)
    thought_BKGL, length_BKG = np.zeros((B, 1, 2, 8), np.int32), np.zeros((B, 1, 2), np.int32)
    for b, g in np.ndindex(B, 2):
        ids = [ord(x) - ord("a") for x in texts[b][g]]
        thought_BKGL[b, 0, g, : len(ids)], length_BKG[b, 0, g] = ids, len(ids)
    valid_BK = np.broadcast_to(np.array(valid), (B,))[:, None].copy()
    stopped_BKG = np.zeros((B, 1, 2), bool)
    return Samples(
        np.array(positions, np.int32)[:, None], valid_BK, np.zeros((B, 1, 1), np.float32), thought_BKGL, length_BKG,
        stopped_BKG, np.zeros((B, 1, 2, 8), np.float32),
    )  # fmt: skip


def documents(*texts):
    tokens_BT = np.array([[ord(x) - ord("a") for x in text] for text in texts], np.int32)
    return {"tokens_BT": tokens_BT, "length_B": np.full(len(texts), tokens_BT.shape[1], np.int32)}


def never(*more):
    raise AssertionError("sampled again")


def test_a_round_by_hand():
    batch = documents("defgh", "defgh")
    # after "de" the text goes on with "fgh"; an answer ends before the first c
    samples = responses([2, 2], [("fgcxy", "gcfc"), ("fghc", "fg")])
    judged = rpt.judge_round(PLENTY, batch, samples, letters)
    np.testing.assert_array_equal(judged.verdict.reward_BKG[:, 0], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(judged.length_BKG[:, 0], [[3, 2], [4, 2]])  # cut where the answer closes
    np.testing.assert_array_equal(judged.stopped_BKG[:, 0], [[True, True], [True, False]])
    assert judged.verdict.tally["sampled_tokens"].sum() == 5 + 4 + 4 + 2 and judged.verdict.tally["tokens"].sum() == 11


def test_groups_that_are_all_right_or_all_wrong_are_refilled():
    batch = documents("defgh", "defgh", "defgh")
    asked = []
    rounds = [
        responses([0, 3, 3], [("xc", "xc"), ("gc", "ec"), ("gc", "gc")], [False, True, True]),
        responses([0, 0, 0], [("xc", "xc"), ("xc", "xc"), ("xc", "xc")], [False, False, False]),
    ]

    def again(tried_BT):
        asked.append(tried_BT.copy())
        return rounds[len(asked) - 1]

    first = responses([2, 2, 2], [("fc", "gc"), ("gc", "gc"), ("fc", "fc")])
    untouched = jax.tree.map(np.copy, first)
    kept = rpt.judge(PLENTY, batch, first, letters, again)
    chex.assert_trees_all_equal(first, untouched)
    # Documents 0 and 1 found a group, the third had none left to try.
    np.testing.assert_array_equal(kept.valid_BK[:, 0], [True, True, False])
    np.testing.assert_array_equal(kept.position_BK[:2, 0], [2, 3])
    np.testing.assert_array_equal(kept.verdict.reward_BKG[:2, 0], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(asked[0], np.array([[1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]], bool))
    np.testing.assert_array_equal(asked[1], np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0]], bool))
    assert len(asked) == 2
    tally = {name: float(value.sum()) for name, value in kept.verdict.tally.items()}
    assert tally["rounds"] == 3 and tally["positions_empty"] == 1
    assert tally["groups"] == 3 + 2 and tally["dropped"] == 5 - 2
    assert tally["reward"] == 0.5 + 0 + 1 and tally["reward_groups"] == 3  # the first round's alone
    assert tally["sampled_tokens"] == 3 * 2 * 2 * 3


@pytest.mark.parametrize(
    ("first", "rounds", "settings"),
    [
        (responses([2], [("fc", "gc")]), 1, {}),  # full
        (responses([2], [("fc", "fc")]), 1, {"rounds": 1}),  # used up
        (responses([2], [("fc", "fc")]), 1, {"drop_equal": False}),  # kept as it is
        (responses([2], [("fc", "fc")], False), 1, {}),  # nowhere to go
    ],
)
def test_rounds_end(first, rounds, settings):
    config = dataclasses.replace(PLENTY, rpt=dataclasses.replace(PLENTY.rpt, **settings))
    kept = rpt.judge(config, documents("defgh"), first, letters, never)
    assert kept.verdict.tally["rounds"].sum() == rounds


def test_positions_stay_in_order():
    kept = responses([4, 2], [("fc", "gc"), ("fc", "gc")])
    kept = jax.tree.map(lambda x: x.reshape(1, 2, *x.shape[2:]), kept)
    kept = kept._replace(valid_BK=np.array([[True, True]]))
    ordered = rpt.ascending(kept)
    assert ordered.position_BK.tolist() == [[2, 4]]
    np.testing.assert_array_equal(ordered.thought_BKGL, kept.thought_BKGL[:, ::-1])
    kept = kept._replace(valid_BK=np.array([[True, False]]))
    assert rpt.ascending(kept).position_BK.tolist() == [[4, 2]]


def test_a_step_is_a_function_of_its_batch_and_key():
    """Sample, judge in rounds, learn; twice the same, and the sampler's numbers are the trainer's."""
    _, params, batch, _, step = run(rounds=3)
    results, calls = [], []
    for _ in range(2):
        state = init_state(params, ADAM)

        def sample(*more, state=state):
            calls.append(more)
            return jax.device_get(step.sample(state.params, state.ema_params, batch, jax.random.key(3), *more))

        judged = step.judge(batch, sample(), coarse, sample)
        results.append((judged, *step.learn(state, batch, judged)))
    chex.assert_trees_all_equal(*results)
    judged, new, metrics, _ = results[0]
    assert len(calls) == 2 * metrics["rounds"] > 2
    assert judged.valid_BK.any() and metrics["groups_dropped"] > 0
    assert metrics["clip_fraction"] == 0 and metrics["logprob_gap"] < 1e-5 and metrics["finite"] == 1
    assert new.step == 1 and not np.allclose(new.params["final_norm"]["scale"], params["final_norm"]["scale"])
    assert metrics["positions"] + metrics["positions_empty"] == 8
