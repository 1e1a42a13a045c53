# SPDX-License-Identifier: Apache-2.0
"""Attention of branch queries over what they may see: their document's prefix, their own past, their new tokens.

One softmax runs over all three without joining the keys in memory, so a document's keys are read by all its branches
and copied by none. The same function serves prefill (one branch, nothing before it), decoding and the learner.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a segment with every key masked gives weight 0 and no nan


class Segment(NamedTuple):
    """Keys and values that queries attend to.

    `k`, `v` are [B, M, T, E] (one copy for all branches of a document) or [B, M, R, C, E] (each branch its own);
    `mask` broadcasts to [B, R, S, keys], True where the query may look.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array


def attend(q_BRSNE: jax.Array, segments: list[Segment], scale: float | None = None) -> jax.Array:
    """softmax(scale · q k) v with one softmax over the keys of all segments; scale is 1 / sqrt(E) unless given.

    Query heads share key/value heads in groups (N a multiple of M). Scores and softmax are float32.

    Returns:
      [B, R, S, N, E] in the dtype of q.
    """
    B, R, S, N, E = q_BRSNE.shape
    M = segments[0].k.shape[1]
    # Rows of one (document, key head) side by side: a shared segment is then one matrix product for all branches.
    q_BMRQE = q_BRSNE.reshape(B, R, S, M, N // M, E).transpose(0, 3, 1, 2, 4, 5).reshape(B, M, R, S * (N // M), E)
    q_BMRQE = q_BMRQE * jnp.asarray(E**-0.5 if scale is None else scale, q_BRSNE.dtype)
    scores = [_scores(q_BMRQE, segment, N // M) for segment in segments]
    top_BMRQ1 = jnp.max(jnp.stack([score.max(-1) for score in scores]), 0)[..., None]
    top_BMRQ1 = jax.lax.stop_gradient(top_BMRQ1)  # cancels in the quotient
    total_BMRQ1, out_BMRQE = 0.0, 0.0
    for score, segment in zip(scores, segments, strict=True):
        weight = jnp.exp(score - top_BMRQ1)
        total_BMRQ1 += weight.sum(-1, keepdims=True)
        out_BMRQE += _weighted_values(weight.astype(q_BRSNE.dtype), segment)
    out_BMRQE = (out_BMRQE / total_BMRQ1).astype(q_BRSNE.dtype)
    return out_BMRQE.reshape(B, M, R, S, N // M, E).transpose(0, 2, 3, 1, 4, 5).reshape(B, R, S, N, E)


def _scores(q_BMRQE: jax.Array, segment: Segment, heads_per_key: int) -> jax.Array:
    B, M, R, Q, E = q_BMRQE.shape
    if segment.k.ndim == 4:
        q = q_BMRQE.reshape(B, M, R * Q, E)
        score = jnp.einsum("bmqe,bmte->bmqt", q, segment.k, preferred_element_type=jnp.float32)
        score = score.reshape(B, M, R, Q, -1)
    else:
        score = jnp.einsum("bmrqe,bmrce->bmrqc", q_BMRQE, segment.k, preferred_element_type=jnp.float32)
    mask_BRST = jnp.broadcast_to(segment.mask, (B, R, Q // heads_per_key, score.shape[-1]))
    return jnp.where(jnp.repeat(mask_BRST, heads_per_key, 2)[:, None], score, _MASKED)


def _weighted_values(weight_BMRQT: jax.Array, segment: Segment) -> jax.Array:
    if segment.v.ndim == 4:
        B, M, R, Q, T = weight_BMRQT.shape
        weight = weight_BMRQT.reshape(B, M, R * Q, T)
        out = jnp.einsum("bmqt,bmte->bmqe", weight, segment.v, preferred_element_type=jnp.float32)
        return out.reshape(B, M, R, Q, -1)
    return jnp.einsum("bmrqc,bmrce->bmrqe", weight_BMRQT, segment.v, preferred_element_type=jnp.float32)
