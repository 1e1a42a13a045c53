"""Sampling: the distribution of one draw, the loop against a naive one that reads everything again for each token, and
that the trainer's forward agrees with what the sampler says of its own tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FAMILIES, RICH, apply, rough_params, tiny
from scipy import stats

from rlp_jax.rollout import scoring
from rlp_jax.rollout.sampling import inverse_cdf, sample_thoughts, thought_keys

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


# ---------------------------------------------------------------------------------------------- the loop

DOCUMENTS = np.array([[11, 30, 12, 8, 9, 40], [21, 13, 44, 17, 25, 9], [11, 31, 14, 46, 8, 0]], np.int32)
POSITIONS = np.array([[0, 6], [3, 1], [5, 2]])
L = 9


@functools.partial(jax.jit, static_argnames=("model", "template", "max_tokens", "temperature", "unroll"))
def think(model, params, tokens_BT, prefix_length_BR, key_BR, template, max_tokens=L, temperature=0.8, unroll=None):
    _, cache = model.hidden(params, scoring.with_context(tokens_BT, template.context))
    return sample_thoughts(
        model, params, cache, prefix_length_BR, template.open, template.close, key_BR, max_tokens, temperature, unroll
    )


keys_of = jax.jit(thought_keys, static_argnums=3)


def branches(position_BK, group_size, template, seed=0, document_B=(3, 4, 5)):
    """Prefix lengths and keys of K·G branches."""
    key_BKG = keys_of(jax.random.key(seed), jnp.asarray(document_B), jnp.asarray(position_BK), group_size)
    prefix_length_BR = np.repeat(position_BK, group_size, 1) + len(template.context)
    return jnp.asarray(prefix_length_BR), key_BKG.reshape(len(position_BK), -1)


def naive(model, params, template, document, length, key, max_tokens, temperature):
    """One thought, every token from a forward of the whole sequence so far, drawn in float64.

    Without a key, the most likely token.
    """
    sequence = [*template.context, *document][:length] + list(template.open)
    thought = []
    while len(thought) < max_tokens and tuple(thought[-len(template.close) :]) != template.close:
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(sequence)] = sequence
        logits_V = np.asarray(apply(model, params, padded)[0][0, len(sequence) - 1], np.float64)
        probability_V = np.exp(exact_logprob(logits_V / temperature))
        if key is None:
            token = int(logits_V.argmax())
        else:
            uniform = float(jax.random.uniform(jax.random.fold_in(key, len(thought))))
            token = int(np.searchsorted(np.cumsum(probability_V), uniform, side="right"))
        thought.append(token)
        sequence.append(token)
    return thought


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loop_is_the_naive_loop(family):
    model = tiny(family)
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS, 2, RICH)
    rollout = think(model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH)
    for b, r in np.ndindex(3, 4):
        thought = naive(model, params, RICH, DOCUMENTS[b], prefix_length_BR[b, r], key_BR[b, r], L, 0.8)
        assert list(rollout.thought_BRL[b, r]) == thought + [0] * (L - len(thought))
        assert rollout.length_BR[b, r] == len(thought)


def test_near_zero_temperature_is_greedy():
    model = tiny()
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS[:, :1], 2, RICH)
    rollout = think(model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH, temperature=1e-4)
    for b in range(3):
        thought = naive(model, params, RICH, DOCUMENTS[b], prefix_length_BR[b, 0], None, L, 1.0)
        for r in range(2):
            assert list(rollout.thought_BRL[b, r, : rollout.length_BR[b, r]]) == thought
    np.testing.assert_allclose(rollout.logprob_BRL, 0.0, atol=1e-2)  # logits of 20,000 end in units of 2e-3


@pytest.mark.parametrize("close", [(2,), (2, 6), (2, 2), (0,)])
def test_where_a_thought_ends(close):
    """A vocabulary of 8, so that both endings are common: the tag closes at its first occurrence, or the cap does."""
    model = tiny(vocab_size=8)
    template = RICH._replace(close=close)
    prefix_length_BR, key_BR = branches(POSITIONS, 32, template)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, rough_params(model))
    rollout = jax.tree.map(np.asarray, think(model, params, DOCUMENTS % 8, prefix_length_BR, key_BR, template))
    assert 4 <= rollout.stopped_BR.sum() <= rollout.stopped_BR.size - 4
    width = len(close)
    for b, r in np.ndindex(rollout.length_BR.shape):
        length = rollout.length_BR[b, r]
        thought = tuple(rollout.thought_BRL[b, r, :length])
        found = [i for i in range(width, L + 1) if thought[i - width : i] == close]
        assert rollout.stopped_BR[b, r] == bool(found)
        assert length == (found[0] if found else L) >= 1
        assert not rollout.thought_BRL[b, r, length:].any() and not rollout.logprob_BRL[b, r, length:].any()
        assert (rollout.logprob_BRL[b, r, :length] < 0).all()


def test_a_cap_of_one_token():
    model = tiny(vocab_size=8)
    prefix_length_BR, key_BR = branches(POSITIONS, 8, RICH)
    template = RICH._replace(close=(2,))
    rollout = think(model, rough_params(model), DOCUMENTS % 8, prefix_length_BR, key_BR, template, max_tokens=1)
    assert rollout.thought_BRL.shape == (3, 16, 1) and (rollout.length_BR == 1).all()
    np.testing.assert_array_equal(rollout.stopped_BR, rollout.thought_BRL[..., 0] == 2)


def test_a_thought_does_not_depend_on_its_batch():
    model = tiny("qwen3")
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS, 2, RICH)
    whole = think(model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH)

    def same(other, rows, columns):
        for name in ("thought_BRL", "length_BR", "stopped_BR"):
            wanted = np.asarray(getattr(whole, name))[rows][:, columns]
            np.testing.assert_array_equal(getattr(other, name), wanted)
        wanted = np.asarray(whole.logprob_BRL)[rows][:, columns]
        np.testing.assert_allclose(other.logprob_BRL, wanted, rtol=1e-4, atol=1e-5)

    everything = list(range(4))
    order = [2, 0, 1]
    same(think(model, params, DOCUMENTS[order], prefix_length_BR[order,], key_BR[order,], RICH), order, everything)
    alone = think(model, params, DOCUMENTS[1:2], prefix_length_BR[1:2], key_BR[1:2], RICH)
    same(alone, [1], everything)
    wider = np.pad(DOCUMENTS, ((0, 0), (0, 5)), constant_values=33)  # other padding
    same(think(model, params, wider, prefix_length_BR, key_BR, RICH), [0, 1, 2], everything)
    columns = [3, 0]
    fewer = think(model, params, DOCUMENTS, prefix_length_BR[:, columns], key_BR[:, columns], RICH)
    same(fewer, [0, 1, 2], columns)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_unrolled_layers_sample_the_same(family):
    model = tiny(family, remat=True)
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS, 2, RICH)
    scanned, unrolled = (
        think(model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH, unroll=unroll) for unroll in (False, True)
    )
    for a, b in zip(scanned[:3], unrolled[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(scanned.logprob_BRL, unrolled.logprob_BRL, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampler_and_trainer_agree(family, temperature):
    """What sampling says of its tokens is what the learner's one-pass forward says: the ratio starts at 1."""
    model = tiny(family)
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS, 2, RICH)
    rollout = think(model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH, temperature=temperature)

    @jax.jit
    def score(rollout):
        _, cache = model.hidden(params, scoring.with_context(DOCUMENTS, RICH.context))
        return scoring.score_branches(
            model, params, cache, prefix_length_BR, scoring.Thoughts(*rollout[:3]), jnp.zeros((3, 4, 1), jnp.int32),
            RICH, temperature,
        )  # fmt: skip

    inside_BRL = np.arange(L) < rollout.length_BR[..., None]
    gap_BRL = np.where(inside_BRL, score(rollout).logprob_BRL - rollout.logprob_BRL, 0.0)
    assert np.abs(rollout.logprob_BRL).max() > 2 and np.abs(gap_BRL).max() < 2e-5
