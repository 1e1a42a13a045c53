# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities in chunks: against float64 numpy, the plain log-softmax, and what the compiler allots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.models.vocabulary import CHUNK_BYTES, chunk_tokens, token_logprobs


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(vocab_size, *shape):
    return np.random.default_rng(9).integers(0, vocab_size, shape).astype(np.int32)


def project(kernel_DV, hidden_D):
    return hidden_D @ kernel_DV


def plain(kernel_DV, hidden_D, token, temperature=1.0):
    """What the chunks replace: every token's log-softmax, in memory at once."""
    logprob_V = jax.nn.log_softmax(hidden_D @ kernel_DV / temperature)
    return jnp.take_along_axis(logprob_V, token[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 14, 15, 100])  # a whole, several with and without a remainder
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_against_float64(chunk, temperature):
    hidden_BSD, kernel_DV, token_BS = normal(0, 3, 5, 8) * 2, normal(1, 8, 50), tokens(50, 3, 5)
    unembed = functools.partial(project, kernel_DV)
    scores = jax.jit(lambda h, t: token_logprobs(unembed, h, t, temperature, chunk=chunk))(hidden_BSD, token_BS)

    logits_BSV = np.asarray(unembed(hidden_BSD), np.float64) / temperature
    total_BS1 = np.log(np.exp(logits_BSV).sum(-1, keepdims=True))
    logprob_BSV = logits_BSV - total_BS1
    picked_BS = np.take_along_axis(logprob_BSV, token_BS[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.logprob, picked_BS, rtol=1e-6, atol=1e-6)
    entropy_BS = -(np.exp(logprob_BSV) * logprob_BSV).sum(-1)
    np.testing.assert_allclose(scores.entropy, entropy_BS, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores.correct, logits_BSV.argmax(-1) == token_BS)


def test_correct_is_argmax_also_among_equals():
    logits = jnp.array([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0], [0.0, -jnp.inf, -1.0]])
    for token in range(3):
        scores = token_logprobs(lambda x: x, logits, jnp.full(3, token))
        np.testing.assert_array_equal(scores.correct, logits.argmax(-1) == token)


def test_large_logits_keep_their_digits():
    logits = jnp.array([[1e4, 1e4 - 1, -1e4]])
    scores = token_logprobs(lambda x: x, logits, jnp.array([1]))
    np.testing.assert_allclose(scores.logprob, -1 - np.log1p(np.exp(-1.0)), rtol=1e-6)
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(scores.entropy, -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-6)


@pytest.mark.parametrize("chunk", [None, 4, 15])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_is_that_of_the_plain_log_softmax(chunk, temperature):
    hidden_BSD, kernel_DV, token_BS = normal(0, 3, 5, 8), normal(1, 8, 50), tokens(50, 3, 5)
    weight_BS = normal(2, 3, 5)

    def chunked(kernel_DV, hidden_BSD):
        scores = token_logprobs(functools.partial(project, kernel_DV), hidden_BSD, token_BS, temperature, chunk=chunk)
        return (weight_BS * scores.logprob + scores.entropy).sum()  # the entropy has no gradient

    def reference(kernel_DV, hidden_BSD):
        return (weight_BS * plain(kernel_DV, hidden_BSD, token_BS, temperature)).sum()

    got = jax.jit(jax.grad(chunked, (0, 1)))(kernel_DV, hidden_BSD)
    for mine, exact in zip(got, jax.grad(reference, (0, 1))(kernel_DV, hidden_BSD), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 4, 8, 9])
