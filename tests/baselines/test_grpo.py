# SPDX-License-Identifier: Apache-2.0
"""Advantages, weights and the update from outside rewards: by hand, and against float64 loops over whole sequences."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import relative_error, unshared_gradient
from slow_step import ADAM, CONFIG, TEMPLATE, branch_list, configure, prepared, recorder, steps

from rlp_jax.baselines import grpo
from rlp_jax.config import GRPOConfig
from rlp_jax.learner import Samples
from rlp_jax.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compiles")
ROOT3, ROOT2 = 3**0.5, 2**0.5
RECORDER = recorder()


def group(reward_G, stopped_G=None, length_G=None):
    """A document with one position; and the rewards."""
    G = len(reward_G)
    stopped_G = np.ones(G, bool) if stopped_G is None else np.array(stopped_G, bool)
    length_G = np.full(G, 4, np.int32) if length_G is None else np.array(length_G, np.int32)
    samples = Samples(
        np.array([[3]], np.int32), np.array([[True]]), np.zeros((1, 1, 1), np.float32),
        np.zeros((1, 1, G, 8), np.int32), length_G[None, None], stopped_G[None, None],
        np.zeros((1, 1, G, 8), np.float32),
    )  # fmt: skip
    return samples, np.array(reward_G, np.float32)[None, None]


def test_advantages_by_hand():
    # mean 1/4, standard deviation sqrt(3)/4: (3/4) / (sqrt(3)/4) = sqrt(3), (-1/4) / (sqrt(3)/4) = -1/sqrt(3)
    judged = grpo.with_rewards(*group([1, 0, 0, 0]), GRPOConfig(), 8)
    np.testing.assert_allclose(judged.verdict.advantage_BKG[0, 0], [ROOT3, *[-1 / ROOT3] * 3], rtol=1e-6)
    np.testing.assert_array_equal(judged.verdict.weight_BKG[0, 0], [0.25] * 4)
    assert judged.valid_BK.all()
    centred = grpo.with_rewards(*group([1, 0, 0, 0]), GRPOConfig(normalise=False), 8)
    np.testing.assert_allclose(centred.verdict.advantage_BKG[0, 0], [1, *[-1 / 3] * 3], rtol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7])
def test_equal_rewards_teach_nothing(reward):
    """0.1 three times has a mean that is not 0.1: divided by its own rounding, the rest would be advantages of 1."""
    samples, reward_BKG = group([reward] * 3)
    judged = grpo.with_rewards(samples, reward_BKG, GRPOConfig(), 8)
    assert not judged.valid_BK.any() and not judged.verdict.advantage_BKG.any()
    assert (judged.verdict.tally["groups"], judged.verdict.tally["dropped"]) == (1, 1)
    kept = grpo.with_rewards(samples, reward_BKG, GRPOConfig(drop_equal=False), 8)
    assert kept.valid_BK.all() and not kept.verdict.advantage_BKG.any()
    np.testing.assert_allclose(kept.verdict.tally["reward"], reward, rtol=1e-6)


def test_responses_at_the_cap():
    case = group([1, 0, 0, 1], [True, True, True, False])
    judged = grpo.with_rewards(*case, GRPOConfig(), 8)
    np.testing.assert_allclose(judged.verdict.advantage_BKG[0, 0], [1, -1, -1, 1], rtol=1e-6)  # what they say counts
    wrong = grpo.with_rewards(*case, GRPOConfig(truncated="wrong"), 8)
    np.testing.assert_allclose(wrong.verdict.advantage_BKG[0, 0], [ROOT3, *[-1 / ROOT3] * 3], rtol=1e-6)
    # masked: three are left, mean 1/3, standard deviation sqrt(2)/3
    masked = grpo.with_rewards(*case, GRPOConfig(truncated="masked"), 8)
    np.testing.assert_allclose(masked.verdict.advantage_BKG[0, 0], [ROOT2, -1 / ROOT2, -1 / ROOT2, 0], rtol=1e-6)
    np.testing.assert_allclose(masked.verdict.weight_BKG[0, 0], [1 / 3] * 3 + [0], rtol=1e-6)
    centred = grpo.with_rewards(*case, GRPOConfig(truncated="masked", normalise=False), 8)
    np.testing.assert_allclose(centred.verdict.advantage_BKG[0, 0], [1, -0.5, -0.5, 0], rtol=1e-6)
    for tally in (x.verdict.tally for x in (judged, wrong, masked)):
        assert (tally["responses"], tally["ended"], tally["tokens"], tally["sampled_tokens"]) == (4, 3, 16, 16)


def test_a_group_of_which_all_but_one_are_masked_is_dropped():
    for rewards, stopped in (([1, 0], [True, False]), ([1, 0], [False, False])):
        for settings in (GRPOConfig(truncated="masked"), GRPOConfig(truncated="masked", normalise=False)):
            judged = grpo.with_rewards(*group(rewards, stopped), settings, 8)
            assert not judged.valid_BK.any() and not judged.verdict.advantage_BKG.any()
            assert np.isfinite(judged.verdict.weight_BKG).all()


def test_constant_length_weighs_every_token_alike():
    judged = grpo.with_rewards(*group([1, 0], length_G=[2, 8]), GRPOConfig(length="constant"), 8)
    # 1/2 of a response's sum over 8; the surrogate divides by 2 and 8 tokens
    np.testing.assert_allclose(judged.verdict.weight_BKG[0, 0] / [2, 8], [1 / 16, 1 / 16], rtol=1e-6)


# ---------------------------------------------------------------------------------------------- the update


@functools.cache
def learner(model, optimizer, config=CONFIG):
    return jax.jit(functools.partial(grpo.learn, model, optimizer, TEMPLATE, config))


def case(settings, reward=None):
    """The tiny step's samples with rewards of 0 and 1: document 0's first position all right, the others mixed."""
    model, state, batch, samples = prepared()
    samples = jax.tree.map(np.asarray, samples)
    reward_BKG = np.random.default_rng(5).integers(0, 2, samples.length_BKG.shape).astype(np.float32)
    reward_BKG[..., 0], reward_BKG[..., 1] = 1, 0
    reward_BKG[0, 0] = 1
    reward_BKG = reward_BKG if reward is None else reward
    return model, state, batch, samples, reward_BKG, grpo.with_rewards(samples, reward_BKG, settings, 5)


def slow_gradient(model, state, batch, samples, reward_BKG, settings):
    """(loss, gradient) by loops, from the definitions: at ratio 1 the slope of a token is its weight times A."""
    groups = {}
    for at, branch in branch_list(TEMPLATE, batch, samples, CONFIG.rlp.horizon):
        groups.setdefault(at[:2], []).append((at, branch))
    kept = []
    for members in groups.values():
        rewards = {}
        for at, _ in members:
            cut = not samples.stopped_BKG[at]
            if not (cut and settings.truncated == "masked"):
                rewards[at] = 0.0 if cut and settings.truncated == "wrong" else float(reward_BKG[at])
        if len(set(rewards.values())) > 1 or (not settings.drop_equal and rewards):
            kept.append((members, rewards))
    branches, slopes, loss = [], [], 0.0
    for members, rewards in kept:
        mean = sum(rewards.values()) / len(rewards)
        deviation = (sum((r - mean) ** 2 for r in rewards.values()) / len(rewards)) ** 0.5
        for at, branch in members:
            if at not in rewards or deviation == 0:
                continue
            scale = 1 / deviation if settings.normalise else len(rewards) / (len(rewards) - 1)
            per_token = 1 / (5 if settings.length == "constant" else len(branch.thought))
            share = (rewards[at] - mean) * scale * per_token / len(rewards) / len(kept)
            branches.append(branch)
            slopes.append([-share] * len(branch.thought))
            loss -= share * len(branch.thought)
    return loss, unshared_gradient(model, state.params, branches, CONFIG.rlp.temperature, slopes)


@pytest.mark.parametrize(
    "settings",
    [
        GRPOConfig(),
        GRPOConfig(normalise=False, drop_equal=False),
        GRPOConfig(truncated="wrong", length="constant"),
        GRPOConfig(truncated="masked"),
        GRPOConfig(truncated="masked", normalise=False, length="constant"),
    ],
)
def test_loss_and_gradient_against_loops(settings):
    model, state, batch, samples, reward_BKG, judged = case(settings)
    assert 0 < samples.stopped_BKG[samples.valid_BK].mean() < 1
    assert judged.valid_BK.sum() < samples.valid_BK.sum() or not settings.drop_equal
    new, metrics, scores = learner(model, RECORDER)(state, batch, judged)
    loss, grads = slow_gradient(model, state, batch, samples, reward_BKG, settings)
    assert optax.tree.norm(grads) > 1e-2
    assert relative_error(new.opt_state, grads) < 2e-5
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
    # pi_old is this very forward: the ratio is 1, not nearly, and the sampler agrees at its temperature.
    assert metrics["clip_fraction"] == 0.0 and metrics["logprob_gap"] < 1e-5
    np.testing.assert_array_equal(scores.advantage_BKG, judged.verdict.advantage_BKG)
    assert metrics["positions"] == judged.valid_BK.sum()
    assert metrics["groups_judged"] == samples.valid_BK.sum()


def test_metrics_are_of_all_that_was_judged():
    model, state, batch, samples, reward_BKG, judged = case(GRPOConfig())
    metrics = learner(model, RECORDER)(state, batch, judged)[1]
    valid = samples.valid_BK
    np.testing.assert_allclose(metrics["reward_mean"], reward_BKG[valid].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["thought_len"], samples.length_BKG[valid].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["stop_rate"], samples.stopped_BKG[valid].mean(), rtol=1e-6)
    assert metrics["groups_dropped"] == sum(np.ptp(rewards_G) == 0 for rewards_G in reward_BKG[valid])
    assert not {"s_pred", "s_ema", "reward", "responses", "sampled_tokens"} & metrics.keys()


def test_dropped_groups_have_no_gradient():
    """The update is that of a batch which never had them, whatever their responses were."""
    model, state, batch, samples, reward_BKG, judged = case(GRPOConfig())
    new = learner(model, RECORDER)(state, batch, judged)[0]
    never = samples._replace(valid_BK=judged.valid_BK)
    without = grpo.with_rewards(never, reward_BKG, GRPOConfig(drop_equal=False), 5)
    chex.assert_trees_all_equal(learner(model, RECORDER)(state, batch, without)[0].opt_state, new.opt_state)
    other = judged.thought_BKGL.copy()
    other[~judged.valid_BK] = 9
    changed = learner(model, RECORDER)(state, batch, judged._replace(thought_BKGL=other))[0]
    chex.assert_trees_all_equal(changed.opt_state, new.opt_state)


def test_equal_lengths_make_both_normalisations_the_same():
    model, state, batch, samples, reward_BKG, _ = case(GRPOConfig())
    samples = samples._replace(
        length_BKG=np.full_like(samples.length_BKG, 5), stopped_BKG=np.zeros_like(samples.stopped_BKG)
    )
    ways = [grpo.with_rewards(samples, reward_BKG, GRPOConfig(length=length), 5) for length in ("response", "constant")]
    one, two = (learner(model, RECORDER)(state, batch, judged)[0].opt_state for judged in ways)
    assert relative_error(one, two) < 1e-6


def test_rlps_own_rewards_from_outside_give_rlps_gradient():
    model, state, batch, samples = prepared()
    own, _, scores = steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)
    judged = grpo.with_rewards(
        jax.tree.map(np.asarray, samples), np.asarray(scores.reward_BKG), GRPOConfig(normalise=False), 5
    )
    new, _, _ = learner(model, RECORDER)(state, batch, judged)
    assert relative_error(new.opt_state, own.opt_state) < 1e-5


@pytest.mark.parametrize("minibatches", [1, 2])
def test_without_a_group_nothing_moves(minibatches):
    """Adam's momentum of earlier steps would move the parameters, though there is no gradient."""
    model, state, batch, samples, reward_BKG, judged = case(GRPOConfig())
    config = configure(minibatches=minibatches)
    state = init_state(state.params, ADAM)
    state = learner(model, ADAM, config)(state, batch, judged)[0]
    assert optax.tree.norm(state.opt_state[0].mu) > 0
    nothing = grpo.with_rewards(samples, np.ones_like(reward_BKG), GRPOConfig(), 5)
    new, metrics, _ = learner(model, ADAM, config)(state, batch, nothing)
    chex.assert_trees_all_equal(new._replace(step=state.step), state)
    assert new.step == state.step + 1 and metrics["finite"] == 1.0 and metrics["reward_mean"] == 1.0
    assert metrics["groups_dropped"] == metrics["groups_judged"] == samples.valid_BK.sum()


