# SPDX-License-Identifier: Apache-2.0
"""Attention over segments against one float64 softmax over all keys joined, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.models.attention import Segment, attend

B, R, S, M, E, T, C = 2, 3, 4, 2, 6, 5, 3


def inputs(heads_per_key, seed=0, scale=1.0):
    """Queries, then keys and values of a document, of the branches' past, and of the new tokens."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    q = normal(B, R, S, M * heads_per_key, E)
    shared, past, new = ([normal(*shape) for _ in "kv"] for shape in [(B, M, T, E), (B, M, R, C, E), (B, M, R, S, E)])
    return q, (shared, past, new)


# Prefixes of every length, 0 and T included; two of three past tokens written.
PREFIX_BR = np.array([[0, 2, 5], [5, 0, 1]])
MASKS = (
    (np.arange(T) < PREFIX_BR[..., None])[:, :, None],
    np.arange(C) < 2,
    np.tril(np.ones((S, S), bool)),
)


def segments_of(keys_values):
    return [
        Segment(jnp.asarray(k), jnp.asarray(v), jnp.asarray(m)) for (k, v), m in zip(keys_values, MASKS, strict=True)
    ]


def joined(q, keys_values, xp=np):
    """One softmax over the keys of all segments laid side by side, each branch with its own copy."""
    repeated = [
        [xp.broadcast_to(x[:, :, None], (B, M, R, T, E)) if x.ndim == 4 else x for x in pair] for pair in keys_values
    ]
    k, v = (xp.concatenate([pair[i] for pair in repeated], 3) for i in (0, 1))
    mask = xp.concatenate([xp.broadcast_to(m, (B, R, S, n)) for m, n in zip(MASKS, (T, C, S), strict=True)], -1)
    out = []
    for head in range(q.shape[3]):
        key_head = head // (q.shape[3] // M)
        score = xp.einsum("brse,brke->brsk", q[:, :, :, head], k[:, key_head]) / np.sqrt(E)
        score = xp.where(mask, score, -np.inf)
        weight = xp.exp(score - score.max(-1, keepdims=True))
        out.append(xp.einsum("brsk,brke->brse", weight / weight.sum(-1, keepdims=True), v[:, key_head]))
    return xp.stack(out, 3)


@pytest.mark.parametrize("heads_per_key", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # 30: scores of some thousands, where a softmax can overflow
def test_segments_are_one_softmax(heads_per_key, scale):
    q, keys_values = inputs(heads_per_key, scale=scale)
    exact = joined(q.astype(np.float64), [[x.astype(np.float64) for x in pair] for pair in keys_values])
    out = attend(jnp.asarray(q), segments_of(keys_values))
    assert out.shape == q.shape and out.dtype == jnp.float32
    # A score of size s carries a rounding error of about s * 6e-8, and so does the weight.
    np.testing.assert_allclose(out, exact, rtol=2e-5 * scale, atol=2e-6 * scale**2)


def test_one_segment_alone():
    q, (_, _, new) = inputs(3)
    alone = attend(jnp.asarray(q), [Segment(*map(jnp.asarray, new), jnp.asarray(MASKS[2]))])
    empty = np.zeros((B, R, 1, T), bool)
    k, v = (np.zeros((B, M, T, E), np.float32),) * 2
    # ... is what it is beside a segment of which nothing may be seen, whatever that holds
    beside = attend(
        jnp.asarray(q),
        [Segment(k + 1e4, v + 1e4, jnp.asarray(empty)), Segment(*map(jnp.asarray, new), jnp.asarray(MASKS[2]))],
    )
    np.testing.assert_allclose(beside, alone, rtol=1e-6, atol=1e-7)
    # The first token of a branch sees itself only: its output is its own value.
    first_BRNE = np.repeat(np.moveaxis(new[1][:, :, :, 0], 1, 2), 3, 2)
    np.testing.assert_allclose(alone[:, :, 0], first_BRNE, rtol=1e-6)


@pytest.mark.parametrize("heads_per_key", [1, 3])
def test_gradients_against_joined_keys(heads_per_key):
    q, keys_values = inputs(heads_per_key)
    weight = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)

    def through(attention):
        return jax.jit(jax.grad(lambda q, kv: (attention(q, kv) * weight).sum(), (0, 1)))(jnp.asarray(q), keys_values)

    got = through(lambda q, kv: attend(q, segments_of(kv)))
    wanted = through(lambda q, kv: joined(q, kv, jnp))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Unwritten room gets none at all.
    assert not np.asarray(got[1][1][0])[:, :, :, 2:].any() and not np.asarray(got[1][1][1])[:, :, :, 2:].any()


def test_what_is_masked_has_no_effect():
    q, keys_values = inputs(3)
    before = attend(jnp.asarray(q), segments_of(keys_values))
    (_, _), (past_k, past_v), _ = keys_values
    past_k[:, :, :, 2] = 1e6
    past_v[:, :, :, 2] = -1e6
    np.testing.assert_array_equal(attend(jnp.asarray(q), segments_of(keys_values)), before)


def test_bfloat16_is_the_same_within_its_rounding():
    q, keys_values = inputs(3)
    exact = joined(q.astype(np.float64), [[x.astype(np.float64) for x in pair] for pair in keys_values])
    half = [[jnp.asarray(x, jnp.bfloat16) for x in pair] for pair in keys_values]
    out = attend(jnp.asarray(q, jnp.bfloat16), segments_of(half))
    assert out.dtype == jnp.bfloat16
    # Scores of size up to 4 from inputs of 8 bits: weights are off by up to about 4 * 2^-8, values by another 2^-8.
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=6 * 2**-8)
