# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention a block of queries at a time, for CPU: the keys of a block are a slice known beforehand.

Half of the pairs are never computed, a document's scores stay in the cache, and nothing of size [queries, keys] is kept
for the backward pass, which computes the weights again from their normaliser (FlashAttention, arXiv 2205.14135). Blocks
are unrolled, so this is for moderate lengths; `blocked_attention` takes the rest.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
MASKED = -1e30  # finite, so that a query that sees nothing of a block gives weight 0 and no nan
KEPT = "attention"  # what a remat policy keeps, so that the backward pass does not run the forward pass again


@jax.custom_vjp
def attend(q_BMOCE, k_BMCE, v_BMCE):
    """`self_attention` of scaled queries, O query heads a key head: [B, M, O, C, E]."""
    return _save(q_BMOCE, k_BMCE, v_BMCE)[0]


def _save(q_BMOCE, k_BMCE, v_BMCE):
    result = jax.lax.map(lambda document: _forward(*document), (q_BMOCE, k_BMCE, v_BMCE))
    out_BMOCE, normaliser_BMOC1 = checkpoint_name(result, KEPT)
    return out_BMOCE, (q_BMOCE, k_BMCE, v_BMCE, out_BMOCE, normaliser_BMOC1)


def _load(residuals, d_out_BMOCE):
    return jax.lax.map(lambda document: _backward(*document), (*residuals, d_out_BMOCE))


attend.defvjp(_save, _load)


def _forward(q_MOCE, k_MCE, v_MCE):
    """One document's output, and the logarithm of what its weights are divided by [M, O, C, 1]."""
    outs, normalisers = [], []
    for start, end in _blocks(q_MOCE):
        q_MQE = _rows(q_MOCE, start, end)
        parts = [(_causal_scores(q_MQE, k_MCE[:, start:end], end - start), v_MCE[:, start:end])]
        if start:
            parts.append((product("mqe,mke->mqk", q_MQE, k_MCE[:, :start]), v_MCE[:, :start]))
        top_MQ1 = parts[0][0].max(-1, keepdims=True)
        for score_MQk, _ in parts[1:]:
            top_MQ1 = jnp.maximum(top_MQ1, score_MQk.max(-1, keepdims=True))
        total_MQ1, out_MQE = 0.0, 0.0
        for score_MQk, v_MkE in parts:
            weight_MQk = jnp.exp(score_MQk - top_MQ1)
            total_MQ1 += weight_MQk.sum(-1, keepdims=True)
            out_MQE += product("mqk,mke->mqe", weight_MQk.astype(v_MkE.dtype), v_MkE)
        outs.append(_heads((out_MQE / total_MQ1).astype(q_MOCE.dtype), q_MOCE.shape))
        normalisers.append(_heads(top_MQ1 + jnp.log(total_MQ1), q_MOCE.shape))
    return jnp.concatenate(outs, 2), jnp.concatenate(normalisers, 2)


def _backward(q_MOCE, k_MCE, v_MCE, out_MOCE, normaliser_MOC1, d_out_MOCE):
    dot_MOC1 = (d_out_MOCE.astype(jnp.float32) * out_MOCE.astype(jnp.float32)).sum(-1, keepdims=True)
    dk_MCE, dv_MCE = jnp.zeros(k_MCE.shape), jnp.zeros(v_MCE.shape)
    dqs = []
    for start, end in _blocks(q_MOCE):
        q_MQE, d_out_MQE, normaliser_MQ1, dot_MQ1 = (
            _rows(x, start, end) for x in (q_MOCE, d_out_MOCE, normaliser_MOC1, dot_MOC1)
        )
        k_MkE, v_MkE = k_MCE[:, :end], v_MCE[:, :end]
        weight_MQk = jnp.exp(_causal_scores(q_MQE, k_MkE, end - start) - normaliser_MQ1)
        d_score_MQk = weight_MQk * (product("mqe,mke->mqk", d_out_MQE, v_MkE) - dot_MQ1)
        d_score_MQk, weight_MQk = d_score_MQk.astype(q_MQE.dtype), weight_MQk.astype(q_MQE.dtype)
        dqs.append(_heads(product("mqk,mke->mqe", d_score_MQk, k_MkE), q_MOCE.shape))
        dk_MCE = dk_MCE.at[:, :end].add(product("mqk,mqe->mke", d_score_MQk, q_MQE))
        dv_MCE = dv_MCE.at[:, :end].add(product("mqk,mqe->mke", weight_MQk, d_out_MQE))
    return jnp.concatenate(dqs, 2).astype(q_MOCE.dtype), dk_MCE.astype(k_MCE.dtype), dv_MCE.astype(v_MCE.dtype)


def _blocks(q_MOCE) -> list[tuple[int, int]]:
    C = q_MOCE.shape[2]
    return [(start, min(start + BLOCK, C)) for start in range(0, C, BLOCK)]


def _rows(x_MOCE, start: int, end: int):
    """A block's rows, the heads of a key head side by side: [M, O·block, E]."""
    return x_MOCE[:, :, start:end].reshape(x_MOCE.shape[0], -1, x_MOCE.shape[-1])


def _heads(x_MQE, shape):
    return x_MQE.reshape(*shape[:2], -1, x_MQE.shape[-1])


def _causal_scores(q_MQE, k_MkE, queries: int):
    """Scores of the last `queries` of the keys' own tokens, masked beyond themselves."""
    score_MQk = product("mqe,mke->mqk", q_MQE, k_MkE)
    keys = k_MkE.shape[1]
    place_Q = jnp.tile(keys - queries + jnp.arange(queries), q_MQE.shape[1] // queries)
    return jnp.where(jnp.arange(keys) <= place_Q[:, None], score_MQk, MASKED)


def product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
