# SPDX-License-Identifier: Apache-2.0
"""The claim of the design: branches that share one prefix give the numbers of as many separate, unshared sequences.

Logits, log-probabilities and parameter gradients, in float32, for G thoughts at one position and K·G at several, with
ragged prefixes and thoughts of different lengths, sampled closing tags and appended ones. The unshared side repeats
context and prefix in every sequence and knows no cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FAMILIES, RICH, Branch, apply, padded, relative_error, rough_params, tiny, unshared_scores

from rlp_jax.models.cache import fork
from rlp_jax.rollout import scoring

TEMPERATURE, L, H = 0.7, 6, 2
TOLERANCE = 1e-5  # float32 sums in another order: about 1e-6 is seen; 1e-4 is promised

both = pytest.mark.parametrize(
    ("family", "remat"), [(family, remat) for family in FAMILIES for remat in ("none", "elementwise")]
)


def case(vocab_size, position_BK, group_size, seed=0):
    """Documents and, for each branch, a thought of its own length: full, short, empty; capped or stopped."""
    rng = np.random.default_rng(seed)
    B, T = len(position_BK), 9
    tokens_BT = rng.integers(8, vocab_size, (B, T)).astype(np.int32)
    position_BR = np.repeat(position_BK, group_size, 1)
    R = position_BR.shape[1]
    length_BR = rng.integers(2, L + 1, (B, R)).astype(np.int32)
    length_BR[:, 0], length_BR[0, 1] = L, 0
    stopped_BR = (rng.random((B, R)) < 0.5) & (length_BR > 0)
    stopped_BR[:, -1], length_BR[:, -1] = True, 2  # nothing but the closing tag
    thought_BRL = rng.integers(8, vocab_size, (B, R, L)).astype(np.int32)
    thought_BRL = np.where(np.arange(L) < length_BR[..., None], thought_BRL, 0)
    for b, r in zip(*np.nonzero(stopped_BR), strict=True):
        thought_BRL[b, r, length_BR[b, r] - 2 : length_BR[b, r]] = RICH.close
    return tokens_BT, position_BR, scoring.Thoughts(thought_BRL, length_BR, stopped_BR)


ONE_POSITION = np.array([[3], [7]]), 4  # G = 4
SEVERAL = np.array([[0, 4, 7], [2, 5, 6]]), 2  # K = 3, G = 2; 0 is the empty document, 7 the last with two targets


def both_ways(family, remat, several):
    """(log-probabilities of thoughts and targets, gradient of a random combination of them), shared and unshared."""
    model = tiny(family, remat=remat)
    position_BK, group_size = SEVERAL if several else ONE_POSITION
    tokens_BT, position_BR, thoughts = case(model.config.vocab_size, position_BK, group_size)
    target_BRH = np.asarray(scoring.targets(tokens_BT, jnp.asarray(position_BR), H))
    rng = np.random.default_rng(1)
    weight_BRL = rng.normal(size=thoughts.thought_BRL.shape) * (np.arange(L) < thoughts.length_BR[..., None])
    weight_BRH = rng.normal(size=target_BRH.shape)

    def shared(params):
        _, cache = model.apply(params, scoring.with_context(jnp.asarray(tokens_BT), RICH.context))
        prefix_length_BR = position_BR + len(RICH.context)
        scored = scoring.score_branches(
            model, params, cache, prefix_length_BR, jax.tree.map(jnp.asarray, thoughts), target_BRH, RICH, TEMPERATURE
        )
        return scored.logprob_BRL, scored.target_logprob_BRH

    B, R = position_BR.shape
    branches = [
        Branch(
            RICH, tokens_BT[b], position_BR[b, r], thoughts.thought_BRL[b, r, : thoughts.length_BR[b, r]],
            thoughts.stopped_BR[b, r], target_BRH[b, r],
        )
        for b in range(B) for r in range(R)
    ]  # fmt: skip

    def unshared(params):
        scored = unshared_scores(model, params, branches, TEMPERATURE)
        thought = [jnp.pad(logprob, (0, L - len(logprob))) for logprob, _ in scored]
        return jnp.stack(thought).reshape(B, R, L), jnp.stack([target for _, target in scored]).reshape(B, R, H)

    def value_and_grad(score):
        def combined(params):
            logprob_BRL, target_BRH = score(params)
            return jnp.sum(weight_BRL * logprob_BRL) + jnp.sum(weight_BRH * target_BRH), (logprob_BRL, target_BRH)

        (_, scores), grads = jax.jit(jax.value_and_grad(combined, has_aux=True))(rough_params(model))
        return scores, grads

    return value_and_grad(shared), value_and_grad(unshared), thoughts.length_BR


@both
@pytest.mark.parametrize("several", [False, True])
def test_logprobs_and_gradients_of_shared_and_separate_sequences(family, remat, several):
    (shared, shared_grads), (unshared, unshared_grads), length_BR = both_ways(family, remat, several)
    inside_BRL = np.arange(L) < length_BR[..., None]
    assert relative_error(np.where(inside_BRL, shared[0], 0), unshared[0]) < TOLERANCE
    assert relative_error(shared[1], unshared[1]) < TOLERANCE
    assert min(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(unshared_grads)) > 1e-2
    assert relative_error(shared_grads, unshared_grads) < TOLERANCE  # the worst leaf


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_of_shared_and_separate_sequences(family):
    model = tiny(family)
    params = rough_params(model)
    tokens_BT, position_BR, thoughts = case(model.config.vocab_size, *SEVERAL)
    target_BRH = np.asarray(scoring.targets(tokens_BT, jnp.asarray(position_BR), H))
    _, cache = apply(model, params, scoring.with_context(jnp.asarray(tokens_BT), RICH.context))
    prefix_length_BR = jnp.asarray(position_BR + len(RICH.context))
    tokens_BRS, _ = scoring.lay_out(jax.tree.map(jnp.asarray, thoughts), target_BRH, RICH)
    shared, _ = apply(model, params, tokens_BRS, fork(cache, prefix_length_BR))
    rows = [
        [*RICH.context, *tokens_BT[b, : position_BR[b, r]], *np.asarray(tokens_BRS)[b, r]]
        for b in range(2) for r in range(6)
    ]  # fmt: skip
    unshared = np.asarray(apply(model, params, padded(rows))[0]).reshape(2, 6, -1, model.config.vocab_size)
    for b in range(2):
        for r in range(6):
            start = int(prefix_length_BR[b, r])
            assert relative_error(shared[b, r], unshared[b, r, start : start + tokens_BRS.shape[2]]) < TOLERANCE


def test_prefix_compute_is_shared():
    """The learner's pass multiplies the document's tokens once, however many branches read it."""
    model, params, tokens = tiny(), rough_params(tiny()), jnp.zeros((1, 512), jnp.int32)

    def flops(branches):
        def loss(params):
            _, cache = model.hidden(params, tokens)
            branch = jnp.zeros((1, branches, 4), jnp.int32)
            hidden, _ = model.hidden(params, branch, fork(cache, jnp.full((1, branches), 512)))
            return hidden.sum()

        return jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"]

    one, sixteen = flops(1), flops(16)
    assert sixteen < 2 * one  # repeated prefixes would take sixteen times as much
