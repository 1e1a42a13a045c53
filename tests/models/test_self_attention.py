# SPDX-License-Identifier: Apache-2.0
"""Whole sequences: every implementation against a float64 loop and against each other, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layouts import attention, random_ranges

from rlp_jax.models import blocked_attention
from rlp_jax.models.self_attention import Ranges, causal, self_attention

pytestmark = pytest.mark.usefixtures("quick_compiles")
M, E = 2, 8


def inputs(B, C, heads_per_key=3, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = (B, C, M * heads_per_key, E), (B, C, M, E), (B, C, M, E)
    return [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes]


def layouts(B, C, seed, **kwargs):
    rng = np.random.default_rng(seed)
    return Ranges(*(jnp.asarray(x) for x in zip(*(random_ranges(rng, C, **kwargs) for _ in range(B)), strict=True)))


def value_and_gradients(qkv, ranges, implementation):
    direction = jnp.asarray(np.random.default_rng(9).normal(size=qkv[0].shape), jnp.float32)

    def loss(qkv):
        out = self_attention(*qkv, ranges, implementation=implementation)
        return (out * direction).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return out, *grads


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
@pytest.mark.parametrize("plain", [True, False])
def test_against_a_loop_in_float64(implementation, plain, monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", 16)
    qkv = inputs(2, 53)
    ranges = None if plain else layouts(2, 53, 0, sizes=(1, 20))
    out = self_attention(*qkv, ranges, implementation=implementation)
    for b in range(2):
        one = [np.broadcast_to(x, (2, 53))[b] for x in ranges or causal(53)]
        np.testing.assert_allclose(out[b], attention(*(x[b] for x in qkv), one), rtol=1e-5, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(st.integers(129, 300), st.integers(0, 1_000), st.sampled_from([1, 3]))
def test_blocks_skip_what_no_query_sees_and_nothing_else(C, seed, heads_per_key):
    qkv, ranges = inputs(2, C, heads_per_key, seed), layouts(2, C, seed)
    for ours, plain in zip(
        value_and_gradients(qkv, ranges, "blocked"), value_and_gradients(qkv, ranges, "xla"), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("C", [129, 300])
def test_causal_blocks_in_both_forms(C, monkeypatch):
    """Unrolled for moderate lengths, in a loop for long ones: the same numbers, gradients included."""
    qkv = inputs(2, C)
    plain = value_and_gradients(qkv, None, "xla")
    for ours in (value_and_gradients(qkv, None, "blocked"), value_and_gradients(qkv, causal(C), "blocked")):
        for one, other in zip(ours, plain, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_large_scores_and_keys_that_nobody_sees():
    """Scores of hundreds do not overflow, and NaN in a block that no query sees does not spread."""
    C, block = 384, blocked_attention.BLOCK
    q, k, v = inputs(1, C, scale=12.0)
    alone = Ranges(*(jnp.zeros((1, C), jnp.int32),) * 2, jnp.where(jnp.arange(C) < 2 * block, 0, 2 * block)[None])
    assert np.isfinite(self_attention(q, k, v, alone, implementation="blocked")).all()
    hidden = jnp.arange(C)[None, :, None, None] < 2 * block
    k, v = (jnp.where(hidden, jnp.nan, x) for x in (k, v))
    out = self_attention(q, k, v, alone, implementation="blocked")
    assert np.isfinite(out[:, 2 * block :]).all() and np.isnan(out[:, : 2 * block]).all()


def test_visits_are_those_of_the_pairs():
    """The map of blocks holds every visible pair, and for one document a block nothing more."""
    C, block = 96, 8
    ranges = layouts(3, C, 4, sizes=(8, 30))
    visited = np.asarray(blocked_attention.visited_blocks(*ranges, block, block))
    for b in range(3):
        start, end, own = (np.asarray(x[b]) for x in ranges)
        key, query = np.arange(C), np.arange(C)[:, None]
        seen = ((key >= start[:, None]) & (key < end[:, None])) | ((key >= own[:, None]) & (key <= query))
        needed = seen.reshape(C // block, block, C // block, block).any((1, 3))
        assert not (needed & ~visited[b]).any()
        assert visited[b].sum() <= 1.5 * needed.sum()


def test_windows_of_packed_sequences():
    """`within` counts positions across prefix and branch."""
    C, window = 60, 7
    start, end, own = random_ranges(np.random.default_rng(2), C, sizes=(4, 15))
    position = end - start + np.arange(C) - own
    ranges = Ranges(*(jnp.asarray(x)[None] for x in (start, end, own)))
    near = [np.asarray(x[0]) for x in ranges.within(window, jnp.asarray(position)[None])]
    for p in range(C):
        of_prefix = {c for c in range(start[p], end[p]) if position[p] - (c - start[p]) < window}
        of_own = {c for c in range(own[p], p + 1) if p - c < window}
        assert set(range(near[0][p], near[1][p])) == of_prefix
        assert set(range(near[2][p], p + 1)) == of_own


def test_bfloat16_and_an_unknown_implementation():
    qkv = inputs(1, 200)
    half = [x.astype(jnp.bfloat16) for x in qkv]
    exact = self_attention(*(x.astype(jnp.float32) for x in half), implementation="xla")
    for ranges in (None, causal(200)):
        out = self_attention(*half, ranges, implementation="blocked")
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="implementation 'fast': choose from xla, blocked, pallas"):
        self_attention(*qkv, implementation="fast")
