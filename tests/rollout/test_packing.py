"""Bins: which document goes where, what stands at each place, and that their scores are those of padded branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RICH, rough_params, tiny

from rlp_jax.rollout import packing, scoring

D, T, R, L, H = 3, 9, 4, 6, 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 3))
def test_every_document_finds_a_bin(sizes, bins, spare):
    """Even if there are no more bins than the longest documents would need; and the documents are those given."""
    bins = min(bins, len(sizes))
    fit = -(-len(sizes) // bins)
    capacity, documents = fit * max(sizes), fit * spare
    index_PD, used = jax.device_get(packing.assign(jnp.asarray(sizes), bins, capacity, documents))
    assert sorted(index_PD[index_PD < len(sizes)].tolist()) == list(range(len(sizes)))
    filled = [sum(sizes[b] for b in row if b < len(sizes)) for row in index_PD]
    assert max(filled) <= capacity
    assert all(filled[:used]) and not any(filled[used:])
    if spare == 3 and used > 1:  # first fit: no bin that is used could have gone into the one before it
        full = (index_PD < len(sizes)).sum(-1) == documents
        assert all(full[p] or filled[p] + filled[p + 1] > capacity for p in range(used - 1))


def case(seed=0):
    rng = np.random.default_rng(seed)
    tokens_DT = rng.integers(8, 50, (D, T)).astype(np.int32)
    length_DR = rng.integers(1, L + 1, (D, R)).astype(np.int32)
    length_DR[0] = [L, 0, 1, L]
    thought_DRL = np.where(np.arange(L) < length_DR[..., None], rng.integers(8, 50, (D, R, L)), 0).astype(np.int32)
    thoughts = scoring.Thoughts(thought_DRL, length_DR, (rng.random((D, R)) < 0.5) & (length_DR > 0))
    prefix_DR = rng.integers(1, T - H + 1, (D, R)).astype(np.int32)
    present_DR = np.ones((D, R), bool)
    present_DR[1, 2:], present_DR[2] = False, False
    target_DRH = rng.integers(8, 50, (D, R, H)).astype(np.int32)
    return tokens_DT, prefix_DR, present_DR, thoughts, target_DRH


def test_what_stands_where():
    tokens_DT, prefix_DR, present_DR, thoughts, target_DRH = case()
    packed = packing.pack(tokens_DT, prefix_DR, present_DR, thoughts, target_DRH, RICH, 200)
    tokens_DRS, index_DRH = scoring.lay_out(thoughts, target_DRH, RICH)
    size_DR = packing.branch_tokens(thoughts, RICH, H)
    at, ranges = 0, packed.layout.ranges
    for d in range(D):
        document, read = at, int(np.where(present_DR[d], prefix_DR[d], 0).max())
        np.testing.assert_array_equal(packed.tokens_C[at : at + read], tokens_DT[d, :read])
        np.testing.assert_array_equal(packed.layout.position_BC[at : at + read], np.arange(read))
        at += read
        for r in range(R):
            if not present_DR[d, r]:
                assert (packed.place_DRL[d, r] == 200).all() and (packed.place_DRH[d, r] == 200).all()
                continue
            end = at + int(size_DR[d, r])
            np.testing.assert_array_equal(packed.tokens_C[at:end], tokens_DRS[d, r, : end - at])
            np.testing.assert_array_equal(packed.layout.position_BC[at:end], prefix_DR[d, r] + np.arange(end - at))
            for name, value in zip(ranges._fields, (document, document + prefix_DR[d, r], at), strict=True):
                assert (getattr(ranges, name)[at:end] == value).all(), name
            np.testing.assert_array_equal(packed.place_DRH[d, r], at + index_DRH[d, r])
            length = thoughts.length_BR[d, r]
            np.testing.assert_array_equal(packed.place_DRL[d, r, :length], at + len(RICH.open) - 1 + np.arange(length))
            assert (packed.place_DRL[d, r, length:] == 200).all()
            at = end
    np.testing.assert_array_equal(ranges.own_start_BC[at:], np.arange(at, 200))  # padding sees itself alone


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scores_are_those_of_padded_branches(family):
    """Two bins side by side, the second of other documents; every present branch scores as in a fork."""
    model = tiny(family)
    params = rough_params(model)
    cases = [case(0), case(1)]
    tokens, prefix, present, thoughts, target = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    pack = jax.vmap(lambda *inputs: packing.pack(*inputs, RICH, 256))
    bins = pack(tokens, prefix, present, thoughts, target)
    ours = packing.score_bins(model, params, bins, thoughts.thought_BRL, target, 0.7)
    for a, (tokens_DT, prefix_DR, present_DR, thoughts, target_DRH) in enumerate(cases):
        _, cache = model.hidden(params, tokens_DT)
        plain = scoring.score_branches(model, params, cache, prefix_DR, thoughts, target_DRH, RICH, 0.7)
        inside = present_DR[..., None] & (np.arange(L) < thoughts.length_BR[..., None])
        for name in ("logprob_BRL", "entropy_BRL"):
            want = np.where(inside, getattr(plain, name), 0)
            np.testing.assert_allclose(getattr(ours, name)[a], want, rtol=1e-4, atol=1e-5)
        want = np.where(present_DR[..., None], plain.target_logprob_BRH, 0)
        np.testing.assert_allclose(ours.target_logprob_BRH[a], want, rtol=1e-4, atol=1e-5)
        want = present_DR[..., None] & np.asarray(plain.target_correct_BRH)
        np.testing.assert_array_equal(ours.target_correct_BRH[a], want)


def test_a_hybrid_cannot_be_packed():
    from hybrids import hybrid

    model = hybrid()
    with pytest.raises(ValueError, match="recurrent layers cannot read packed sequences"):
        model.hidden_packed(None, jnp.zeros((1, 4), jnp.int32), None)
