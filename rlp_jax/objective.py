# SPDX-License-Identifier: Apache-2.0
"""RLP in one file: arrays in, arrays out.

"RLP: Reinforcement as a Pretraining Objective", arXiv 2510.01265; equation numbers are the paper's. Every function is
pure, works under jit, vmap and grad, and needs nothing but jax and chex, so any pipeline can import it.

Shapes are written for one position with G thoughts of up to L tokens; leading axes (documents, positions) are free:
`...G` and `...GL` below. Log-probabilities are in nats. Masks are 1 on thought tokens, 0 on everything else. What
comes in below float32 is computed in float32.
"""

import chex
import jax
import jax.numpy as jnp


def sequence_logprob(logprob_H: chex.Array, mask_H: chex.Array | None = None) -> jax.Array:
    """Mean log-probability of the scored tokens: S in equations (3) and (4), averaged over a horizon of H tokens.

    The paper scores one token (H = 1), where this is that token's log-probability. For longer horizons the mean keeps
    the reward in nats a token.

    Args:
      logprob_H: [..., H] log-probabilities of the true tokens.
      mask_H: [..., H], 1 on tokens to count; None counts all. Where it counts nothing the result is 0.

    Returns:
      [...].
    """
    logprob_H = _at_least_float32(logprob_H)
    if mask_H is None:
        return logprob_H.mean(-1)
    return _masked_mean(logprob_H, mask_H)


def information_gain(s_pred_G: chex.Array, s_ema: chex.Array) -> jax.Array:
    """Equations (3) to (5): r(c) = log p_theta(x_t | x_<t, c) - log p_ema(x_t | x_<t), a constant for the gradient.

    Args:
      s_pred_G: [..., G] log-probability of the true token after each thought.
      s_ema: [...] log-probability of the same token under the no-think baseline.

    Returns:
      [..., G] rewards in nats, no gradient.
    """
    chex.assert_equal_shape([s_pred_G[..., 0], s_ema])
    return jax.lax.stop_gradient(_at_least_float32(s_pred_G) - _at_least_float32(s_ema)[..., None])


def group_relative_advantage(reward_G: chex.Array, counted_G: chex.Array | None = None) -> jax.Array:
    """Equation (7): A_i = G/(G-1) (r_i - mean_j r_j), which is r_i minus the mean of the others. No division by a
    standard deviation.

    Args:
      reward_G: [..., G] rewards, G >= 2.
      counted_G: [..., G] bool, thoughts whose rewards count, the formula's G; others get 0. None: all, the paper's.

    Returns:
      [..., G] advantages, no gradient.

    Raises:
      ValueError: G < 2.
    """
    group_size = reward_G.shape[-1]
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a group-relative advantage needs at least 2 thoughts")
    reward_G = _at_least_float32(reward_G)
    if counted_G is not None:
        counted_1 = counted_G.sum(-1, keepdims=True)
        return jax.lax.stop_gradient(_centred(reward_G, counted_G) * (counted_1 / jnp.maximum(counted_1 - 1, 1)))
    centred_G = reward_G - reward_G.mean(-1, keepdims=True)
    return jax.lax.stop_gradient(centred_G * (group_size / (group_size - 1)))


def group_normalised_advantage(reward_G: chex.Array, counted_G: chex.Array | None = None) -> jax.Array:
    """A_i = (r_i - mean_j r_j) / std_j r_j: GRPO's, which RPT and RLVR use and RLP does not (DeepSeekMath, arXiv
    2402.03300, section 4.1.2). The standard deviation is that of the G rewards (divided by G, not G-1).

    A group of equal rewards gives exactly 0: what rounding leaves of its centre must not be divided by as much.

    Args:
      reward_G: [..., G] rewards.
      counted_G: [..., G] bool, the thoughts whose rewards count; others get 0. None: all.

    Returns:
      [..., G] advantages, no gradient.
    """
    reward_G = _at_least_float32(reward_G)
    counted_G = jnp.ones(reward_G.shape, bool) if counted_G is None else counted_G
    centred_G = _centred(reward_G, counted_G)
    largest_1 = jnp.abs(centred_G).max(-1, keepdims=True)
    differ_1 = rewards_differ(reward_G, counted_G)[..., None] & (largest_1 > 0)
    scaled_G = centred_G / jnp.where(differ_1, largest_1, 1.0)  # the square of a small number may be nought
    deviation_1 = jnp.sqrt(_masked_mean(scaled_G**2, counted_G))[..., None]
    return jax.lax.stop_gradient(jnp.where(differ_1, scaled_G / jnp.where(differ_1, deviation_1, 1.0), 0.0))


