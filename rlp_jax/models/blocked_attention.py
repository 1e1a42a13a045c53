# SPDX-License-Identifier: Apache-2.0
"""Self-attention a block of queries and keys at a time (FlashAttention, arXiv 2205.14135) in plain XLA loops.

Blocks of keys that no query of a block sees are never visited: which those are is found from the ranges while the
program runs, so documents and thoughts packed in any way cost what they need. Nothing of size [queries, keys] is kept
for the backward pass, which computes the weights again. Made for CPU, where a block's scores stay in the cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlp_jax.models.causal_attention import BLOCK, KEPT, MASKED, product
from rlp_jax.models.layers import pad_axis


class Visits(NamedTuple):
    """For each of n blocks of queries, the blocks of keys it visits: the first `count` of `order`, ascending."""

    count_Bn: jax.Array
    order_Bnn: jax.Array


def visited_blocks(prefix_start_BC, prefix_end_BC, own_start_BC, query_block: int, key_block: int) -> jax.Array:
    """[B, query blocks, key blocks] bool: whether a query of the block may see a key of the other.

    May: the hull of a block's prefix ranges counts, which is exact where its queries belong to one document.
    """
    B, C = own_start_BC.shape
    start, end, own = (
        x.reshape(B, C // query_block, query_block) for x in (prefix_start_BC, prefix_end_BC, own_start_BC)
    )
    any_prefix = end > start
    first = jnp.where(any_prefix, start, C).min(-1)[..., None]
    last = jnp.where(any_prefix, end - 1, -1).max(-1)[..., None]
    key_start = jnp.arange(0, C, key_block)
    key_last = key_start + key_block - 1
    of_prefix = (key_last >= first) & (key_start <= last)
    query_last = jnp.arange(query_block - 1, C, query_block)[:, None]
    of_own = (key_last >= own.min(-1)[..., None]) & (key_start <= query_last)
    return of_prefix | of_own


def attend(q_BMOCE, k_BMCE, v_BMCE, prefix_start_BC, prefix_end_BC, own_start_BC):
    """`self_attention` of scaled queries, O query heads a key head: [B, M, O, C, E]."""
    C = k_BMCE.shape[2]
    block = block_size(C)
    pad = -C % block
    q_BMOCE, k_BMCE, v_BMCE = (pad_axis(x, pad, -2) for x in (q_BMOCE, k_BMCE, v_BMCE))
    ranges = [pad_axis(x, pad, -1) for x in (prefix_start_BC, prefix_end_BC)]
    own_start_BC = jnp.concatenate(
        [own_start_BC, jnp.broadcast_to(jnp.arange(C, C + pad), (len(own_start_BC), pad))], -1
    )
    return _attend(block, q_BMOCE, k_BMCE, v_BMCE, (*ranges, own_start_BC))[..., :C, :]


def block_size(length: int) -> int:
    """At most BLOCK, a multiple of 8, so that few places are padding."""
    blocks = -(-length // BLOCK)
    return -(-length // (8 * blocks)) * 8


def _forward(block, q_BMOCE, k_BMCE, v_BMCE, ranges):
    B, M, O, C, E = q_BMOCE.shape
    visits = _visits(ranges, block)

    def one_block(at):
        b, i = at
        q_MQE = _rows(q_BMOCE, b, i, block)
        limits = _limits(ranges, b, i, block, O)

        def visit(carry):
            n, top_MQ1, total_MQ1, out_MQE = carry
            j = visits.order_Bnn[b, i, n]
            k_MkE, v_MkE = _keys(k_BMCE, b, j, block), _keys(v_BMCE, b, j, block)
            score_MQk = _masked_scores(q_MQE, k_MkE, limits, j, block)
            new_top_MQ1 = jnp.maximum(top_MQ1, score_MQk.max(-1, keepdims=True))
            weight_MQk, fade_MQ1 = jnp.exp(score_MQk - new_top_MQ1), jnp.exp(top_MQ1 - new_top_MQ1)
            out_MQE = out_MQE * fade_MQ1 + product("mqk,mke->mqe", weight_MQk.astype(v_MkE.dtype), v_MkE)
            return n + 1, new_top_MQ1, total_MQ1 * fade_MQ1 + weight_MQk.sum(-1, keepdims=True), out_MQE

        rows_MQ1 = jnp.zeros((M, O * block, 1))
        start = (0, rows_MQ1 + MASKED, rows_MQ1, jnp.zeros((M, O * block, E)))
        _, top_MQ1, total_MQ1, out_MQE = jax.lax.while_loop(
            lambda carry: carry[0] < visits.count_Bn[b, i], visit, start
        )
        return (out_MQE / total_MQ1).astype(q_BMOCE.dtype), top_MQ1 + jnp.log(total_MQ1)

    at = jnp.meshgrid(jnp.arange(B), jnp.arange(C // block), indexing="ij")
    out, normaliser = jax.lax.map(one_block, tuple(x.reshape(-1) for x in at))

    def together(x):  # [B·n, M, O·block, ...] to [B, M, O, C, ...]
        x = x.reshape(B, C // block, M, O, block, -1)
        return x.transpose(0, 2, 3, 1, 4, 5).reshape(B, M, O, C, -1)

    return together(out), together(normaliser)


def _backward(block, residuals, d_out_BMOCE):
    q_BMOCE, k_BMCE, v_BMCE, ranges, out_BMOCE, normaliser_BMOC1 = residuals
    B, M, O, C, E = q_BMOCE.shape
    visits = _visits(ranges, block)
    dot_BMOC1 = (d_out_BMOCE.astype(jnp.float32) * out_BMOCE.astype(jnp.float32)).sum(-1, keepdims=True)

    def one_block(carry, at):
        b, i = at
        q_MQE, d_out_MQE = _rows(q_BMOCE, b, i, block), _rows(d_out_BMOCE, b, i, block)
        normaliser_MQ1, dot_MQ1 = _rows(normaliser_BMOC1, b, i, block), _rows(dot_BMOC1, b, i, block)
        limits = _limits(ranges, b, i, block, O)

        def visit(carry):
            n, dq_MQE, dk_BMCE, dv_BMCE = carry
            j = visits.order_Bnn[b, i, n]
            k_MkE, v_MkE = _keys(k_BMCE, b, j, block), _keys(v_BMCE, b, j, block)
            weight_MQk = jnp.exp(_masked_scores(q_MQE, k_MkE, limits, j, block) - normaliser_MQ1)
            d_weight_MQk = product("mqe,mke->mqk", d_out_MQE, v_MkE)
            d_score_MQk = (weight_MQk * (d_weight_MQk - dot_MQ1)).astype(q_MQE.dtype)
            dq_MQE += product("mqk,mke->mqe", d_score_MQk, k_MkE)
            dk_BMCE = _add(dk_BMCE, product("mqk,mqe->mke", d_score_MQk, q_MQE), b, j, block)
            d_v_MkE = product("mqk,mqe->mke", weight_MQk.astype(v_MkE.dtype), d_out_MQE)
            return n + 1, dq_MQE, dk_BMCE, _add(dv_BMCE, d_v_MkE, b, j, block)

        start = (0, jnp.zeros((M, O * block, E)), *carry)
        _, dq_MQE, *carry = jax.lax.while_loop(lambda carry: carry[0] < visits.count_Bn[b, i], visit, start)
        return tuple(carry), dq_MQE

    at = jnp.meshgrid(jnp.arange(B), jnp.arange(C // block), indexing="ij")
    nothing = jnp.zeros(k_BMCE.shape)
    (dk, dv), dq = jax.lax.scan(one_block, (nothing, nothing), tuple(x.reshape(-1) for x in at))
    dq = dq.reshape(B, C // block, M, O, block, E).transpose(0, 2, 3, 1, 4, 5).reshape(q_BMOCE.shape)
    return dq.astype(q_BMOCE.dtype), dk.astype(k_BMCE.dtype), dv.astype(v_BMCE.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q_BMOCE, k_BMCE, v_BMCE, ranges):
    return _forward(block, q_BMOCE, k_BMCE, v_BMCE, ranges)[0]


def _save(block, q_BMOCE, k_BMCE, v_BMCE, ranges):
    out_BMOCE, normaliser_BMOC1 = checkpoint_name(_forward(block, q_BMOCE, k_BMCE, v_BMCE, ranges), KEPT)
    return out_BMOCE, (q_BMOCE, k_BMCE, v_BMCE, ranges, out_BMOCE, normaliser_BMOC1)


_attend.defvjp(_save, _backward)


def _visits(ranges, block):
    visited_Bnn = visited_blocks(*ranges, block, block)
    return Visits(visited_Bnn.sum(-1), jnp.argsort(~visited_Bnn, axis=-1, stable=True))


def _rows(x_BMOCE, b, i, block):
    """Block i of sequence b, the heads of a key head side by side: [M, O·block, E]."""
    _, M, O, _, E = x_BMOCE.shape
    x = jax.lax.dynamic_slice(x_BMOCE, (b, 0, 0, i * block, 0), (1, M, O, block, E))
    return x.reshape(M, O * block, E)


def _keys(x_BMCE, b, j, block):
    _, M, _, E = x_BMCE.shape
    return jax.lax.dynamic_slice(x_BMCE, (b, 0, j * block, 0), (1, M, block, E))[0]


def _add(x_BMCE, new_MkE, b, j, block):
    at = (b, 0, j * block, 0)
    return jax.lax.dynamic_update_slice(x_BMCE, (_keys(x_BMCE, b, j, block) + new_MkE)[None], at)


def _limits(ranges, b, i, block, heads):
    """prefix_start, prefix_end, own_start and place of block i's queries, once a head: [O·block, 1]."""
    own = [jax.lax.dynamic_slice(x, (b, i * block), (1, block))[0] for x in ranges]
    return tuple(jnp.tile(x, heads)[:, None] for x in (*own, i * block + jnp.arange(block)))


def _masked_scores(q_MQE, k_MkE, limits, j, block):
    start, end, own, place = limits
    key_k = j * block + jnp.arange(block)
    seen_Qk = ((key_k >= start) & (key_k < end)) | ((key_k >= own) & (key_k <= place))
    return jnp.where(seen_Qk, product("mqe,mke->mqk", q_MQE, k_MkE), MASKED)
