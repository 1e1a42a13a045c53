# SPDX-License-Identifier: Apache-2.0
"""The engine against a naive loop that reads everything again for each token, whatever the slots and the ring; and that
the trainer's forward agrees with what the sampler says of its own tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import FAMILIES, RICH, apply, rough_params, tiny

from rlp_jax.rollout import engine, scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.filters import Filter
from rlp_jax.rollout.sampling import thought_keys

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]


def exact_logprob(logits_V):
    logits_V = np.asarray(logits_V, np.float64)
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


DOCUMENTS = np.array([[11, 30, 12, 8, 9, 40], [21, 13, 44, 17, 25, 9], [11, 31, 14, 46, 8, 0]], np.int32)
POSITIONS = np.array([[0, 6], [3, 1], [5, 2]])
L = 9


@functools.partial(jax.jit, static_argnames=("model", "template", "max_tokens", "temperature", "settings"))
def think(
    model,
    params,
    tokens_BT,
    prefix_length_BR,
    key_BR,
    template,
    max_tokens=L,
    temperature=0.8,
    limit_BR=None,
    settings=(),
):
    """`settings` are keywords of sample_thoughts as items."""
    _, cache = model.hidden(params, scoring.with_context(tokens_BT, template.context), stops_BK=prefix_length_BR)
    return sample_thoughts(
        model, params, cache, prefix_length_BR, template.open, template.close, key_BR, max_tokens, temperature,
        limit_BR=limit_BR, **dict(settings),
    )  # fmt: skip


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


@pytest.mark.parametrize("close", [(), (2, 6)], ids=["no tag", "a tag too"])
@pytest.mark.parametrize("slots", [None, 3])
def test_an_automaton_ends_thoughts(close, slots):
    """Token 7 at once, or 1 followed by 3 with any number of 1 in between; every thought starts it anew."""
    ends = np.array([[0, 1, 0, 0, 0, 0, 0, 2], [0, 1, 0, 2, 0, 0, 0, 2], [2] * 8], np.int16)
    model = tiny(vocab_size=8)
    template = RICH._replace(close=close)
    prefix_length_BR, key_BR = branches(POSITIONS, 16, template)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, rough_params(model))

    @jax.jit
    def sample(ends):
        tokens_BT = scoring.with_context(DOCUMENTS % 8, template.context)
        _, cache = model.hidden(params, tokens_BT, stops_BK=prefix_length_BR)
        return sample_thoughts(
            model, params, cache, prefix_length_BR, template.open, close, key_BR, L, 0.8, slots=slots, ends=ends
        )

    rollout = jax.tree.map(np.asarray, sample(ends))
    assert 4 <= rollout.stopped_BR.sum() <= rollout.stopped_BR.size - 4
    for b, r in np.ndindex(rollout.length_BR.shape):
        length = rollout.length_BR[b, r]
        thought = tuple(rollout.thought_BRL[b, r, :length].tolist())

        def ended(part):
            return part[-1] == 7 or part[-2:] == (1, 3) or (close and part[-2:] == close)

        found = [i for i in range(1, length + 1) if ended(thought[:i])]
        assert found == ([length] if rollout.stopped_BR[b, r] else [])
        assert rollout.stopped_BR[b, r] or length == L


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
    model = tiny(family, remat="layer")
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS, 2, RICH)
    scanned, unrolled = (
        think(model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH, settings=(("unroll", unroll),))
        for unroll in (False, True)
    )
    for a, b in zip(scanned[:3], unrolled[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(scanned.logprob_BRL, unrolled.logprob_BRL, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("keep", [Filter(), Filter(top_k=40, top_p=0.9, min_p=0.01)])
def test_sampler_and_trainer_agree(family, temperature, keep):
    """What sampling says of its tokens is what the learner's one-pass forward says: the ratio starts at 1."""
    model = tiny(family)
    params = rough_params(model)
    prefix_length_BR, key_BR = branches(POSITIONS, 2, RICH)
    rollout = think(
        model, params, DOCUMENTS, prefix_length_BR, key_BR, RICH, temperature=temperature, settings=(("keep", keep),)
    )

    @jax.jit
    def score(rollout):
        _, cache = model.hidden(params, scoring.with_context(DOCUMENTS, RICH.context))
        return scoring.score_branches(
            model, params, cache, prefix_length_BR, scoring.Thoughts(*rollout[:3]), jnp.zeros((3, 4, 1), jnp.int32),
            RICH, temperature, keep,
        )  # fmt: skip

    inside_BRL = np.arange(L) < rollout.length_BR[..., None]
    gap_BRL = np.where(inside_BRL, score(rollout).logprob_BRL - rollout.logprob_BRL, 0.0)
    assert np.abs(rollout.logprob_BRL).max() > 1 and np.abs(gap_BRL).max() < 2e-5


