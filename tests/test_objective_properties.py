# SPDX-License-Identifier: Apache-2.0
"""The algorithm against float64 numpy, under jit and vmap, and by its properties.

The references are plain float64 numpy loops over the equations, written without looking at the vectorised form.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlp_jax import objective

LOW, HIGH = 0.2, 0.3


def reference_sequence_logprob(logprob_H, mask_H):
    counted = [float(x) for x, m in zip(logprob_H, mask_H, strict=True) if m]
    return sum(counted) / len(counted) if counted else 0.0


def reference_advantage(reward_G):
    out = []
    for i in range(len(reward_G)):
        others = [float(r) for j, r in enumerate(reward_G) if j != i]
        out.append(float(reward_G[i]) - sum(others) / len(others))
    return np.array(out)


def reference_surrogate(logprob_GL, old_GL, advantage_G, mask_GL, low, high):
    losses = []
    for g in range(len(advantage_G)):
        terms = []
        for u in range(mask_GL.shape[1]):
            if mask_GL[g, u]:
                rho = np.exp(np.float64(logprob_GL[g, u]) - np.float64(old_GL[g, u]))
                clipped = min(max(rho, 1 - low), 1 + high)
                terms.append(min(rho * float(advantage_G[g]), clipped * float(advantage_G[g])))
        losses.append(-sum(terms) / len(terms) if terms else 0.0)
    return np.array(losses)


def reference_token_kl(logprob_GL, reference_GL, mask_GL):
    out = []
    for g in range(mask_GL.shape[0]):
        d = [float(r) - float(p) for p, r, m in zip(logprob_GL[g], reference_GL[g], mask_GL[g], strict=True) if m]
        out.append(sum(np.exp(x) - x - 1 for x in d) / len(d) if d else 0.0)
    return np.array(out)


def random_case(seed, group_size=4, length=5, spread=0.5):
    """Log-probabilities of both policies, rewards and ragged masks (each thought has at least one token)."""
    rng = np.random.default_rng(seed)
    old_GL = -rng.exponential(1.5, (group_size, length))
    logprob_GL = old_GL + spread * rng.normal(size=(group_size, length))
    mask_GL = np.arange(length) < rng.integers(1, length + 1, (group_size, 1))
    reward_G = rng.normal(size=group_size) * 2
    return logprob_GL.astype(np.float32), old_GL.astype(np.float32), reward_G.astype(np.float32), mask_GL


# ------------------------------------------------------------------------------- against float64 numpy, jit, vmap

seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([(2, 1), (3, 4), (5, 2)])  # few shapes: each compiles anew


@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=sizes)
def test_every_function_against_float64(seed, size):
    logprob_GL, old_GL, reward_G, mask_GL = random_case(seed, *size)
    advantage_G = reference_advantage(reward_G)

    np.testing.assert_allclose(
        jax.vmap(objective.sequence_logprob)(logprob_GL, mask_GL),
        [reference_sequence_logprob(x, m) for x, m in zip(logprob_GL, mask_GL, strict=True)],
        rtol=1e-5,
        atol=1e-6,
    )
    s_ema = np.float32(logprob_GL[0, 0])
    np.testing.assert_allclose(
        objective.information_gain(logprob_GL[:, 0], s_ema),
        logprob_GL[:, 0].astype(np.float64) - np.float64(s_ema),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(objective.group_relative_advantage(reward_G), advantage_G, rtol=1e-5, atol=2e-6)

    ratio_GL = objective.importance_ratio(logprob_GL, old_GL, mask_GL)
    exact_GL = np.where(mask_GL, np.exp(logprob_GL.astype(np.float64) - old_GL.astype(np.float64)), 1.0)
    np.testing.assert_allclose(ratio_GL, exact_GL, rtol=1e-5)

    np.testing.assert_allclose(
        objective.clipped_surrogate(ratio_GL, advantage_G.astype(np.float32), mask_GL, LOW, HIGH),
        reference_surrogate(logprob_GL, old_GL, advantage_G, mask_GL, LOW, HIGH),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        objective.token_kl(logprob_GL, old_GL, mask_GL),
        reference_token_kl(logprob_GL, old_GL, mask_GL),
        rtol=1e-4,
        atol=1e-6,
    )
    # a token is clipped where the surrogate no longer equals rho A
    cut_GL = mask_GL & (np.clip(exact_GL, 1 - LOW, 1 + HIGH) * advantage_G[:, None] < exact_GL * advantage_G[:, None])
    np.testing.assert_allclose(
        objective.clip_fraction(ratio_GL, advantage_G, mask_GL, LOW, HIGH), cut_GL.sum() / mask_GL.sum(), rtol=1e-6
    )

    ema = objective.ema_update({"w": old_GL}, {"w": logprob_GL}, 0.97)
    exact = 0.97 * old_GL.astype(np.float64) + 0.03 * logprob_GL.astype(np.float64)
    np.testing.assert_allclose(ema["w"], exact, rtol=1e-5, atol=1e-6)


def whole_loss(logprob_GL, old_GL, s_pred_G, s_ema, mask_GL):
    advantage_G = objective.group_relative_advantage(objective.information_gain(s_pred_G, s_ema))
    ratio_GL = objective.importance_ratio(logprob_GL, old_GL, mask_GL)
    loss_G = objective.clipped_surrogate(ratio_GL, advantage_G, mask_GL, LOW, HIGH)
    return loss_G + 0.1 * objective.token_kl(logprob_GL, old_GL, mask_GL)


def test_leading_axes_jit_and_vmap_are_a_loop_over_positions():
    cases = [[random_case(10 * b + k) for k in range(3)] for b in range(2)]
    logprob_BKGL, old_BKGL, s_pred_BKG, mask_BKGL = (
        np.stack([np.stack([case[i] for case in row]) for row in cases]) for i in range(4)
    )
    s_ema_BK = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    args = (logprob_BKGL, old_BKGL, s_pred_BKG, s_ema_BK, mask_BKGL)

    looped = np.array([[whole_loss(*(a[b, k] for a in args)) for k in range(3)] for b in range(2)])
    assert looped.shape == (2, 3, 4)
    for variant in (whole_loss, jax.jit(whole_loss), jax.vmap(whole_loss), jax.jit(jax.vmap(jax.vmap(whole_loss)))):
        np.testing.assert_allclose(variant(*args), looped, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs_are_computed_in_float32():
    logprob_GL, old_GL, reward_G, mask_GL = random_case(3)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (logprob_GL, old_GL, reward_G)]
    exact = [np.asarray(x, np.float64) for x in half]  # the same rounded numbers
    assert objective.importance_ratio(half[0], half[1], mask_GL).dtype == jnp.float32
    np.testing.assert_allclose(
        objective.importance_ratio(half[0], half[1], mask_GL),
        np.where(mask_GL, np.exp(exact[0] - exact[1]), 1.0),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        objective.group_relative_advantage(half[2]), reference_advantage(exact[2]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        objective.token_kl(half[0], half[1], mask_GL), reference_token_kl(exact[0], exact[1], mask_GL), rtol=1e-4
    )


# --------------------------------------------------------------------------------------------------- properties


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_counting_some_is_as_if_the_others_were_not_there(rewards, random_):
    counted = [random_.random() < 0.7 for _ in rewards]
    left = [reward for reward, counts in zip(rewards, counted, strict=True) if counts]
    if len(left) < 2:
        return
    for advantage in (objective.group_relative_advantage, objective.group_normalised_advantage):
        of_all = advantage(jnp.array(rewards, jnp.float32), jnp.array(counted))
        alone = advantage(jnp.array(left, jnp.float32))
        assert np.isfinite(alone).all()
        np.testing.assert_allclose(np.asarray(of_all)[np.array(counted)], alone, rtol=1e-4, atol=1e-5)
        assert not np.asarray(of_all)[~np.array(counted)].any()


@pytest.mark.parametrize("rubbish", [0.0, -1e30, np.nan, np.inf, -np.inf])
def test_only_thought_tokens_carry_gradient(rubbish):
    logprob_GL, old_GL, reward_G, mask_GL = random_case(7)
    assert not mask_GL.all()
    clean = (np.where(mask_GL, logprob_GL, 0), np.where(mask_GL, old_GL, 0))
    dirty = (np.where(mask_GL, logprob_GL, rubbish), np.where(mask_GL, old_GL, rubbish))

    def loss(logprob_GL, old_GL):
        return whole_loss(logprob_GL, old_GL, reward_G, jnp.float32(-1.0), mask_GL).mean()

    value, (grad_GL, old_grad_GL) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*dirty)
    assert (np.asarray(grad_GL)[~mask_GL] == 0).all()
    assert (np.asarray(grad_GL)[mask_GL] != 0).any()
    assert (np.asarray(old_grad_GL) == 0).all()  # nor does the sampler's policy
    np.testing.assert_array_equal(value, jax.jit(loss)(*clean))


def test_a_callers_own_ratio_is_masked_too():
    # another pipeline may build its ratio itself and leave nan in its padding
    ratio_GL = jnp.array([[1.0, jnp.nan, jnp.inf]])
    mask_GL = jnp.array([[1, 0, 0]])
    grad_GL = jax.grad(lambda r: objective.clipped_surrogate(r, jnp.ones(1), mask_GL).sum())(ratio_GL)
    np.testing.assert_array_equal(grad_GL, [[-1.0, 0.0, 0.0]])
    assert objective.clip_fraction(ratio_GL, jnp.ones(1), mask_GL) == 0.0


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
def test_ratio_is_one_at_the_first_inner_step_at_any_temperature(temperature):
    """Both sides at the sampling temperature: 1 exactly. One side at temperature 1: not 1, the known trap."""
    logits_GLV = jax.random.normal(jax.random.key(0), (4, 6, 11)) * 3
    tokens_GL = jax.random.categorical(jax.random.key(1), logits_GLV / temperature)
    mask_GL = jnp.arange(6) < jnp.array([[1], [3], [6], [4]])

    @jax.jit
    def logprob(logits_GLV, temperature):
        return jnp.take_along_axis(jax.nn.log_softmax(logits_GLV / temperature), tokens_GL[..., None], -1)[..., 0]

    old_GL = logprob(logits_GLV, temperature)
    ratio_GL = objective.importance_ratio(logprob(logits_GLV, temperature), old_GL, mask_GL)
    np.testing.assert_array_equal(ratio_GL, np.ones((4, 6)))
    if temperature != 1.0:
        forgotten_GL = objective.importance_ratio(logprob(logits_GLV, 1.0), old_GL, mask_GL)
        assert np.abs(np.asarray(forgotten_GL) - 1)[np.asarray(mask_GL)].mean() > 0.1


@settings(max_examples=50, deadline=None)
@given(seed=seeds, group_size=st.integers(2, 9), shift=st.floats(-20, 20, width=32))
def test_advantages_are_invariant_to_the_baseline(seed, group_size, shift):
    """S_ema is the same for all thoughts of a position: any constant per position leaves equation (7) alone."""
    rng = np.random.default_rng(seed)
    s_pred_KG = rng.normal(size=(3, group_size)).astype(np.float32)
    s_ema_K = rng.normal(size=3).astype(np.float32)

    def advantage(s_ema_K):
        return np.asarray(objective.group_relative_advantage(objective.information_gain(s_pred_KG, s_ema_K)))

    shifts_K = np.float32(shift) * np.array([1, -1, 0.5], np.float32)
    # the bound is float32's rounding of numbers of size |shift|: a few times 20 * 2^-24
    np.testing.assert_allclose(advantage(s_ema_K + shifts_K), advantage(s_ema_K), atol=2e-5)
    np.testing.assert_allclose(advantage(s_ema_K).sum(-1), 0.0, atol=1e-5)


def test_advantages_cancel_exactly_where_rounding_does_not_enter():
    # small integers and a group of four: every intermediate is exact in float32
    reward_BG = jnp.array([[3.0, -5.0, 2.0, 4.0], [8.0, 0.0, 0.0, 0.0]])
    advantage_BG = objective.group_relative_advantage(reward_BG[:, :2])
    np.testing.assert_array_equal(objective.group_relative_advantage(reward_BG[:, :2] + 1000.0), advantage_BG)
    np.testing.assert_array_equal(advantage_BG.sum(-1), [0.0, 0.0])


def test_gradient_at_ratio_one_is_reinforce_with_length_normalisation():
    """At theta = theta_old the gradient of (8) is that of -(1/G) sum_i A_i (1/|c_i|) sum_u log pi(c_u)."""
    _, _, reward_G, mask_GL = random_case(11, group_size=5, length=4)
    tokens_GL = jax.random.randint(jax.random.key(2), (5, 4), 0, 6)
    weights = jax.random.normal(jax.random.key(3), (5, 4, 6))
    advantage_G = objective.group_relative_advantage(reward_G)

    def logprob(weights):
        return jnp.take_along_axis(jax.nn.log_softmax(weights / 0.7), tokens_GL[..., None], -1)[..., 0]

    def rlp(weights):
        ratio_GL = objective.importance_ratio(logprob(weights), logprob(weights), mask_GL)
        return objective.clipped_surrogate(ratio_GL, advantage_G, mask_GL, LOW, HIGH).mean()

    def reinforce(weights):
        loss = 0.0
        for i in range(5):
            length = int(mask_GL[i].sum())
            loss -= advantage_G[i] * logprob(weights)[i, :length].sum() / length / 5
        return loss

    grad = jax.grad(rlp)(weights)
    assert float(jnp.abs(grad).max()) > 0.01
    np.testing.assert_allclose(grad, jax.grad(reinforce)(weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.0 + HIGH + 0.01, 1.0, False),  # already more likely than the clip allows: stop
        (1.0 + HIGH - 0.01, 1.0, True),  # between eps_low and eps_high: a mixed-up pair would stop here
        (1.0 - LOW - 0.05, 1.0, True),  # too unlikely, and better than the rest: bring it back
        (1.0 - LOW - 0.05, -1.0, False),  # already less likely than the clip allows: stop. Mixed up, it would flow
        (1.0 - LOW + 0.01, -1.0, True),
        (1.0 + HIGH + 0.01, -1.0, True),  # too likely, and worse than the rest: bring it back
        (5.0, -1.0, True),
    ],
)
def test_the_clip_cuts_the_gradient_on_the_right_side_only(ratio, advantage, flows):
    advantage_G, mask_GL = jnp.array([advantage]), jnp.ones((1, 1))

    def loss(logprob_GL):
        ratio_GL = objective.importance_ratio(logprob_GL, jnp.zeros((1, 1)), mask_GL)
        return objective.clipped_surrogate(ratio_GL, advantage_G, mask_GL, clip_low=LOW, clip_high=HIGH).sum()

    grad = jax.grad(loss)(jnp.log(jnp.array([[ratio]])))
    np.testing.assert_allclose(grad, [[-ratio * advantage if flows else 0.0]], rtol=1e-5)
    cut = objective.clip_fraction(jnp.array([[ratio]]), advantage_G, mask_GL, clip_low=LOW, clip_high=HIGH)
    assert cut == (0.0 if flows else 1.0)


def test_the_advantage_carries_no_gradient():
    grad_G = jax.grad(lambda a: objective.clipped_surrogate(jnp.ones((2, 3)), a, jnp.ones((2, 3))).sum())(jnp.ones(2))
    np.testing.assert_array_equal(grad_G, [0.0, 0.0])
    grad_G = jax.grad(lambda r: objective.group_relative_advantage(r).max())(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(grad_G, [0.0, 0.0])


@settings(max_examples=50, deadline=None)
@given(seed=seeds, spread=st.floats(1e-3, 3.0))
def test_kl_estimator_is_never_negative_and_zero_at_equality(seed, spread):
    logprob_GL, reference_GL, _, mask_GL = random_case(seed, spread=spread)
    # exp(d) - d - 1 in float32 can undershoot by the rounding of exp(d) near 1
    assert (np.asarray(objective.token_kl(logprob_GL, reference_GL, mask_GL)) >= -2e-7).all()
    np.testing.assert_array_equal(objective.token_kl(logprob_GL, logprob_GL, mask_GL), np.zeros(4))


def test_kl_estimator_has_the_kl_as_its_mean():
    # p = (0.7, 0.2, 0.1), q = (0.2, 0.3, 0.5): KL = 0.7 log 3.5 + 0.2 log(2/3) + 0.1 log 0.2 = 0.634901
    p_V, q_V = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    kl_V = objective.token_kl(jnp.log(p_V)[:, None], jnp.log(q_V)[:, None], jnp.ones((3, 1)))
    np.testing.assert_allclose((p_V * kl_V).sum(), 0.634901, rtol=1e-5)


def test_kl_gradient_pulls_towards_the_reference():
    def kl(logprob):
        return objective.token_kl(jnp.reshape(logprob, (1, 1)), jnp.full((1, 1), -1.0), jnp.ones((1, 1))).sum()

    # d/dp [exp(q - p) - (q - p) - 1] = 1 - exp(q - p): at p = -2 it is 1 - e, at p = q 0, at p = -0.5 1 - exp(-0.5)
    for logprob, expected in ((-2.0, 1 - np.e), (-1.0, 0.0), (-0.5, 1 - np.exp(-0.5))):
        np.testing.assert_allclose(jax.grad(kl)(logprob), expected, rtol=1e-6)


def test_ema_fixed_point_is_exact():
    params = {"a": jax.random.normal(jax.random.key(0), (1000,)), "b": [jnp.array(1e-30), jnp.array([-3e4])]}
    for decay in (0.999, 0.9995, 0.99, 0.9, 0.1, 0.0):
        for step in (
            objective.ema_update,
            jax.jit(objective.ema_update),
            jax.jit(objective.ema_update, static_argnums=2),
        ):
            chex.assert_trees_all_equal(step(params, params, decay), params)


def test_ema_moves_by_increments_that_bfloat16_would_lose():
    ema = objective.ema_update(jnp.ones(1), jnp.full(1, 1.001), 0.999)
    assert ema[0] > 1.0
    assert jnp.bfloat16(1.0) + jnp.bfloat16(1e-3) * jnp.bfloat16(1e-3) == 1.0


def test_ema_is_refused_in_low_precision_and_stays_float32_beside_low_precision_parameters():
    low, full = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.zeros(2, jnp.float32)}
    with pytest.raises(ValueError, match="bfloat16: keep the moving average in float32"):
        objective.ema_update(low, full, 0.999)
    with pytest.raises(ValueError, match="float16"):
        jax.jit(objective.ema_update)({"w": jnp.ones(2, jnp.float16)}, full, 0.999)
    ema = objective.ema_update(full, low, 0.5)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_array_equal(ema["w"], [0.5, 0.5])


def test_ema_refuses_trees_that_do_not_match():
    with pytest.raises((AssertionError, ValueError)):
        objective.ema_update({"a": jnp.ones(2)}, {"b": jnp.ones(2)}, 0.9)
    with pytest.raises(AssertionError):  # would broadcast
        objective.ema_update({"a": jnp.ones((3, 2))}, {"a": jnp.ones(2)}, 0.9)
