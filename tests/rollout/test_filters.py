# SPDX-License-Identifier: Apache-2.0
"""Filters against a sort in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlp_jax.rollout.filters import Filter, threshold

apply = jax.jit(lambda keep, *args: keep(*args), static_argnums=0)


def reference(logits_V, top_k=0, top_p=1.0, min_p=0.0):
    """The kept tokens of one distribution, by sorting; ties stay together."""
    kept = np.ones(len(logits_V), bool)
    if top_k:
        kept &= logits_V >= np.sort(logits_V)[::-1][min(top_k, len(logits_V)) - 1]
    weight = np.exp(logits_V.astype(np.float64) - logits_V.max()) * kept
    if top_p < 1:
        order = np.argsort(-logits_V, kind="stable")
        enough = np.cumsum(weight[order]) >= top_p * weight.sum()
        kept &= logits_V >= logits_V[order[enough.argmax()]]
    if min_p:
        kept &= logits_V >= logits_V.max() + np.log(min_p)
    return kept


@pytest.mark.parametrize(
    "keep",
    [Filter(top_k=1), Filter(top_k=5), Filter(top_p=0.9), Filter(top_p=0.1), Filter(min_p=0.05),
     Filter(top_k=20, top_p=0.8, min_p=0.02), Filter(top_k=1000)],
)  # fmt: skip
def test_kept_tokens_are_those_of_a_sort(keep):
    logits_BV = np.random.default_rng(0).normal(0, 3, (40, 257)).astype(np.float32)
    logits_BV[5:10] = np.round(logits_BV[5:10])  # many ties
    out_BV = np.asarray(apply(keep, logits_BV))
    for logits_V, out_V in zip(logits_BV, out_BV, strict=True):
        kept = reference(logits_V, keep.top_k, keep.top_p, keep.min_p)
        np.testing.assert_array_equal(out_V, np.where(kept, logits_V, -np.inf))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-np.inf, -1e30, -3.0, -0.0, 0.0, 1e-30, 0.5, 2.0, 1e30]), min_size=6, max_size=6))
def test_threshold_over_awkward_numbers(values):
    """Zeros of both signs are one value; -inf is a value like the others."""
    value_V = np.asarray(values, np.float32)
    for target in (1.0, 3.0, 6.0):
        found = float(threshold(jnp.asarray(value_V), jnp.ones(6), target)[0])
        assert found == np.sort(value_V)[::-1][int(target) - 1]


def test_everything_is_left_alone_and_a_drawn_token_stays():
    logits_BV = jnp.asarray([[3.0, 1.0, 2.0, -1.0]])
    np.testing.assert_array_equal(Filter()(logits_BV), logits_BV)
    out_BV = Filter(top_k=1)(logits_BV, jnp.asarray([3]))
    np.testing.assert_array_equal(out_BV, [[3.0, -np.inf, -np.inf, -1.0]])


def test_gradient_is_that_of_a_softmax_over_the_kept_tokens():
    logits_V = np.asarray([0.3, 2.0, -1.0, 1.1], np.float32)

    def logprob(logits_V):
        return jax.nn.log_softmax(Filter(top_k=2)(logits_V, jnp.asarray(3)))[3]

    weight = np.exp([2.0, 1.1]) / np.exp([2.0, 1.1]).sum()
    np.testing.assert_allclose(jax.grad(logprob)(logits_V), [0.0, -weight[0], 0.0, 1 - weight[1]], rtol=1e-6)