def rewards_differ(reward_G: chex.Array, counted_G: chex.Array) -> jax.Array:
    """Whether a group teaches anything: its counted rewards are not all equal (DAPO, arXiv 2503.14476, section 3.2).
    [..., G] -> [...] bool."""
    highest = jnp.where(counted_G, reward_G, -jnp.inf).max(-1)
    return highest > jnp.where(counted_G, reward_G, jnp.inf).min(-1)


def importance_ratio(logprob_GL: chex.Array, old_logprob_GL: chex.Array, mask_GL: chex.Array) -> jax.Array:
    """rho = exp(log pi_theta - log pi_old) on thought tokens, 1 elsewhere (section 3 of the paper).

    Both log-probabilities must be taken at the sampling temperature, or the ratio is not 1 at the first update.
    """
    chex.assert_equal_shape([logprob_GL, old_logprob_GL, mask_GL])
    logprob_GL, old_logprob_GL = _at_least_float32(logprob_GL), _at_least_float32(old_logprob_GL)
    # The where inside exp keeps whatever stands in masked places (even nan) out of the value and the gradient.
    log_ratio_GL = jnp.where(mask_GL > 0, logprob_GL - jax.lax.stop_gradient(old_logprob_GL), 0.0)
    return jnp.exp(log_ratio_GL)


def truncated_importance_weight(
    old_logprob_GL: chex.Array, sampler_logprob_GL: chex.Array, mask_GL: chex.Array, cap: float
) -> jax.Array:
    """min(pi_old / pi_sampler, cap) on thought tokens, 1 elsewhere, a constant for the gradient.

    For thoughts drawn by another program than the trainer's forward (bfloat16 against float32, say), whose tokens are
    then not quite those of pi_old. Not in the paper; truncated importance weights as in IMPALA (Espeholt et al., arXiv
    1802.01561), where the cap bounds the variance.
    """
    return jax.lax.stop_gradient(jnp.minimum(importance_ratio(old_logprob_GL, sampler_logprob_GL, mask_GL), cap))


def clipped_surrogate(
    ratio_GL: chex.Array,
    advantage_G: chex.Array,
    mask_GL: chex.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weight_GL: chex.Array | None = None,
) -> jax.Array:
    """Equation (8) for each thought: -(1/|c|) sum_u min(rho_u A, clip(rho_u, 1 - clip_low, 1 + clip_high) A).

    Args:
      ratio_GL: [..., G, L] importance ratios.
      advantage_G: [..., G].
      mask_GL: [..., G, L], 1 on thought tokens; |c| is its sum.
      weight_GL: [..., G, L], multiplies a token's term (`truncated_importance_weight`); None: 1, the paper's.

    Returns:
      [..., G] losses; the paper's loss is their mean over thoughts, positions and documents. A thought without tokens
      gives 0.
    """
    chex.assert_equal_shape([ratio_GL, mask_GL])
    chex.assert_equal_shape([ratio_GL[..., 0], advantage_G])
    advantage_G1 = jax.lax.stop_gradient(advantage_G)[..., None]
    clipped_GL = jnp.clip(ratio_GL, 1.0 - clip_low, 1.0 + clip_high)
    surrogate_GL = jnp.minimum(ratio_GL * advantage_G1, clipped_GL * advantage_G1)
    if weight_GL is not None:
        surrogate_GL = surrogate_GL * weight_GL
    return -length_normalised_sum(surrogate_GL, mask_GL)


