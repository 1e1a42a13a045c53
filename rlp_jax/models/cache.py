"""The cache: a document's keys and values, and the branches forked from it.

`prefill → fork → continue` is the whole interface. A fork copies nothing: R branches read the one prefix, each up to
its own position, so K positions with G thoughts each cost one pass over the document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of all layers.

    Attributes:
      prefix_k, prefix_v: [Y, B, M, T, E], the document.
      prefix_length_BR: int32, how many of the document's tokens branch r sees; None before `fork`.
      branch_k, branch_v: [Y, B, M, R, C, E], room for C tokens a branch; None for a fork without room (capacity 0).
      written: int32 scalar, tokens that every branch has had so far.
    """

    prefix_k: jax.Array
    prefix_v: jax.Array
    prefix_length_BR: jax.Array | None = None
    branch_k: jax.Array | None = None
    branch_v: jax.Array | None = None
    written: jax.Array | None = None


def fork(cache: Cache, prefix_length_BR: jax.Array, capacity: int = 0) -> Cache:
    """Opens R branches a document; branch r continues after the document's first `prefix_length_BR[b, r]` tokens.

    Args:
      cache: from a prefill.
      prefix_length_BR: [B, R] int32, 0 to T.
      capacity: tokens a branch can hold for later calls. 0 for one call over whole branches, as in the learner.
    """
    Y, B, M, _, E = cache.prefix_k.shape
    shape = (Y, B, M, prefix_length_BR.shape[1], capacity, E)
    room = jnp.zeros(shape, cache.prefix_k.dtype) if capacity else None
    return cache._replace(
        prefix_length_BR=prefix_length_BR, branch_k=room, branch_v=room, written=jnp.zeros((), jnp.int32)
    )


def append(cache: Cache, k_YBMRSE: jax.Array, v_YBMRSE: jax.Array) -> Cache:
    """Writes S new tokens of every branch. Past the capacity the write would wrap: the caller sizes the fork."""
    if cache.branch_k is None:
        return cache
    start = (0, 0, 0, 0, cache.written, 0)
    return cache._replace(
        branch_k=jax.lax.dynamic_update_slice(cache.branch_k, k_YBMRSE, start),
        branch_v=jax.lax.dynamic_update_slice(cache.branch_v, v_YBMRSE, start),
        written=cache.written + k_YBMRSE.shape[4],
    )
