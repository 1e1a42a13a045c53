# SPDX-License-Identifier: Apache-2.0
"""Several updates on one batch of thoughts, and thoughts that another program than the trainer's forward sampled."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from reference import relative_error, rough_params
from slow_step import CONFIG, TEMPLATE, configure, prepared, slow_loss, slow_rewards, small, steps

from rlp_jax import objective, rlp

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_second_update_is_measured_from_the_first():
    config = configure(updates_per_batch=2)
    model, state, batch, samples = prepared()
    learning_rate = 0.3
    new, metrics, scores = steps(model, TEMPLATE, config, learning_rate=learning_rate)[2](state, batch, samples)
    old = state.params
    rewards = slow_rewards(model, old, TEMPLATE, batch, samples, config)
    rest = (TEMPLATE, batch, samples, rewards, config)
    _, _, first = slow_loss(model, old, old, old, *rest)
    moved = jax.tree.map(lambda p, g: p - learning_rate * g, old, first)
    loss, clipped, second = slow_loss(model, moved, old, old, *rest)
    np.testing.assert_allclose(scores.reward_BKG[0, 0], [rewards[0, 0, g] for g in range(3)], rtol=1e-4, atol=1e-4)
    assert clipped > 0 and abs(loss) > 1e-3  # ratios have left 1, some beyond the clip
    np.testing.assert_allclose(metrics["clip_fraction"], clipped, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3)
    assert relative_error(new.opt_state, second) < 1e-3  # the first step's rounding, through exp
    ema = state.ema_params  # moves after each update
    for params in (moved, new.params):
        ema = objective.ema_update(ema, params, 0.9)
    chex.assert_trees_all_close(new.ema_params, ema, rtol=1e-4, atol=1e-5)
    assert new.step == state.step + 1


def share_of(tree, rows):
    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)


@pytest.mark.parametrize("passes", [1, 2])
def test_minibatches_are_measured_from_the_parameters_that_sampled(passes):
    """Two shares of two documents, each pass in order: plain descent on the slow loss, rho from the start."""
    config = configure(minibatches=2, updates_per_batch=passes, microbatches=2)
    model, state, batch, samples = prepared()
    learning_rate, old = 0.2, state.params
    new, metrics, scores = steps(model, TEMPLATE, config, learning_rate=learning_rate)[2](state, batch, samples)
    rewards = slow_rewards(model, old, TEMPLATE, batch, samples, config)
    for at, reward in rewards.items():
        np.testing.assert_allclose(scores.reward_BKG[at], reward, rtol=1e-4, atol=1e-4)
    params, ema = old, state.ema_params
    for n in range(2 * passes):
        rows = slice(n % 2, None, 2)  # neighbours live on one device: a share is every second document
        own = {(at[0] // 2, *at[1:]): reward for at, reward in rewards.items() if at[0] % 2 == n % 2}
        rest = (TEMPLATE, share_of(batch, rows), share_of(samples, rows), own, config)
        loss, clipped, grads = slow_loss(model, params, old, old, *rest)
        params = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
        ema = objective.ema_update(ema, params, 0.9)
    assert abs(loss) > 1e-4
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-3)
    np.testing.assert_allclose(metrics["clip_fraction"], clipped, rtol=1e-5)
    chex.assert_trees_all_close(new.params, params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(new.ema_params, ema, rtol=1e-4, atol=1e-5)
    assert new.step == state.step + 1


def test_importance_weights_correct_for_the_sampler():
    config = configure(importance_cap=1.5)
    model, state, batch, samples = prepared()
    rng = np.random.default_rng(0)
    off = rng.normal(0, 0.5, samples.logprob_BKGL.shape).astype(np.float32)
    samples = samples._replace(logprob_BKGL=samples.logprob_BKGL + off)  # a sampler that is off
    new, metrics, _ = steps(model, TEMPLATE, config)[2](state, batch, samples)
    rewards = slow_rewards(model, state.params, TEMPLATE, batch, samples, config)
    p = state.params
    loss, _, grads = slow_loss(model, p, p, p, TEMPLATE, batch, samples, rewards, config)
    assert relative_error(new.opt_state, grads) < 5e-5
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-3, atol=1e-5)
    without, _, _ = steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)
    assert relative_error(without.opt_state, grads) > 1e-2


def test_thoughts_in_bfloat16_are_scored_in_float32():
    config = dataclasses.replace(configure(rollout_dtype="bfloat16"), compute_dtype="float32")
    model, state, batch, samples = prepared("qwen3", config=config)
    _, exact, learn = steps(model, TEMPLATE, CONFIG)
    _, metrics, _ = learn(state, batch, samples)
    assert 1e-4 < metrics["logprob_gap"] < 0.1  # bfloat16 has been at work, and little more
    same = exact(state.params, state.ema_params, batch, jax.random.key(3))
    np.testing.assert_array_equal(same.s_ema_BKH, samples.s_ema_BKH)  # the baseline is read in float32
    np.testing.assert_array_equal(same.position_BK, samples.position_BK)


def test_slots_and_filters_reach_the_rollout():
    """A filter that leaves one token makes every thought of a position the same, of probability 1."""
    model = small()
    _, sample, learn = steps(model, TEMPLATE, configure(top_k=1, slots=2))
    _, state, batch, _ = prepared()
    samples = sample(rough_params(model), state.ema_params, batch, jax.random.key(3))
    np.testing.assert_array_equal(samples.thought_BKGL, samples.thought_BKGL[:, :, :1].repeat(3, 2))
    assert not np.asarray(samples.logprob_BKGL).any()
    _, metrics, _ = learn(state, batch, samples)
    assert metrics["entropy"] == 0.0 and metrics["logprob_gap"] == 0.0
    assert isinstance(samples, rlp.Samples)