# ---------------------------------------------------------------------------------------------- slots and rings


def same(one, other):
    for name in ("thought_BRL", "length_BR", "stopped_BR"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.logprob_BRL, other.logprob_BRL, rtol=1e-4, atol=1e-5)


def many_thoughts(model):
    """Four thoughts at each of two positions, of very different lengths: the tag is one token of eight."""
    params = jax.tree.map(lambda leaf: 0.5 * leaf, rough_params(model))
    return params, DOCUMENTS % 8, *branches(POSITIONS, 4, RICH), RICH._replace(close=(2,))


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
@pytest.mark.parametrize("unroll", [False, True])
def test_thoughts_are_the_same_whatever_the_slots_and_the_ring(family, unroll, monkeypatch):
    model = hybrid(vocab_size=8) if family == "nemotron_h" else tiny(family, vocab_size=8)
    case = many_thoughts(model)
    want = think(model, *case, settings=(("unroll", unroll),))
    assert len(np.unique(want.length_BR)) > 3
    monkeypatch.setattr(engine, "SMALLEST_RING", 2)
    monkeypatch.setattr(engine, "GROWTH", 2)
    assert engine.ring_sizes(L) == (2, 4, 8, 9)
    assert engine.ring_sizes(2048) == (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048)  # then by quarters
    for slots in (1, 3, 8):
        settings = (("unroll", unroll), ("slots", slots), ("group_size", 4))
        same(think(model, *case, settings=settings), want)


def test_slots_are_refilled_at_once(monkeypatch):
    """One thought of 9 tokens beside four of 2: two slots are done when the long one is."""
    model = tiny(vocab_size=8)
    params, documents, prefix_length_BR, key_BR, _ = many_thoughts(model)
    template = RICH._replace(close=(-1,))  # nothing ends by itself
    limit_BR = jnp.broadcast_to(jnp.asarray([9, 2, 2, 2, 2]), (3, 5))
    steps, one_token = [], engine.Engine.one_token

    def counted(self, carry):
        jax.debug.callback(lambda: steps.append(1))
        return one_token(self, carry)

    monkeypatch.setattr(engine.Engine, "one_token", counted)
    case = (model, params, documents, prefix_length_BR[:, :5], key_BR[:, :5], template)
    rollout = think(*case, limit_BR=limit_BR, settings=(("slots", 2),))
    jax.block_until_ready(rollout)
    jax.effects_barrier()
    assert len(steps) == 9
    np.testing.assert_array_equal(rollout.length_BR, limit_BR)
    assert not rollout.stopped_BR.any()


@pytest.mark.parametrize("keep", [Filter(top_k=2), Filter(top_p=0.5), Filter(min_p=0.3)])
def test_filtered_tokens_are_never_drawn(keep):
    """Of the true distribution after each thought so far, read again in one forward."""
    model = tiny(vocab_size=8)
    params, documents, prefix_length_BR, key_BR, template = many_thoughts(model)
    rollout = think(
        model, params, documents, prefix_length_BR, key_BR, template, settings=(("keep", keep), ("slots", 2))
    )
    for b, r in np.ndindex(rollout.length_BR.shape):
        prefix = [*template.context, *documents[b]][: prefix_length_BR[b, r]] + list(template.open)
        thought = list(np.asarray(rollout.thought_BRL[b, r, : rollout.length_BR[b, r]]))
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(prefix) + len(thought)] = prefix + thought
        logits_LV = apply(model, params, padded)[0][0, len(prefix) - 1 : len(prefix) + len(thought) - 1] / 0.8
        kept_LV = np.asarray(keep(logits_LV))
        assert np.isfinite(kept_LV[np.arange(len(thought)), thought]).all()
        exact = [exact_logprob(kept_V)[token] for kept_V, token in zip(kept_LV, thought, strict=True)]
        np.testing.assert_allclose(rollout.logprob_BRL[b, r, : len(thought)], exact, rtol=1e-4, atol=1e-5)


def test_bad_groups_and_tags_are_refused():
    model = tiny(vocab_size=8)
    params, documents, prefix_length_BR, key_BR, template = many_thoughts(model)
    with pytest.raises(ValueError, match="opening tag"):
        think(model, params, documents, prefix_length_BR, key_BR, template._replace(open=()))
    with pytest.raises(ValueError, match="multiple of 3"):
        think(model, params, documents, prefix_length_BR, key_BR, template, settings=(("group_size", 3),))
