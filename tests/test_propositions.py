# SPDX-License-Identifier: Apache-2.0
"""The paper's three propositions, exactly, on a world small enough to enumerate.

Three symbols; thoughts of one or two symbols that end by a stop symbol or at the cap; random tables for the truth
p*(x_t | x_<t), the thought policy pi(c | x_<t), the predictor p_theta(x_t | x_<t, c) and the no-think baseline
p_ema(x_t | x_<t). Expectations are sums over every prefix, thought and next token, in float64.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax import objective

V = 3  # symbols
STOP = V  # ends a thought; never in a document
SEQUENCE = 3  # tokens of a document

THOUGHTS = [c for n in (1, 2) for c in itertools.product(range(V), repeat=n)]  # 3 + 9 thoughts, |c| >= 1
PREFIXES = [x for n in range(SEQUENCE) for x in itertools.product(range(V), repeat=n)]  # 1 + 3 + 9 prefixes


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class World:
    """Random tables. P prefixes, C thoughts, V symbols."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.truth_PV = softmax(2 * rng.normal(size=(len(PREFIXES), V)))
        self.ema_PV = softmax(2 * rng.normal(size=(len(PREFIXES), V)))
        self.think_PCV = softmax(2 * rng.normal(size=(len(PREFIXES), len(THOUGHTS), V)))
        self.policy_PC = np.array([self.thought_probabilities(rng) for _ in PREFIXES])

    @staticmethod
    def thought_probabilities(rng):
        """pi(c) as the product of its tokens' probabilities, the stop symbol included where it was sampled."""
        first_V = softmax(rng.normal(size=V))  # |c| >= 1: the first symbol cannot be the stop
        second_VV = softmax(rng.normal(size=(V, V + 1)))
        return [first_V[c[0]] * (second_VV[c[0], STOP] if len(c) == 1 else second_VV[c[0], c[1]]) for c in THOUGHTS]

    def reward_PVC(self):
        """r(c) for every prefix, next token and thought, by the objective's own functions (H = 1)."""
        s_pred_PVC = objective.sequence_logprob(jnp.log(self.think_PCV).transpose(0, 2, 1)[..., None])
        s_ema_PV = objective.sequence_logprob(jnp.log(self.ema_PV)[..., None])
        reward_PVC = objective.information_gain(s_pred_PVC, s_ema_PV)
        assert reward_PVC.dtype == jnp.float64
        return np.asarray(reward_PVC)


def cross_entropy(p_V, q_V):
    return -(p_V * np.log(q_V)).sum(-1)


@pytest.fixture(params=range(5))
def world(request):
    return World(request.param)


def test_the_world_is_a_distribution(world):
    np.testing.assert_allclose(world.policy_PC.sum(-1), 1.0, rtol=1e-14)
    assert len(THOUGHTS) == 12 and len(PREFIXES) == 13


def test_proposition_1_expected_reward_is_the_cross_entropy_reduction(world):
    """For every prefix and thought: E_{x_t ~ p*}[r] = CE(p*, p_ema) - CE(p*, p_theta(. | c))."""
    expected_PC = np.einsum("pv,pvc->pc", world.truth_PV, world.reward_PVC())
    reduction_PC = cross_entropy(world.truth_PV, world.ema_PV)[:, None] - cross_entropy(
        world.truth_PV[:, None], world.think_PCV
    )
    np.testing.assert_allclose(expected_PC, reduction_PC, rtol=1e-12, atol=1e-12)
    assert (reduction_PC > 0).any() and (reduction_PC < 0).any()


def test_proposition_2_the_reward_is_a_lower_bound_on_the_marginal_prediction(world):
    """E_c[log p_theta(x_t | x_<t, c)] <= log E_c[p_theta(x_t | x_<t, c)], strictly where the thought matters."""
    reward_PVC = world.reward_PVC()
    s_pred_PV = np.einsum("pc,pvc->pv", world.policy_PC, reward_PVC) + np.log(world.ema_PV)
    marginal_PV = np.einsum("pc,pcv->pv", world.policy_PC, world.think_PCV)
    assert (s_pred_PV < np.log(marginal_PV) - 1e-3).all()


