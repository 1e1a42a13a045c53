# SPDX-License-Identifier: Apache-2.0
"""Positions: which are allowed, and that the draw is what it says, without replacement, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlp_jax.data.positions import candidates, choose_positions

jitted_choose = jax.jit(choose_positions, static_argnums=4)


def draws(score_T, positions, count=20_000):
    """Position sets of `count` documents with the same candidates, each with its own id."""
    candidate_BT = jnp.ones((count, len(score_T)), bool)
    score_BT = jnp.broadcast_to(jnp.asarray(score_T, jnp.float32), candidate_BT.shape)
    position_BK, valid_BK = choose_positions(jax.random.key(7), jnp.arange(count), candidate_BT, score_BT, positions)
    assert bool(valid_BK.all())
    return np.asarray(position_BK)


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def test_candidates_respect_first_horizon_length_and_span():
    span_BT = np.zeros((2, 6), bool)
    span_BT[:, [0, 2, 5]] = True
    length_B = np.array([6, 4])
    allowed = np.asarray(candidates(length_B, span_BT, first=1, horizon=1))
    np.testing.assert_array_equal(allowed, [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    allowed = np.asarray(candidates(length_B, span_BT, first=0, horizon=3, mode="entropy"))
    np.testing.assert_array_equal(allowed, [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    allowed = np.asarray(candidates(length_B, span_BT, first=1, horizon=2, mode="span"))
    np.testing.assert_array_equal(allowed, [[0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]])


def test_uniform_draw_is_uniform():
    count, tokens = 20_000, 10
    position_BK, _ = choose_positions(
        jax.random.key(3), jnp.arange(count), jnp.ones((count, tokens), bool), None, positions=1
    )
    observed = np.bincount(np.asarray(position_BK)[:, 0], minlength=tokens)
    assert chi_square(observed, np.full(tokens, count / tokens)) < 27.9  # 9 degrees of freedom, p = 0.001


def test_draw_follows_the_scores():
    score_T = np.array([0.1, 2.0, 0.5, 1.0, 0.4])
    observed = np.bincount(draws(score_T, 1)[:, 0], minlength=5)
    assert chi_square(observed, 20_000 * score_T / score_T.sum()) < 18.5  # 4 degrees of freedom, p = 0.001


def test_pairs_follow_successive_draws_without_replacement():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    pairs = draws(p, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    expected, observed = [], []
    for i in range(4):
        for j in range(i + 1, 4):
            expected.append(20_000 * (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])))
            observed.append(((pairs[:, 0] == i) & (pairs[:, 1] == j)).sum())
    assert chi_square(np.array(observed), np.array(expected)) < 20.5  # 5 degrees of freedom, p = 0.001


def test_zero_scores_come_last_and_bad_scores_do_no_harm():
    score_T = np.array([0.0, 1.0, 0.0, 2.0, np.nan, -1.0])
    np.testing.assert_array_equal(draws(score_T, 2, count=200), np.tile([1, 3], (200, 1)))
    assert {1, 3} <= set.intersection(*map(set, draws(score_T, 3, count=200).tolist()))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    lengths=st.lists(st.integers(1, 24), min_size=4, max_size=4),
    horizon=st.integers(1, 4),
    first=st.integers(0, 1),
    positions=st.sampled_from([1, 4, 30]),
    mode=st.sampled_from(["uniform", "span", "entropy"]),
)
def test_choice_is_sorted_distinct_allowed_and_complete(seed, lengths, horizon, first, positions, mode):
    rng = np.random.default_rng(seed)
    length_B, tokens = np.array(lengths), 24
    span_BT = rng.random((len(lengths), tokens)) < 0.4
    candidate_BT = candidates(length_B, span_BT, first, horizon, mode)
    score_BT = jnp.asarray(rng.random(span_BT.shape), jnp.float32) if mode == "entropy" else None
    document_B = rng.integers(0, 2**31, len(lengths))
    position_BK, valid_BK = map(
        np.asarray, jitted_choose(jax.random.key(seed), document_B, candidate_BT, score_BT, positions)
    )
    assert position_BK.shape == valid_BK.shape == (len(lengths), positions)
    assert position_BK.dtype == np.int32 and valid_BK.dtype == bool
    assert ((position_BK >= 0) & (position_BK < tokens)).all()
    for position_K, valid_K, candidate_T in zip(position_BK, valid_BK, np.asarray(candidate_BT), strict=True):
        allowed = np.flatnonzero(candidate_T)
        chosen = position_K[valid_K]
        assert len(chosen) == min(positions, len(allowed))
        assert (np.diff(chosen) > 0).all()
        assert set(chosen) <= set(allowed)
        assert not valid_K[len(chosen) :].any()
        if len(allowed) <= positions:
            np.testing.assert_array_equal(chosen, allowed)
        np.testing.assert_array_equal(position_K[~valid_K], allowed[0] if len(allowed) else 1)


@pytest.mark.parametrize("with_scores", [False, True])
def test_choice_depends_on_key_and_document_only(with_scores):
    rng = np.random.default_rng(0)
    documents, tokens, positions = 8, 33, 4
    document_B = rng.integers(0, 2**31, documents)
    candidate_BT = candidates(rng.integers(8, tokens, documents), np.ones((documents, tokens), bool), 1, 2)
    score_BT = jnp.asarray(rng.random((documents, tokens)), jnp.float32) if with_scores else None
    key = jax.random.key(1)
    position_BK, valid_BK = choose_positions(key, document_B, candidate_BT, score_BT, positions)

    order = rng.permutation(documents)
    reordered_BK, _ = choose_positions(
        key, document_B[order], candidate_BT[order], None if score_BT is None else score_BT[order], positions
    )
    np.testing.assert_array_equal(reordered_BK, position_BK[order])

    padding = ((0, 0), (0, 31))
    padded_BK, padded_valid_BK = choose_positions(
        key, document_B, jnp.pad(candidate_BT, padding), None if score_BT is None else jnp.pad(score_BT, padding), 4
    )
    np.testing.assert_array_equal(padded_BK, position_BK)
    np.testing.assert_array_equal(padded_valid_BK, valid_BK)

    other_BK, _ = choose_positions(jax.random.key(2), document_B, candidate_BT, score_BT, positions)
    assert (np.asarray(other_BK) != np.asarray(position_BK)).any()
    renamed_BK, _ = choose_positions(key, document_B + 1, candidate_BT, score_BT, positions)
    assert (np.asarray(renamed_BK) != np.asarray(position_BK)).any(-1).sum() >= documents // 2


def test_jit_gives_the_same_positions_for_numpy_ids():
    document_B = np.array([3, 2**31 - 1, 12345, 2**40 + 9], np.int64)
    candidate_BT = candidates(np.array([20, 3, 1, 9]), np.ones((4, 20), bool), 1, 1)
    eager = choose_positions(jax.random.key(0), document_B, candidate_BT, None, 3)
    jitted = jitted_choose(jax.random.key(0), document_B, candidate_BT, None, 3)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.asarray(eager[1]).sum(-1).tolist() == [3, 2, 0, 3]
