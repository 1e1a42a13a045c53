# SPDX-License-Identifier: Apache-2.0
"""Attention of whole sequences over themselves, behind one function with three implementations of the same numbers.

What a token sees is two ranges of places in its sequence: a stretch of a prefix, and its own stretch up to itself.
Causal attention is the second alone. Together they describe documents and the thoughts branching off them, packed one
after another without padding: a thought's token sees its document up to the position where the thought starts, and its
own thought. Sliding windows shorten either range.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax.models import backend, blocked_attention, causal_attention, pallas_attention
from rlp_jax.models.causal_attention import MASKED
from rlp_jax.models.constraints import DOCUMENTS, HEADS, on_shards, spec

IMPLEMENTATIONS = ("xla", "blocked", "pallas")
UNROLLED = 2_048  # causal sequences up to this length are cut into blocks before compilation, longer ones in a loop


class Ranges(NamedTuple):
    """What each token of a sequence sees: keys in [prefix_start, prefix_end), and those from own_start up to itself.

    int32 [B, C], or [1, C] where all sequences agree; own_start is at most the token's own place.
    """

    prefix_start_BC: jax.Array
    prefix_end_BC: jax.Array
    own_start_BC: jax.Array

    def within(self, window: int, position_BC: jax.Array) -> "Ranges":
        """The part at most `window - 1` positions back; a prefix's first token stands at position 0."""
        place_C = jnp.arange(self.own_start_BC.shape[-1])
        return Ranges(
            jnp.maximum(self.prefix_start_BC, self.prefix_start_BC + position_BC - window + 1),
            self.prefix_end_BC,
            jnp.maximum(self.own_start_BC, place_C - window + 1),
        )


class Layout(NamedTuple):
    """Sequences packed with documents and branches: each token's position in its own text [B, C], and its ranges."""

    position_BC: jax.Array
    ranges: Ranges


def causal(length: int) -> Ranges:
    """Every token sees all tokens before it, and itself."""
    nothing_1C = jnp.zeros((1, length), jnp.int32)
    return Ranges(nothing_1C, nothing_1C, nothing_1C)


def self_attention(
    q_BCNE: jax.Array,
    k_BCME: jax.Array,
    v_BCME: jax.Array,
    ranges: Ranges | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale · q k) v over the keys that `ranges` lets each query see; differentiable in q, k and v.

    Query heads share key/value heads in groups (N a multiple of M). Scores and softmax are float32.

    Args:
      ranges: None: causal.
      scale: 1 / sqrt(E) unless given.
      implementation: "xla" holds the scores of all pairs; "blocked" those of one block of queries and keys at a time,
        skips blocks that no query sees, and computes the weights again in the backward pass; "pallas" does so in TPU
        kernels. Over a mesh (`models/constraints.py`) the last two run on each device's documents and heads.
        None: `default_implementation`.

    Returns:
      [B, C, N, E] in the dtype of q.

    Raises:
      ValueError: an implementation that does not exist.
    """
    B, C, N, E = q_BCNE.shape
    M = k_BCME.shape[2]
    if implementation is None:
        implementation = default_implementation(C)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    q_BMOCE = q_BCNE.reshape(B, C, M, N // M, E).transpose(0, 2, 3, 1, 4)
    q_BMOCE = q_BMOCE * jnp.asarray(E**-0.5 if scale is None else scale, q_BCNE.dtype)
    k_BMCE, v_BMCE = (x.transpose(0, 2, 1, 3) for x in (k_BCME, v_BCME))
    if implementation == "blocked" and ranges is None and C <= UNROLLED:
        ranges_BC, function = (), causal_attention.attend
    else:
        functions = {"xla": _xla, "blocked": blocked_attention.attend, "pallas": pallas_attention.attend}
        ranges_BC, function = [jnp.broadcast_to(x, (B, C)) for x in ranges or causal(C)], functions[implementation]
    if implementation != "xla":
        function = _on_shards(function, q_BMOCE.shape, len(ranges_BC))
    return function(q_BMOCE, k_BMCE, v_BMCE, *ranges_BC).transpose(0, 3, 1, 2, 4).reshape(B, C, N, E)


def _on_shards(function: Callable, q_shape: tuple[int, ...], n_ranges: int) -> Callable:
    """Each device attends for its own documents and key heads, or, where those do not divide, for its share of each
    key head's queries. The compiler finds none of it by itself: it does not look into kernels, and gathers what a loop
    over documents runs through."""
    of_query = spec(q_shape, DOCUMENTS, HEADS)
    of_key = of_query
    if of_query[1] is None:
        of_query, of_key = spec(q_shape, DOCUMENTS, None, HEADS), spec(q_shape, DOCUMENTS)
    in_specs = (of_query, of_key, of_key, *[spec(q_shape, DOCUMENTS)] * n_ranges)
    return on_shards(function, in_specs, of_query)


def default_implementation(length: int) -> str:
    """What this machine computes sequences of a length with: short ones by "xla", in one block."""
    if length <= blocked_attention.BLOCK:
        return "xla"
    return "pallas" if backend.platform() == "tpu" else "blocked"


def visible(ranges: Ranges, place_C: jax.Array) -> jax.Array:
    """[B, C, C] bool: whether the query (second axis) at `place_C` sees each key."""
    start, end, own = (x[..., None] for x in ranges)
    key_C = jnp.arange(ranges.own_start_BC.shape[-1])
    return ((key_C >= start) & (key_C < end)) | ((key_C >= own) & (key_C <= place_C[:, None]))


def _xla(q_BMOCE, k_BMCE, v_BMCE, *ranges):
    seen_BCC = visible(Ranges(*ranges), jnp.arange(k_BMCE.shape[2]))
    score = jnp.einsum("bmoqe,bmke->bmoqk", q_BMOCE, k_BMCE, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(jnp.where(seen_BCC[:, None, None], score, MASKED), axis=-1).astype(q_BMOCE.dtype)
    out = jnp.einsum("bmoqk,bmke->bmoqe", weight, v_BMCE, preferred_element_type=jnp.float32)
    return out.astype(q_BMOCE.dtype)
