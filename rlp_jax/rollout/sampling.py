# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens: what a thought is, its key, and a categorical sample from one uniform number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_CHUNK = 256  # vocabulary entries summed together in the first level of `inverse_cdf`


class Rollout(NamedTuple):
    """Sampled thoughts of R branches a document.

    Attributes:
      thought_BRL: int32, 0 after the end. A closing tag that the model sampled is part of the thought.
      length_BR: int32, sampled tokens, at least 1.
      stopped_BR: bool, True where the thought ended with the closing tag, False where it hit the cap.
      logprob_BRL: float32, log pi(token) at the sampling temperature, 0 after the end.
      target_logprob_BRH, target_correct_BRH: log p(true token | prefix, thought) at temperature 1, and whether it is
        the most likely one; None unless the rollout was given the true tokens.
    """

    thought_BRL: jax.Array
    length_BR: jax.Array
    stopped_BR: jax.Array
    logprob_BRL: jax.Array
    target_logprob_BRH: jax.Array | None = None
    target_correct_BRH: jax.Array | None = None


def thought_keys(key: jax.Array, document_B: jax.Array, position_BK: jax.Array, group_size: int) -> jax.Array:
    """One key for each (document, position, g) [B, K, G]: the same thought whatever else is in the batch."""

    def one_document(document, position_K):
        document_key = jax.random.fold_in(key, document)
        position_keys = jax.vmap(lambda position: jax.random.fold_in(document_key, position))(position_K)
        return jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(group_size)))(position_keys)

    return jax.vmap(one_document)(jnp.asarray(document_B).astype(jnp.uint32), position_BK)


def inverse_cdf(logits_V: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A categorical sample and its log-probability from ONE uniform number in [0, 1).

    Two levels of cumulative sums find the entry. The Gumbel trick would draw V random numbers a token, which on CPU
    costs more than a small model's forward pass.

    Args:
      logits_V: [..., V].
      uniform: [...].

    Returns:
      token [...] int32 and its log-probability [...] float32.
    """
    V = logits_V.shape[-1]
    logits_V = logits_V.astype(jnp.float32)
    top = logits_V.max(-1, keepdims=True)
    weight_V = jnp.exp(logits_V - top)
    n_chunks = -(-V // _CHUNK)
    weight_NC = jnp.pad(weight_V, [(0, 0)] * (weight_V.ndim - 1) + [(0, n_chunks * _CHUNK - V)])
    weight_NC = weight_NC.reshape(*weight_V.shape[:-1], n_chunks, _CHUNK)
    chunk_N = weight_NC.sum(-1)
    total = chunk_N.sum(-1)
    target = (uniform * total)[..., None]
    chunk, below = _find(chunk_N, target)
    weight_C = jnp.take_along_axis(weight_NC, chunk[..., None, None], -2)[..., 0, :]
    inner, _ = _find(weight_C, target - below)
    token = (chunk * _CHUNK + inner).astype(jnp.int32)
    picked = jnp.take_along_axis(logits_V, token[..., None], -1)[..., 0]
    return token, picked - top[..., 0] - jnp.log(total)


def _find(weight_C: jax.Array, target_1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of positive weight whose cumulative weight exceeds the target, and the weight before it [..., 1]."""
    cumulative_C = jnp.cumsum(weight_C, -1)
    # Rounding makes the sums not quite monotone and can put the target just outside of them, so ask for a weight too:
    # a token of probability 0 must never be drawn. Past the very end, take the heaviest entry.
    found_C = (cumulative_C > target_1) & (weight_C > 0)
    index = jnp.where(found_C.any(-1), found_C.argmax(-1), weight_C.argmax(-1))
    before = jnp.take_along_axis(cumulative_C - weight_C, index[..., None], -1)
    return index, before