def test_proposition_2_equality_when_the_prediction_ignores_the_thought(world):
    world.think_PCV = np.repeat(world.think_PCV[:, :1], len(THOUGHTS), axis=1)
    reward_PVC = world.reward_PVC()
    s_pred_PV = np.einsum("pc,pvc->pv", world.policy_PC, reward_PVC) + np.log(world.ema_PV)
    marginal_PV = np.einsum("pc,pcv->pv", world.policy_PC, world.think_PCV)
    np.testing.assert_allclose(s_pred_PV, np.log(marginal_PV), rtol=1e-12)
    # and such thoughts have nothing to tell apart: every advantage is zero
    advantage_PVC = objective.group_relative_advantage(jnp.asarray(reward_PVC))
    np.testing.assert_allclose(advantage_PVC, 0.0, atol=1e-13)


def test_proposition_3_mean_reward_over_positions_is_the_sequence_improvement(world):
    """E over documents x ~ p* of the mean over t of E_c[r_t] = (CE_ema(sequence) - E_c CE_theta(sequence)) / T.

    The left side enumerates whole documents and adds up rewards; the right side adds up cross-entropies per prefix,
    weighted by how often p* visits it.
    """
    reward_PVC = world.reward_PVC()
    index = {prefix: i for i, prefix in enumerate(PREFIXES)}

    left = 0.0
    for document in itertools.product(range(V), repeat=SEQUENCE):
        prefixes = [index[document[:t]] for t in range(SEQUENCE)]
        probability = np.prod([world.truth_PV[p, document[t]] for t, p in enumerate(prefixes)])
        rewards_T = [world.policy_PC[p] @ reward_PVC[p, document[t]] for t, p in enumerate(prefixes)]
        left += probability * np.mean(rewards_T)

    visits_P = np.ones(len(PREFIXES))
    for prefix, i in index.items():
        for t, token in enumerate(prefix):
            visits_P[i] *= world.truth_PV[index[prefix[:t]], token]
    np.testing.assert_allclose(visits_P.sum(), SEQUENCE, rtol=1e-14)
    ema_P = cross_entropy(world.truth_PV, world.ema_PV)
    think_P = (world.policy_PC * cross_entropy(world.truth_PV[:, None], world.think_PCV)).sum(-1)
    right = (visits_P * (ema_P - think_P)).sum() / SEQUENCE
    np.testing.assert_allclose(left, right, rtol=1e-12)


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_group_estimate_is_the_policy_gradient(world, group_size):
    """What G/(G-1) is for: over every group of G thoughts, the gradient of (8) is without bias.

    E over groups of sum_i A_i grad log pi(c_i) / G = grad E_c[r], for thoughts of one length (with ragged ones, 1/|c|
    weighs each thought's share).
    """
    prefix, token = 5, 1
    reward_C = world.reward_PVC()[prefix, token, :V]  # the three thoughts of one symbol
    weights_V = jnp.asarray(np.random.default_rng(9).normal(size=V))
    groups_NG = np.array(list(itertools.product(range(V), repeat=group_size)))

    def expected_loss(weights_V):
        logprob_NGL = jax.nn.log_softmax(weights_V)[groups_NG][..., None]
        mask_NGL = jnp.ones_like(logprob_NGL)
        probability_N = jax.lax.stop_gradient(jnp.exp(logprob_NGL.sum((1, 2))))
        advantage_NG = objective.group_relative_advantage(jnp.asarray(reward_C)[groups_NG])
        ratio_NGL = objective.importance_ratio(logprob_NGL, logprob_NGL, mask_NGL)
        loss_N = objective.clipped_surrogate(ratio_NGL, advantage_NG, mask_NGL).mean(-1)
        return (probability_N * loss_N).sum()

    gradient_V = jax.grad(expected_loss)(weights_V)
    exact_V = jax.grad(lambda w: -(jax.nn.softmax(w) * reward_C).sum())(weights_V)
    np.testing.assert_allclose(gradient_V, exact_V, rtol=1e-10, atol=1e-12)
