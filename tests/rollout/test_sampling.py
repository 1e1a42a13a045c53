# SPDX-License-Identifier: Apache-2.0
"""The distribution of one draw, and the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlp_jax.rollout.sampling import inverse_cdf, thought_keys

pytestmark = pytest.mark.usefixtures("quick_compiles")

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


# ---------------------------------------------------------------------------------------------- one draw


def exact_logprob(logits_V):
    logits_V = np.asarray(logits_V, np.float64)
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


@pytest.mark.parametrize("V", [7, 300])
def test_draws_follow_the_distribution(V):
    rng = np.random.default_rng(V)
    logits_V = (2 * rng.normal(size=V)).astype(np.float32)
    n = 100_000
    token_n, logprob_n = jax.jit(jax.vmap(inverse_cdf, (None, 0)))(logits_V, rng.random(n).astype(np.float32))
    expected_V = n * np.exp(exact_logprob(logits_V))
    statistic = ((np.bincount(token_n, minlength=V) - expected_V) ** 2 / expected_V).sum()
    assert stats.chi2.cdf(statistic, V - 1) < 0.999
    np.testing.assert_allclose(logprob_n, jax.nn.log_softmax(logits_V)[token_n], rtol=1e-5, atol=1e-6)
    # Evenly spread numbers leave no chance: every token gets its share to within one draw at each of its two ends.
    even_n = ((np.arange(n) + 0.5) / n).astype(np.float32)
    token_n, _ = jax.jit(jax.vmap(inverse_cdf, (None, 0)))(logits_V, even_n)
    np.testing.assert_allclose(np.bincount(token_n, minlength=V), expected_V, atol=2.0)


VOCABULARIES = [1, 2, 255, 256, 257, 511, 512, 513, 1000]
draw = jax.jit(inverse_cdf)


@settings(max_examples=60, deadline=None)
@given(
    V=st.sampled_from(VOCABULARIES),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 3.0, 50.0, 1e6]),
    banned=st.sampled_from([0.0, 0.5, 0.99]),
    end=st.sampled_from([None, 0.0, 1e-30, 1e-7, 1 - 1e-6, BELOW_ONE]),
)
def test_any_vocabulary_any_logits_any_number(V, seed, scale, banned, end):
    rng = np.random.default_rng(seed)
    logits_V = (scale * rng.normal(size=V)).astype(np.float32)
    logits_V[rng.random(V) < banned] = -np.inf
    logits_V[rng.integers(V)] = scale  # one at least is left
    uniform = np.float32(rng.random() if end is None else end)
    token, logprob = draw(logits_V, uniform)
    assert token.dtype == jnp.int32 and 0 <= token < V
    exact_V = exact_logprob(logits_V)
    assert exact_V[token] > -200  # in float32 exp(-104) is 0: never a token of no probability
    np.testing.assert_allclose(logprob, exact_V[token], rtol=1e-5, atol=1e-5)
    cumulative_V = np.cumsum(np.exp(exact_V))
    if cumulative_V[token] - np.exp(exact_V[token]) - 1e-5 <= uniform <= cumulative_V[token] + 1e-5:
        return
    # The one exception: past the end of everything, or of a block of 256, rounding can leave no entry to find. Then
    # the heaviest one is taken, which is likely anyway.
    block = slice(int(token) // 256 * 256, int(token) // 256 * 256 + 256)
    assert token - block.start == logits_V[block].argmax()
    assert min(abs(uniform - cumulative_V[block][-1]), 1 - uniform) < 1e-5


def test_a_large_vocabulary_with_holes_never_yields_a_banned_token():
    """Numbers that fall on the edges of the sums, where rounding decides."""
    pick = jax.jit(jax.vmap(inverse_cdf, (None, 0)))
    for seed in (1, 17):  # two that did go wrong once
        rng = np.random.default_rng(seed)
        logits_V = (6 * rng.normal(size=20_000)).astype(np.float32)
        logits_V[rng.random(20_000) < 0.5] = -np.inf
        cumulative_V = np.cumsum(np.exp(exact_logprob(logits_V)))
        edges = np.minimum(cumulative_V[rng.integers(0, 20_000, 3_000)].astype(np.float32), BELOW_ONE)
        token, logprob = pick(logits_V, edges)
        assert np.isfinite(logits_V[token]).all() and np.isfinite(logprob).all()


def test_leading_axes_and_bfloat16_logits():
    rng = np.random.default_rng(0)
    logits, uniform = rng.normal(size=(3, 4, 300)).astype(np.float32), rng.random((3, 4)).astype(np.float32)
    half = jnp.asarray(logits, jnp.bfloat16)
    token, logprob = draw(half, uniform)
    assert logprob.dtype == jnp.float32
    for i in range(3):
        for j in range(4):
            one_token, one_logprob = draw(half[i, j], uniform[i, j])
            assert token[i, j] == one_token
            np.testing.assert_allclose(logprob[i, j], one_logprob, rtol=1e-6)
            np.testing.assert_allclose(logprob[i, j], exact_logprob(half[i, j])[token[i, j]], rtol=1e-5)


def test_keys_belong_to_document_position_and_thought():
    key = jax.random.key(5)
    keys = thought_keys(key, np.array([7, 9, 7], np.int64), jnp.array([[1, 4], [1, 4], [4, 1]]), 3)
    assert keys.shape == (3, 2, 3)
    data = np.asarray(jax.random.key_data(keys)).reshape(3, 2, 3, -1)
    np.testing.assert_array_equal(data[0, 0], data[2, 1])  # document 7 at position 1, wherever it stands
    np.testing.assert_array_equal(data[0, 1], data[2, 0])
    assert len(np.unique(data[:2].reshape(12, -1), axis=0)) == 12
    more = np.asarray(jax.random.key_data(thought_keys(key, np.array([7]), jnp.array([[1]]), 5)))
    np.testing.assert_array_equal(more[0, 0, :3], data[0, 0])  # a larger group begins with the smaller one
    other = np.asarray(jax.random.key_data(thought_keys(jax.random.key(6), np.array([7]), jnp.array([[1]]), 3)))
    assert not np.array_equal(other[0, 0], data[0, 0])
