# SPDX-License-Identifier: Apache-2.0
"""The algorithm by hand: numbers are worked out in the comments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax import objective

LOW, HIGH = 0.2, 0.3


def test_sequence_logprob_by_hand():
    logprob_H = jnp.array([-1.0, -2.0, -6.0])
    assert objective.sequence_logprob(logprob_H) == -3.0  # (-1 - 2 - 6) / 3
    assert objective.sequence_logprob(logprob_H, jnp.array([1, 1, 0])) == -1.5  # (-1 - 2) / 2
    assert objective.sequence_logprob(logprob_H[:1]) == -1.0  # one token, the paper's case: the token itself
    assert objective.sequence_logprob(logprob_H, jnp.zeros(3)) == 0.0
    assert objective.sequence_logprob(jnp.array([-1.0, jnp.nan]), jnp.array([True, False])) == -1.0


def test_information_gain_by_hand():
    # -0.5 - (-2) = 1.5 and -3 - (-2) = -1: one thought helps, the other hurts
    gain_G = objective.information_gain(jnp.array([-0.5, -3.0]), jnp.array(-2.0))
    np.testing.assert_array_equal(gain_G, [1.5, -1.0])


def test_information_gain_is_a_constant_for_the_gradient():
    grads = jax.grad(lambda s, e: objective.information_gain(s, e).sum(), argnums=(0, 1))(jnp.ones((2, 3)), jnp.ones(2))
    chex.assert_trees_all_equal(grads, (jnp.zeros((2, 3)), jnp.zeros(2)))


def test_information_gain_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError):
        objective.information_gain(jnp.zeros((3, 4)), jnp.zeros(1))
    with pytest.raises(AssertionError):
        objective.information_gain(jnp.zeros((3, 4)), jnp.zeros((3, 1)))


def test_group_relative_advantage_by_hand():
    # mean 2, centred (-1, 0, 1) times 3/2. Equally: 1 - (2+3)/2 = -1.5, 2 - (1+3)/2 = 0, 3 - (1+2)/2 = 1.5
    np.testing.assert_array_equal(objective.group_relative_advantage(jnp.array([1.0, 2.0, 3.0])), [-1.5, 0.0, 1.5])
    # two thoughts: each one's advantage is the difference to the other. No standard deviation anywhere: it scales.
    np.testing.assert_array_equal(objective.group_relative_advantage(jnp.array([4.0, 1.0])), [3.0, -3.0])
    np.testing.assert_array_equal(objective.group_relative_advantage(jnp.array([400.0, 100.0])), [300.0, -300.0])


def test_rewards_of_zero_and_one_may_be_integers():
    # mean 1/4, centred (3/4, -1/4, -1/4, -1/4) times 4/3
    advantage_G = objective.group_relative_advantage(jnp.array([1, 0, 0, 0]))
    np.testing.assert_allclose(advantage_G, [1.0, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (5, 1), (0,)])
def test_a_group_needs_two_thoughts(shape):
    with pytest.raises(ValueError, match=rf"group_size is {shape[-1]}.*at least 2"):
        objective.group_relative_advantage(jnp.zeros(shape))


def test_group_normalised_advantage_by_hand():
    # mean 1/4, deviations (3/4, -1/4, -1/4, -1/4), their squares' mean 3/16: (3/4) / (sqrt(3)/4) = sqrt(3)
    advantage_G = objective.group_normalised_advantage(jnp.array([1, 0, 0, 0]))
    np.testing.assert_allclose(advantage_G, [3**0.5, *[-(3**-0.5)] * 3], rtol=1e-6)
    # in units of the spread: it does not scale, nor shift
    for reward_G in ([4.0, 1.0], [400.0, 100.0], [5.0, 2.0]):
        np.testing.assert_allclose(objective.group_normalised_advantage(jnp.array(reward_G)), [1.0, -1.0], rtol=1e-6)
    # three times 0.1 has another mean in float32: its rounding must not be divided by itself
    assert not objective.group_normalised_advantage(jnp.full((5, 3), 0.1)).any()
    assert jax.grad(lambda r: objective.group_normalised_advantage(r).sum())(jnp.array([1.0, 0.0])).tolist() == [0, 0]


def test_advantages_of_those_that_count():
    reward_G, counted_G = jnp.array([1.0, 2.0, jnp.nan, 6.0]), jnp.array([True, True, False, True])
    # mean of 1, 2 and 6 is 3; centred (-2, -1, 3) times 3/2; their squares' mean is 14/3
    relative_G = objective.group_relative_advantage(reward_G, counted_G)
    np.testing.assert_allclose(relative_G, [-3, -1.5, 0, 4.5], rtol=1e-6)
    normalised_G = objective.group_normalised_advantage(reward_G, counted_G)
    np.testing.assert_allclose(normalised_G, np.array([-2, -1, 0, 3]) / (14 / 3) ** 0.5, rtol=1e-6)
    for one_G in (jnp.array([True, False, False, False]), jnp.zeros(4, bool)):
        for advantage in (objective.group_relative_advantage, objective.group_normalised_advantage):
            np.testing.assert_array_equal(advantage(reward_G, one_G), np.zeros(4))
        assert not objective.rewards_differ(reward_G, one_G)
    assert objective.rewards_differ(reward_G, counted_G)


def test_importance_ratio_by_hand():
    # log ratios log 2, log 1/2 and a masked place
    logprob_GL = jnp.log(jnp.array([[0.5, 0.25, 0.9]]))
    old_GL = jnp.log(jnp.array([[0.25, 0.5, 0.1]]))
    ratio_GL = objective.importance_ratio(logprob_GL, old_GL, jnp.array([[1, 1, 0]]))
    np.testing.assert_allclose(ratio_GL, [[2.0, 0.5, 1.0]], rtol=1e-6)


def test_clipped_surrogate_by_hand():
    ratio_GL = jnp.array([[0.5, 1.0, 2.0, 7.0], [0.5, 1.0, 2.0, 7.0]])
    mask_GL = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    # A = 2:  rho A = 1, 2, 4; clipped to [0.8, 1.3]: 1.6, 2, 2.6. Minima 1, 2, 2.6; mean 5.6/3.
    # A = -2: rho A = -1, -2;  clipped: -1.6, -2.               Minima -1.6, -2;    mean -1.8 (two tokens count).
    loss_G = objective.clipped_surrogate(ratio_GL, jnp.array([2.0, -2.0]), mask_GL, LOW, HIGH)
    np.testing.assert_allclose(loss_G, [-5.6 / 3, 1.8], rtol=1e-6)


def test_a_thought_without_tokens_costs_nothing():
    loss_G = objective.clipped_surrogate(jnp.ones((1, 3)), jnp.ones(1), jnp.zeros((1, 3)))
    np.testing.assert_array_equal(loss_G, [0.0])


def test_truncated_importance_weight_by_hand():
    weight_L = objective.truncated_importance_weight(
        jnp.log(jnp.array([0.5, 0.9, 0.2, 0.3])),
        jnp.log(jnp.array([0.25, 0.3, 0.4, 0.1])),
        jnp.array([1, 1, 1, 0]),
        2.5,
    )
    np.testing.assert_allclose(weight_L, [2.0, 2.5, 0.5, 1.0], rtol=1e-6)
    mask_L, ratio_L = jnp.array([1, 1, 1, 0]), jnp.ones(4)
    loss = objective.clipped_surrogate(ratio_L, jnp.array(3.0), mask_L, weight_GL=weight_L)
    np.testing.assert_allclose(loss, -3.0 * (2.0 + 2.5 + 0.5) / 3, rtol=1e-6)
    slope = jax.grad(lambda x: objective.truncated_importance_weight(x, x[::-1], mask_L, 2.0).sum())(jnp.ones(4))
    assert not slope.any()


def test_length_normalisation_counts_thought_tokens_only():
    # (2 + 4) / 2, whatever the padding holds
    value_GL = jnp.array([[2.0, 4.0, jnp.nan, jnp.inf]])
    np.testing.assert_array_equal(objective.length_normalised_sum(value_GL, jnp.array([[1, 1, 0, 0]])), [3.0])


def test_clip_fraction_by_hand():
    ratio_GL = jnp.array([[0.5, 1.0, 2.0, 9.0], [0.5, 1.0, 2.0, 0.1]])
    mask_GL = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0]])
    # A > 0 loses the 2.0, A < 0 loses the 0.5: two of six thought tokens
    fraction = objective.clip_fraction(ratio_GL, jnp.array([1.0, -1.0]), mask_GL, LOW, HIGH)
    np.testing.assert_allclose(fraction, 2 / 6, rtol=1e-6)
    assert objective.clip_fraction(ratio_GL, jnp.zeros(2), mask_GL) == 0.0
    assert objective.clip_fraction(ratio_GL, jnp.ones(2), jnp.zeros((2, 4))) == 0.0


def test_token_kl_by_hand():
    # p = 1/2, q = 1/4: d = log 1/2, exp(d) - d - 1 = 0.5 + 0.693147 - 1 = 0.193147; and 0 at equality; mean of both
    logprob_GL = jnp.log(jnp.array([[0.5, 0.5]]))
    reference_GL = jnp.log(jnp.array([[0.25, 0.5]]))
    kl_G = objective.token_kl(logprob_GL, reference_GL, jnp.ones((1, 2)))
    np.testing.assert_allclose(kl_G, [0.193147 / 2], rtol=1e-5)


def test_ema_update_by_hand():
    # 0.9 * 1 + 0.1 * 3 = 1.2;  0.9 * (-2) + 0.1 * 8 = -1
    ema = objective.ema_update({"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([3.0, 8.0])}, 0.9)
    np.testing.assert_allclose(ema["a"], [1.2, -1.0], rtol=1e-6)
    # after n steps towards a constant the distance is decay^n: 1 - 0.999^1000 = 0.632305
    ema = jnp.zeros(1)
    ema = jax.lax.fori_loop(0, 1000, lambda _, e: objective.ema_update(e, jnp.ones(1), 0.999), ema)
    np.testing.assert_allclose(ema, [0.632305], rtol=1e-4)
