# SPDX-License-Identifier: Apache-2.0
"""Cached equals uncached: prefill, fork and continue in pieces give what one pass over the whole sequence gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FAMILIES, apply, padded, rough_params, tiny

from rlp_jax.models.cache import fork

pytestmark = pytest.mark.usefixtures("quick_compiles")
families = pytest.mark.parametrize("family", list(FAMILIES))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def documents(model, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape).astype(np.int32)


@families
def test_token_by_token_is_one_forward(family):
    model = tiny(family)
    params, tokens = rough_params(model), documents(model, 2, 11)
    whole, _ = apply(model, params, tokens)
    logits, cache = apply(model, params, tokens[:, :5])
    np.testing.assert_allclose(logits, whole[:, :5], **CLOSE)
    cache = fork(cache, jnp.full((2, 1), 5), 6)
    for s in range(5, 11):
        logits, cache = apply(model, params, tokens[:, s : s + 1], cache)
        assert logits.shape == (2, 1, model.config.vocab_size) and cache.written == s - 4
        np.testing.assert_allclose(logits[:, 0], whole[:, s], **CLOSE)


@families
@pytest.mark.parametrize("pieces", [(1, 2, 3), (3, 1, 2), (6,)])
def test_branches_at_different_positions_in_pieces(family, pieces):
    model, T = tiny(family), 5
    params, document, new = rough_params(model), documents(model, 2, T), documents(model, 2, 4, 6, seed=1)
    prefix_length_BR = np.array([[0, 3, T, 3], [T, 1, 0, 4]])
    _, prefix = apply(model, params, document)
    cache, parts = fork(prefix, jnp.asarray(prefix_length_BR), 7), []  # a spare place must not be seen
    assert cache.prefix_k is prefix.prefix_k and cache.prefix_v is prefix.prefix_v  # a fork copies nothing
    for start, size in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        logits, cache = apply(model, params, new[:, :, start : start + size], cache)
        parts.append(logits)
    got = np.concatenate(parts, 2)
    rows = [[*document[b, : prefix_length_BR[b, r]], *new[b, r]] for b in range(2) for r in range(4)]
    whole = apply(model, params, padded(rows))[0].reshape(2, 4, T + 6, -1)
    for b in range(2):
        for r in range(4):
            length = prefix_length_BR[b, r]
            np.testing.assert_allclose(got[b, r], whole[b, r, length : length + 6], **CLOSE)


def test_a_fork_without_room_takes_one_call():
    model = tiny()
    params, document, new = rough_params(model), documents(model, 2, 5), documents(model, 2, 3, 4, seed=1)
    prefix_length_BR = jnp.array([[5, 0, 2], [1, 4, 4]])
    _, prefix = apply(model, params, document)
    once, _ = apply(model, params, new, fork(prefix, prefix_length_BR))
    roomy, cache = apply(model, params, new, fork(prefix, prefix_length_BR, 4))
    np.testing.assert_allclose(once, roomy, **CLOSE)
    assert cache.branch_k.shape == (2, 2, 2, 3, 4, 6) and cache.written == 4
    assert np.abs(cache.branch_k).min() > 0


def test_branches_do_not_see_each_other_nor_what_follows_their_position():
    model = tiny("qwen3")
    params, document, new = rough_params(model), documents(model, 1, 6), documents(model, 1, 3, 4, seed=1)
    prefix_length_BR = jnp.array([[2, 4, 6]])

    @jax.jit
    def read(document, new):
        return apply(model, params, new, fork(apply(model, params, document)[1], prefix_length_BR))[0]

    before = read(document, new)
    other = new.copy()
    other[0, 1] = (other[0, 1] + 5) % 290
    after = read(document, other)
    np.testing.assert_array_equal(after[0, [0, 2]], before[0, [0, 2]])
    assert not np.allclose(after[0, 1], before[0, 1])
    changed = document.copy()
    changed[0, 4:] = (changed[0, 4:] + 5) % 290
    after = read(changed, new)
    np.testing.assert_array_equal(after[0, :2], before[0, :2])
    assert not np.allclose(after[0, 2], before[0, 2])
