"""The cache: a document's keys and values, and the branches forked from it.

`prefill → fork → continue` is the whole interface. A fork copies nothing: R branches read the one prefix, each up to
its own position, so K positions with G thoughts each cost one pass over the document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of all layers, stacked on the leading axis Y, or a tuple of Y arrays from an unrolled model.

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
    room = None
    if capacity:
        shape = (prefix_length_BR.shape[1], capacity)
        room = jax.tree.map(lambda k: jnp.zeros((*k.shape[:-2], *shape, k.shape[-1]), k.dtype), cache.prefix_k)
    return cache._replace(
        prefix_length_BR=prefix_length_BR, branch_k=room, branch_v=room, written=jnp.zeros((), jnp.int32)
    )


def append(cache: Cache, k_YBMRSE: jax.Array, v_YBMRSE: jax.Array) -> Cache:
    """Writes S new tokens of every branch. Past the capacity the write would wrap: the caller sizes the fork."""
    if cache.branch_k is None:
        return cache

    def write(room_CE, new_SE):
        start = (0,) * (room_CE.ndim - 2) + (cache.written, 0)
        return jax.lax.dynamic_update_slice(room_CE, new_SE, start)

    return cache._replace(
        branch_k=jax.tree.map(write, cache.branch_k, k_YBMRSE),
        branch_v=jax.tree.map(write, cache.branch_v, v_YBMRSE),
        written=cache.written + jax.tree.leaves(k_YBMRSE)[0].shape[-2],
    )


def unstack_cache(cache: Cache) -> Cache:
    """A prefix [Y, ...] as a tuple of layers, for an unrolled model."""
    return cache._replace(prefix_k=tuple(cache.prefix_k), prefix_v=tuple(cache.prefix_v))