def test_minibatches_normalise_by_their_own_groups():
    """Two plain gradient steps: each takes the mean over the groups that its own documents have kept."""
    model, state, batch, _, _, judged = case(GRPOConfig())
    # The learning rate is 0, and the second share's gradient is left in the state.
    new = learner(model, RECORDER, configure(minibatches=2))(state, batch, judged)[0]
    rows = np.array([1, 3])  # document b is in share b mod 2
    share = {name: value[rows] for name, value in batch.items()}, jax.tree.map(lambda x: x[rows], judged)
    alone = learner(model, RECORDER)(state, *share)[0]
    assert relative_error(new.opt_state, alone.opt_state) < 1e-5


def test_any_end_of_text_token_ends_a_response():
    model, state, batch, samples = prepared()
    template = grpo.response_template(TEMPLATE._replace(end=(2,), eos=(5, 7)))
    key_BKG = jax.vmap(jax.vmap(lambda key: jax.random.split(key, 3)))(jax.random.split(jax.random.key(0), (4, 2)))
    respond = jax.jit(functools.partial(grpo.respond, model, template, CONFIG))
    thought_BKGL, length_BKG, stopped_BKG, _ = respond(state.params, batch["tokens_BT"], samples.position_BK, key_BKG)
    last = set()
    for at in np.ndindex(length_BKG.shape):
        tokens = np.asarray(thought_BKGL)[at][: length_BKG[at]].tolist()
        assert not {2, 5, 7} & set(tokens[:-1]) and stopped_BKG[at] == (tokens[-1] in {2, 5, 7})
        last.add(tokens[-1])
    assert len(last & {2, 5, 7}) > 1 and not stopped_BKG.all()


def test_a_template_of_responses():
    template = grpo.response_template(TEMPLATE._replace(end=(9,)))
    assert template.close == (9,) and template.open == TEMPLATE.open
    batch = {"tokens_BT": jnp.zeros((1, 2)), grpo.ANSWER: np.zeros((1, 3))}
    assert set(grpo.for_model(batch)) == {"tokens_BT"}
