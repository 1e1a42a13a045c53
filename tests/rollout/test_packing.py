# SPDX-License-Identifier: Apache-2.0
"""Bins: which document goes where, what stands at each place, and that their scores are those of padded branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import RICH, rough_params, tiny

from rlp_jax.rollout import packing, scoring

pytestmark = pytest.mark.usefixtures("quick_compiles")
DOCUMENTS, T, R, L, H = 3, 9, 4, 6, 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 3))
def test_every_document_finds_a_bin(sizes, bins, spare):
    """Even if there are no more bins than the longest documents would need; and the documents are those given."""
    bins = min(bins, len(sizes))
    fit = -(-len(sizes) // bins)
    capacity, documents = fit * max(sizes), fit * spare
    index_Pd, used = jax.device_get(packing.assign(jnp.asarray(sizes), bins, capacity, documents))
    assert sorted(index_Pd[index_Pd < len(sizes)].tolist()) == list(range(len(sizes)))
    filled = [sum(sizes[b] for b in row if b < len(sizes)) for row in index_Pd]
    assert max(filled) <= capacity
    assert all(filled[:used]) and not any(filled[used:])
    if spare == 3 and used > 1:  # first fit: no bin that is used could have gone into the one before it
        full = (index_Pd < len(sizes)).sum(-1) == documents
        assert all(full[p] or filled[p] + filled[p + 1] > capacity for p in range(used - 1))


def case(seed=0):
    rng = np.random.default_rng(seed)
    tokens_dT = rng.integers(8, 50, (DOCUMENTS, T)).astype(np.int32)
    length_dR = rng.integers(1, L + 1, (DOCUMENTS, R)).astype(np.int32)
    length_dR[0] = [L, 0, 1, L]
    thought_dRL = np.where(np.arange(L) < length_dR[..., None], rng.integers(8, 50, (DOCUMENTS, R, L)), 0).astype(
        np.int32
    )
    thoughts = scoring.Thoughts(thought_dRL, length_dR, (rng.random((DOCUMENTS, R)) < 0.5) & (length_dR > 0))
    prefix_dR = rng.integers(1, T - H + 1, (DOCUMENTS, R)).astype(np.int32)
    present_dR = np.ones((DOCUMENTS, R), bool)
    present_dR[1, 2:], present_dR[2] = False, False
    target_dRH = rng.integers(8, 50, (DOCUMENTS, R, H)).astype(np.int32)
    return tokens_dT, prefix_dR, present_dR, thoughts, target_dRH


def test_what_stands_where():
    tokens_dT, prefix_dR, present_dR, thoughts, target_dRH = case()
    packed = packing.pack(tokens_dT, prefix_dR, present_dR, thoughts, target_dRH, RICH, 200)
    tokens_dRS, index_dRH = scoring.lay_out(thoughts, target_dRH, RICH)
    size_dR = packing.branch_tokens(thoughts, RICH, H)
    at, ranges = 0, packed.layout.ranges
    for d in range(DOCUMENTS):
        document, read = at, int(np.where(present_dR[d], prefix_dR[d], 0).max())
        np.testing.assert_array_equal(packed.tokens_C[at : at + read], tokens_dT[d, :read])
        np.testing.assert_array_equal(packed.layout.position_BC[at : at + read], np.arange(read))
        at += read
        for r in range(R):
            if not present_dR[d, r]:
                assert (packed.place_dRL[d, r] == 200).all() and (packed.place_dRH[d, r] == 200).all()
                continue
            end = at + int(size_dR[d, r])
            np.testing.assert_array_equal(packed.tokens_C[at:end], tokens_dRS[d, r, : end - at])
            np.testing.assert_array_equal(packed.layout.position_BC[at:end], prefix_dR[d, r] + np.arange(end - at))
            for name, value in zip(ranges._fields, (document, document + prefix_dR[d, r], at), strict=True):
                assert (getattr(ranges, name)[at:end] == value).all(), name
            np.testing.assert_array_equal(packed.place_dRH[d, r], at + index_dRH[d, r])
            length = thoughts.length_BR[d, r]
            np.testing.assert_array_equal(packed.place_dRL[d, r, :length], at + len(RICH.open) - 1 + np.arange(length))
            assert (packed.place_dRL[d, r, length:] == 200).all()
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
    for a, (tokens_dT, prefix_dR, present_dR, thoughts, target_dRH) in enumerate(cases):
        _, cache = model.hidden(params, tokens_dT)
        plain = scoring.score_branches(model, params, cache, prefix_dR, thoughts, target_dRH, RICH, 0.7)
        inside = present_dR[..., None] & (np.arange(L) < thoughts.length_BR[..., None])
        for name in ("logprob_BRL", "entropy_BRL"):
            want = np.where(inside, getattr(plain, name), 0)
            np.testing.assert_allclose(getattr(ours, name)[a], want, rtol=1e-4, atol=1e-5)
        want = np.where(present_dR[..., None], plain.target_logprob_BRH, 0)
        np.testing.assert_allclose(ours.target_logprob_BRH[a], want, rtol=1e-4, atol=1e-5)
        want = present_dR[..., None] & np.asarray(plain.target_correct_BRH)
        np.testing.assert_array_equal(ours.target_correct_BRH[a], want)


def test_a_hybrid_cannot_be_packed():
    from hybrids import hybrid

    model = hybrid()
    with pytest.raises(ValueError, match="recurrent layers cannot read packed sequences"):
        model.hidden_packed(None, jnp.zeros((1, 4), jnp.int32), None)