def length_normalised_sum(value_GL: chex.Array, mask_GL: chex.Array) -> jax.Array:
    """(1/|c|) sum over thought tokens, the normalisation of equation (8). [..., G, L] -> [..., G]."""
    return _masked_mean(value_GL, mask_GL)


def clip_fraction(
    ratio_GL: chex.Array, advantage_G: chex.Array, mask_GL: chex.Array, clip_low: float = 0.2, clip_high: float = 0.2
) -> jax.Array:
    """Share of thought tokens whose gradient the clip of equation (8) removes. Returns a scalar."""
    advantage_G1 = advantage_G[..., None]
    too_high_GL = (ratio_GL > 1.0 + clip_high) & (advantage_G1 > 0)
    too_low_GL = (ratio_GL < 1.0 - clip_low) & (advantage_G1 < 0)
    clipped_GL = (too_high_GL | too_low_GL) & (mask_GL > 0)
    return clipped_GL.sum() / jnp.maximum((mask_GL > 0).sum(), 1)


def token_kl(logprob_GL: chex.Array, reference_logprob_GL: chex.Array, mask_GL: chex.Array) -> jax.Array:
    """Token-level KL(pi_theta || pi_ref) from sampled tokens, the estimator exp(d) - d - 1 with d = log pi_ref - log
    pi_theta: never negative, zero where the two agree (Schulman, "Approximating KL divergence"; used by GRPO).

    Returns:
      [..., G], averaged over the tokens of each thought like equation (8).
    """
    chex.assert_equal_shape([logprob_GL, reference_logprob_GL, mask_GL])
    logprob_GL, reference_logprob_GL = _at_least_float32(logprob_GL), _at_least_float32(reference_logprob_GL)
    d_GL = jnp.where(mask_GL > 0, jax.lax.stop_gradient(reference_logprob_GL) - logprob_GL, 0.0)
    return length_normalised_sum(jnp.expm1(d_GL) - d_GL, mask_GL)  # expm1: exact near d = 0


def ema_update(ema_params: chex.ArrayTree, params: chex.ArrayTree, decay: float | chex.Array) -> chex.ArrayTree:
    """phi <- decay phi + (1 - decay) theta, after every optimizer step, in float32.

    Start from phi = theta. In bfloat16 a decay of 0.999 would lose its increments, so phi has to be float32.

    Raises:
      ValueError: a leaf of ema_params is a float of less than 32 bits.
      AssertionError: the trees differ in structure or shapes.
    """

    def update(ema, param):
        if jnp.finfo(ema.dtype).bits < 32:
            raise ValueError(f"ema_params hold {ema.dtype}: keep the moving average in float32")
        # The difference form returns phi exactly when theta equals phi.
        return ema + (1.0 - decay) * (param.astype(ema.dtype) - ema)

    chex.assert_trees_all_equal_shapes(ema_params, params)
    return jax.tree.map(update, ema_params, params)


def _centred(reward_G: chex.Array, counted_G: chex.Array) -> jax.Array:
    """Rewards less the mean of those that count; 0 elsewhere."""
    return jnp.where(counted_G, reward_G - _masked_mean(reward_G, counted_G)[..., None], 0.0)


def _masked_mean(value_L: chex.Array, mask_L: chex.Array) -> jax.Array:
    """Mean over places where the mask is 1; 0 where there is none. What stands elsewhere (even nan) has no effect."""
    counted_L = mask_L > 0
    return jnp.where(counted_L, value_L, 0.0).sum(-1) / jnp.maximum(counted_L.sum(-1), 1)


def _at_least_float32(x: chex.Array) -> jax.Array:
    """Differences of log-probabilities lose their meaning in bfloat16; float64 stays what it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
