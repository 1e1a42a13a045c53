# SPDX-License-Identifier: Apache-2.0
"""The cache: a document's keys and values, and the branches forked from it.

`prefill → fork → continue` is the whole interface. A fork copies no key: R branches read the one prefix, each up to
its own position, so K positions with G thoughts each cost one pass over the document. A recurrent layer has no keys
to mask, so a hybrid's prefill keeps its state at K stops, and every branch starts from one of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.models.mamba2 import MambaState


class Cache(NamedTuple):
    """Keys and values of all layers, stacked on the leading axis Y, or a tuple of Y arrays from an unrolled model.

    A hybrid's are dicts of such arrays, one entry a layer of a repeated unit, Y its repeats.

    Attributes:
      prefix_k, prefix_v: [Y, B, M, T, E], the document.
      prefix_length_BR: int32, how many of the document's tokens branch r sees; None before `fork`.
      branch_k, branch_v: [Y, B, M, R, C, E], room for C tokens a branch; None for a fork without room (capacity 0).
        A ring: token number w of the loop lies in column w mod C, the same for all branches.
      written: int32 scalar, the number of the next token.
      start_BR: int32, the number of branch r's own first token: what came before it in the ring was another's.
      end_BR: int32, the number after branch r's last own token, once its turn is over: None while all branches go on
        together. Branches that have ended take one more call each over whole continuations, which is not written.
      stop_BK: int32, hybrids only: the prefix lengths that branches may start from.
      states: Mamba states: after a prefill, and in a fork without room, [Y, B, K, ...] at the stops; in a fork with
        room each branch's own [Y, B, R, ...].
      index_BR: int32, in a hybrid's fork without room: the stop that branch r starts from, -1 for none.
    """

    prefix_k: jax.Array
    prefix_v: jax.Array
    prefix_length_BR: jax.Array | None = None
    branch_k: jax.Array | None = None
    branch_v: jax.Array | None = None
    written: jax.Array | None = None
    start_BR: jax.Array | None = None
    stop_BK: jax.Array | None = None
    states: Any = None
    index_BR: jax.Array | None = None
    end_BR: jax.Array | None = None


def fork(cache: Cache, prefix_length_BR: jax.Array, capacity: int = 0) -> Cache:
    """Opens R branches a document; branch r continues after the document's first `prefix_length_BR[b, r]` tokens.

    Args:
      cache: from a prefill.
      prefix_length_BR: [B, R] int32, 0 to T.
      capacity: tokens a branch can hold for later calls. 0 for one call over whole branches, as in the learner.

    Raises:
      ValueError: a hybrid's branch that starts at no stop of the prefill, where the values are known. Where they are
        traced, such a branch computes NaN.
    """
    states, index_BR = cache.states, None
    if states is not None:
        assert cache.stop_BK is not None  # whoever keeps states keeps their stops
        index_BR = _find_stops(cache.stop_BK, prefix_length_BR)
        if capacity:
            states, index_BR = gather_states(states, index_BR), None
    room = None
    if capacity:
        shape = (prefix_length_BR.shape[1], capacity)
        room = jax.tree.map(lambda k: jnp.zeros((*k.shape[:-2], *shape, k.shape[-1]), k.dtype), cache.prefix_k)
    return cache._replace(
        prefix_length_BR=prefix_length_BR, branch_k=room, branch_v=room, written=jnp.zeros((), jnp.int32),
        start_BR=jnp.zeros(prefix_length_BR.shape, jnp.int32), states=states, index_BR=index_BR,
    )  # fmt: skip


def _find_stops(stop_BK: jax.Array, prefix_length_BR: jax.Array) -> jax.Array:
    """For each branch the first stop of its document with its prefix length, -1 for none."""
    if not any(isinstance(x, jax.core.Tracer) for x in (stop_BK, prefix_length_BR)):
        stops, lengths = np.asarray(stop_BK), np.asarray(prefix_length_BR)
        for b, r in zip(*np.nonzero(~(lengths[..., None] == stops[:, None]).any(-1)), strict=True):
            raise ValueError(
                f"branch {r} of document {b} starts after {lengths[b, r]} tokens, but the prefill kept the recurrent "
                f"states at {stops[b].tolist()} only: pass stops_BK with every prefix length to the prefill"
            )
    same_BRK = jnp.asarray(prefix_length_BR)[..., None] == stop_BK[:, None]
    return jnp.where(same_BRK.any(-1), same_BRK.argmax(-1), -1)


def gather_states(states: Any, index_BR: jax.Array) -> Any:
    """States at stops, leaves [..., B, K, *own], as each branch's, [..., B, R, *own]; NaN for a branch without one."""

    def gather(x, own_axes):
        where = index_BR.reshape(*(1,) * (x.ndim - own_axes - 2), *index_BR.shape, *(1,) * own_axes)
        return jnp.where(where >= 0, jnp.take_along_axis(x, jnp.maximum(where, 0), -own_axes - 1), jnp.nan)

    def of_layer(state: MambaState) -> MambaState:
        ssm, conv = (jax.tree.map(lambda x, n=n: gather(x, n), part) for part, n in zip(state, (3, 2), strict=True))
        return MambaState(ssm, conv)

    return jax.tree.map(of_layer, states, is_leaf=lambda x: isinstance(x, MambaState))


def append(cache: Cache, size: int, k: Any, v: Any, states: Any, in_place: bool) -> Cache:
    """The cache after S = `size` new tokens of every branch, which must not run over the ring's end.

    `k`, `v` are the new keys and values [Y, B, M, R, S, E], or the rings with them where the layers wrote `in_place`;
    `states` the branches' new Mamba states, a hybrid's only. A fork without room stays as it is, and so do branches
    that have ended.
    """
    if cache.branch_k is None or cache.end_BR is not None:
        return cache
    assert cache.written is not None  # counted since the fork
    if not in_place:
        at = cache.written % capacity(cache)
        k = jax.tree.map(lambda ring, new: write(ring, new, at), cache.branch_k, k)
        v = jax.tree.map(lambda ring, new: write(ring, new, at), cache.branch_v, v)
    return cache._replace(branch_k=k, branch_v=v, written=cache.written + size, states=states)


def write(ring_CE: jax.Array, new_SE: jax.Array, at: jax.Array | int) -> jax.Array:
    """A ring [..., C, E] with columns `at` and following replaced by new ones [..., S, E]."""
    return jax.lax.dynamic_update_slice(ring_CE, new_SE, (0,) * (ring_CE.ndim - 2) + (at, 0))


def capacity(cache: Cache) -> int:
    """C; 1 where no layer attends, so that numbers can still be taken modulo it."""
    rings = jax.tree.leaves(cache.branch_k)
    return rings[0].shape[-2] if rings else 1


def own_tokens(cache: Cache) -> jax.Array:
    """How many tokens each branch has read since the fork, [B, R]."""
    end = cache.written if cache.end_BR is None else cache.end_BR
    assert end is not None and cache.start_BR is not None, "the cache was not forked"
    return end - cache.start_BR


def token_numbers(columns: int, written: jax.Array) -> jax.Array:
    """The number of the token in each of C columns of a ring that has had `written` tokens; negative where none is."""
    last = written - 1
    return last - (last - jnp.arange(columns)) % columns


def unstack_cache(cache: Cache) -> Cache:
    """A prefix [Y, ...] as a tuple of layers, for an unrolled model."""
    prefix_k, prefix_v, states = jax.tree.map(tuple, (cache.prefix_k, cache.prefix_v, cache.states))
    return cache._replace(prefix_k=prefix_k, prefix_v=prefix_v, states=states)