def test_only_the_first_places(count):
    """As many turns of the loop as `count` needs, here chunks of 3 of 9: the same numbers, and zeros beyond them."""
    hidden_BSD, kernel_DV, token_BS, weight_BS = normal(0, 2, 9, 8), normal(1, 8, 50), tokens(50, 2, 9), normal(2, 2, 9)

    def loss(kernel_DV, hidden_BSD, count, computed):
        unembed = functools.partial(project, kernel_DV)
        scores = token_logprobs(unembed, hidden_BSD, token_BS, 0.7, chunk=3, count=count)
        return (weight_BS * scores.logprob * (np.arange(9) < computed)).sum(), scores

    computed = -(-count // 3) * 3
    first, every = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(kernel_DV, hidden_BSD, n, computed)
        for n in (count, None)
    )
    (value, scores), grads = first
    (reference, all_scores), exact = every
    np.testing.assert_allclose(value, reference, rtol=1e-6)
    for mine, theirs in zip(scores, all_scores, strict=True):
        np.testing.assert_allclose(mine[:, :computed], theirs[:, :computed], rtol=1e-6)
        assert not mine[:, computed:].any()
    for mine, theirs in zip(grads, exact, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_filter_forbids_tokens_before_the_softmax(chunk):
    hidden_SD, kernel_DV = normal(0, 5, 8), normal(1, 8, 50)

    def top_three(logits_V, token):
        least = jax.lax.top_k(logits_V, 3)[0][..., -1:]
        return jnp.where((logits_V >= least) | (jnp.arange(50) == token), logits_V, -jnp.inf)

    logits_SV = np.asarray(hidden_SD @ kernel_DV, np.float64) / 0.7
    rank_SV = np.argsort(-logits_SV, -1)
    token_S = np.where(np.arange(5) < 3, rank_SV[:, 1], rank_SV[:, 20]).astype(np.int32)

    def score(hidden_SD):
        unembed = functools.partial(project, kernel_DV)
        return token_logprobs(unembed, hidden_SD, token_S, 0.7, top_three, chunk)

    scores = score(hidden_SD)
    for s in range(5):
        kept = np.union1d(rank_SV[s, :3], token_S[s])
        p_V = np.exp(logits_SV[s, kept]) / np.exp(logits_SV[s, kept]).sum()
        np.testing.assert_allclose(scores.logprob[s], np.log(p_V[kept == token_S[s]])[0], rtol=1e-5)
        np.testing.assert_allclose(scores.entropy[s], -(p_V * np.log(p_V)).sum(), rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda h: score(h).logprob.sum())(hidden_SD)).all()


def test_chunks_are_even_and_within_their_bytes():
    assert chunk_tokens(151_936) * 151_936 * 4 <= CHUNK_BYTES < (chunk_tokens(151_936) + 1) * 151_936 * 4
    assert chunk_tokens(CHUNK_BYTES) == 1
    held = []
    token_logprobs(
        lambda x: held.append(x.shape[0]) or x @ np.ones((4, 6), np.float32), normal(0, 11, 4), tokens(6, 11), chunk=8
    )
    assert held[-1] == 6  # two chunks of 6 and 5, not of 8 and 3
    loops = [
        str(jax.make_jaxpr(lambda h, n=n: token_logprobs(lambda x: x, h, tokens(6, n), chunk=8))(normal(0, n, 6)))
        for n in (8, 9)
    ]
    assert "scan" not in loops[0] and "scan" in loops[1]


@pytest.mark.parametrize("counted", [False, True])
def test_no_array_of_all_logits(counted):
    """The gradient's program at Qwen's vocabulary: less room beside its inputs and outputs than one such array."""
    n, V, D = 2_048, 151_936, 4
    token_n = jax.ShapeDtypeStruct((n,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((D, V), (n, D))]

    def chunked(kernel_DV, hidden_nD, token_n):
        count = token_n[0] if counted else None
        unembed = functools.partial(project, kernel_DV)
        return token_logprobs(unembed, hidden_nD, token_n, count=count).logprob.sum()

    def room(loss):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays, token_n).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole = n * V * 4
    assert room(lambda *args: plain(*args).sum()) >= whole
    assert room(chunked) < min(whole, 4 * CHUNK_BYTES)
