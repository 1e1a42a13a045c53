# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H: how its pattern is cut, and that forked and continued it gives what separate sequences give."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import RICH, Branch, apply, padded, relative_error, rough_params, unshared_scores

from rlp_jax.models.cache import fork, unstack_cache
from rlp_jax.models.hybrid import segments
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import unstack_layers
from rlp_jax.rollout import scoring

pytestmark = pytest.mark.usefixtures("quick_compiles")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
B, T, S = 2, 11, 6
START_BR = np.array([[3, 3, 7, 5], [11, 0, 8, 8]])  # several positions, some shared; nothing and the whole document
STOP_BK = np.array([[3, 7, 5], [0, 11, 8]])


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 50, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def prefill(model, params, document, stop_BK):
    return model.apply(params, document, stops_BK=stop_BK)[1]


# ------------------------------------------------------------------------------------------------------ segments


def test_segments_of_published_models():
    def traced(name):
        cut = segments(CONFIGS[name].hybrid.pattern)
        assert "".join(unit * repeats for unit, repeats in cut) == CONFIGS[name].hybrid.pattern
        return sum(len(unit) for unit, _ in cut)

    assert segments(CONFIGS["nemotron-nano-12b-v2"].hybrid.pattern) == (("M-M-M-M*-", 6), ("M-", 4))
    assert traced("nemotron-nano-12b-v2") == 11 and traced("nemotron-h-8b") == 13
    assert traced("nemotron-nano-9b-v2") == 19  # of 56: it was pruned, which left less that repeats


def test_segments_trace_as_little_as_possible():
    def least(pattern):
        if not pattern:
            return 0
        options = []
        for unit, repeats in itertools.product(range(1, len(pattern) + 1), repeat=2):
            if pattern.startswith(pattern[:unit] * repeats) and unit * repeats <= len(pattern):
                options.append(unit + least(pattern[unit * repeats :]))
        return min(options)

    for letters in itertools.product("M*-", repeat=6):
        pattern = "".join(letters)
        cut = segments(pattern)
        assert "".join(unit * repeats for unit, repeats in cut) == pattern
        assert sum(len(unit) for unit, _ in cut) == least(pattern)


def test_what_is_traced_does_not_grow_with_repeats():
    def equations(repeats):
        model = hybrid("M*-" * repeats + "M-")
        shapes = jax.eval_shape(model.init, jax.random.key(0))

        def loss(params):
            cache = model.hidden(params, jnp.zeros((1, 9), jnp.int32), stops_BK=jnp.array([[4]]))[1]
            branch = jnp.zeros((1, 2, 3), jnp.int32)
            return model.hidden(params, branch, fork(cache, jnp.full((1, 2), 4)))[0].sum()

        return count(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr)

    def count(thing):  # equations of a jaxpr and of those inside it, however they are held
        if isinstance(thing, list | tuple):
            return sum(map(count, thing))
        jaxpr = getattr(thing, "jaxpr", thing)
        return sum(1 + count(list(equation.params.values())) for equation in getattr(jaxpr, "eqns", ()))

    assert equations(2) == equations(6) > 100


# ------------------------------------------------------------------------------------------------- one sequence


def test_the_parameter_tree():
    shapes = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(hybrid().init, jax.random.key(0)))
    mamba = {
        "norm": {"scale": (16,)},
        "mixer": {
            "in_proj": {"kernel": (16, 72)}, "conv": {"kernel": (4, 44), "bias": (44,)}, "A_log": (4,), "D": (4,),
            "dt_bias": (4,), "gate_norm": {"scale": (24,)}, "out_proj": {"kernel": (24, 16)},
        },
    }  # fmt: skip
    attention = {
        "norm": {"scale": (16,)},
        "mixer": {
            "q": {"kernel": (16, 4, 6)}, "k": {"kernel": (16, 2, 6)}, "v": {"kernel": (16, 2, 6)},
            "o": {"kernel": (4, 6, 16)},
        },
    }  # fmt: skip
    mlp = {"norm": {"scale": (16,)}, "mixer": {"up": {"kernel": (16, 20)}, "down": {"kernel": (20, 16)}}}

    def stacked(tree, repeats):
        return jax.tree.map(lambda shape: (repeats, *shape), tree, is_leaf=lambda x: isinstance(x, tuple))

    assert segments(hybrid().config.hybrid.pattern) == (("M", 1), ("*-M", 2))
    assert shapes == {
        "embed": {"embedding": (50, 16)},
        "segments_0": stacked({"mamba_0": mamba}, 1),
        "segments_1": stacked({"attention_0": attention, "mlp_1": mlp, "mamba_2": mamba}, 2),
        "final_norm": {"scale": (16,)},
        "head": {"kernel": (16, 50)},
    }


@pytest.mark.parametrize("pattern", ["M*-M*-M", "MM", "*-"])
def test_causality_by_gradient(pattern):
    model = hybrid(pattern)
    params = rough_params(model)
    sequence = jnp.arange(T)[None]  # each token once, so an embedding row is a place of the sequence

    def read(embedding_TD):
        embedding = params["embed"]["embedding"].at[:T].set(embedding_TD)
        logits, _ = model.apply(params | {"embed": {"embedding": embedding}}, sequence)
        return jnp.tanh(logits[0]).sum(-1)

    jacobian_TTD = jax.jit(jax.jacrev(read))(params["embed"]["embedding"][:T])
    size_TT = np.abs(jacobian_TTD).max(-1)
    assert not np.triu(size_TT, 1).any()
    assert (size_TT[np.tril_indices(T)] > 1e-7).all()


def test_bfloat16_compute():
    model, half = hybrid(), hybrid(compute_dtype="bfloat16")
    params, document = rough_params(model), tokens(4, 12)
    exact, (logits, cache) = apply(model, params, document)[0], apply(half, params, document)
    state = cache.states["segments_0/mamba_0"]
    assert logits.dtype == state.ssm.dtype == jnp.float32 and state.conv.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((np.asarray(logits) - exact) ** 2)) / np.std(exact)
    assert 1e-4 < error < 0.06  # seven layers of a few roundings to 8 bits each


# --------------------------------------------------------------------------------------------------------- forks


@functools.cache
def separate(model):
    """Parameters, documents, continuations, and the logits of each branch as a sequence of its own."""
    params, document, new = rough_params(model), tokens(B, T), tokens(B, 4, S, seed=1)
    rows = [[*document[b, : START_BR[b, r]], *new[b, r]] for b in range(B) for r in range(4)]
    logits = np.asarray(apply(model, params, padded(rows))[0]).reshape(B, 4, -1, 50)
    wanted = [[logits[b, r, START_BR[b, r] :][:S] for r in range(4)] for b in range(B)]
    return params, document, new, np.array(wanted)


@pytest.mark.parametrize("pattern", ["M*-M*-M", "MM-", "*-*"])
def test_branches_in_one_call(pattern):
    model = hybrid(pattern)
    params, document, new, wanted = separate(model)
    prefix = prefill(model, params, document, STOP_BK)
    branches = fork(prefix, jnp.asarray(START_BR))
    # Nothing is copied: neither keys nor states.
    kept, held = ((cache.prefix_k, cache.prefix_v, cache.states) for cache in (branches, prefix))
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(held), strict=True))
    logits, after = apply(model, params, new, branches)
    np.testing.assert_allclose(logits, wanted, **CLOSE)
    assert jax.tree.structure(after) == jax.tree.structure(branches)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("pieces", [(1, 1, 3, 1), (4, 2)])
def test_branches_in_pieces(pieces, unrolled):
    model = hybrid()
    params, document, new, wanted = separate(model)
    cache = prefill(model, params, document, STOP_BK)
    if unrolled:
        model, params, cache = model.unrolled(), unstack_layers(params), unstack_cache(cache)
    cache = fork(cache, jnp.asarray(START_BR), S)
    for start, size in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        logits, after = apply(model, params, new[:, :, start : start + size], cache)
        np.testing.assert_allclose(logits, wanted[:, :, start : start + size], **CLOSE)
        # A decoding loop carries it.
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)
        cache = after
    assert cache.written == S


def test_without_stops_branches_start_at_the_end():
    model = hybrid()
    params, document, new, _ = separate(model)
    whole, _ = apply(model, params, np.concatenate([document, new[:, 0]], 1))
    _, cache = apply(model, params, document)
    logits, _ = apply(model, params, new[:, :1], fork(cache, jnp.full((B, 1), T)))
    np.testing.assert_allclose(logits[:, 0], whole[:, T:], **CLOSE)


def test_a_branch_that_starts_at_no_stop_does_not_go_unnoticed():
    model = hybrid()
    params, document, new, wanted = separate(model)
    prefix = prefill(model, params, document, STOP_BK)
    start_BR = START_BR.copy()
    start_BR[1, 2] = 9
    for capacity in (0, S):
        with pytest.raises(ValueError, match=r"branch 2 of document 1 starts after 9 tokens.*\[0, 11, 8\]"):
            fork(prefix, start_BR, capacity)
        forked = jax.jit(lambda start_BR, c=capacity: model.apply(params, new, fork(prefix, start_BR, c))[0])
        logits = np.array(forked(jnp.asarray(start_BR)))
        assert np.isnan(logits[1, 2]).all()
        logits[1, 2] = wanted[1, 2]
        np.testing.assert_allclose(logits, wanted, **CLOSE)


def test_padding_and_what_follows_a_stop_have_no_effect():
    model = hybrid()
    params, document, new, wanted = separate(model)
    changed = document.copy()
    changed[0, 7:] = (changed[0, 7:] + 5) % 50
    cache = prefill(model, params, np.pad(changed, ((0, 0), (0, 3))), STOP_BK)  # and chunks fall elsewhere
    logits, _ = apply(model, params, new, fork(cache, jnp.asarray(START_BR)))
    np.testing.assert_allclose(logits, wanted, **CLOSE)


# -------------------------------------------------------------------------------------- thoughts, and gradients


@pytest.mark.parametrize("remat", ["none", "elementwise", "layer"])
def test_logprobs_and_gradients_of_shared_and_separate_sequences(remat):
    """K positions of a document, thoughts of different lengths, closing tags sampled and appended."""
    model, L, H, temperature = hybrid(remat=remat), 5, 2, 0.7
    rng = np.random.default_rng(0)
    document, position_BR = tokens(B, 9, seed=3), np.array([[3, 3, 7, 7], [0, 0, 6, 6]])
    length_BR, stopped_BR = np.array([[5, 0, 3, 2], [1, 4, 5, 2]]), np.array([[0, 0, 1, 1], [0, 1, 0, 1]], bool)
    thought_BRL = np.where(np.arange(L) < length_BR[..., None], rng.integers(8, 50, (B, 4, L)), 0).astype(np.int32)
    for b, r in zip(*np.nonzero(stopped_BR), strict=True):
        thought_BRL[b, r, length_BR[b, r] - 2 : length_BR[b, r]] = RICH.close
    thoughts = scoring.Thoughts(*map(jnp.asarray, (thought_BRL, length_BR, stopped_BR)))
    target_BRH = np.asarray(scoring.targets(document, jnp.asarray(position_BR), H))
    weight_BRL = rng.normal(size=(B, 4, L)) * (np.arange(L) < length_BR[..., None])
    weight_BRH = rng.normal(size=target_BRH.shape)

    def shared(params):
        prefix_BR = jnp.asarray(position_BR + len(RICH.context))
        context_BT = scoring.with_context(jnp.asarray(document), RICH.context)
        _, cache = model.hidden(params, context_BT, stops_BK=prefix_BR[:, ::2])
        scored = scoring.score_branches(model, params, cache, prefix_BR, thoughts, target_BRH, RICH, temperature)
        return scored.logprob_BRL, scored.target_logprob_BRH

    branches = [
        Branch(
            RICH, document[b], position_BR[b, r], thought_BRL[b, r, : length_BR[b, r]], stopped_BR[b, r],
            target_BRH[b, r],
        )
        for b, r in np.ndindex(B, 4)
    ]  # fmt: skip

    def unshared(params):
        scored = unshared_scores(model, params, branches, temperature)
        thought = [jnp.pad(logprob, (0, L - len(logprob))) for logprob, _ in scored]
        return jnp.stack(thought).reshape(B, 4, L), jnp.stack([target for _, target in scored]).reshape(B, 4, H)

    def value_and_grad(score):
        def combined(params):
            logprob_BRL, target_BRH = score(params)
            return jnp.sum(weight_BRL * logprob_BRL) + jnp.sum(weight_BRH * target_BRH), (logprob_BRL, target_BRH)

        return jax.jit(jax.grad(combined, has_aux=True))(rough_params(model))

    (grads, (thought, target)), (exact_grads, (exact_thought, exact_target)) = map(value_and_grad, (shared, unshared))
    inside_BRL = np.arange(L) < length_BR[..., None]
    assert relative_error(np.where(inside_BRL, thought, 0), exact_thought) < 1e-5
    assert relative_error(target, exact_target) < 1e-5
    assert min(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(exact_grads)) > 1e-3
    assert relative_error(grads, exact_grads) < 1e-4  # the worst leaf


def test_prefix_compute_is_shared():
    """The learner's pass runs over the document once, however many branches read it from two places."""
    model = hybrid()
    params, document, stop_BK = rough_params(model), jnp.zeros((1, 256), jnp.int32), jnp.array([[100, 256]])

    def flops(branches):
        def loss(params):
            _, cache = model.hidden(params, document, stops_BK=stop_BK)
            branch = jnp.zeros((1, branches, 4), jnp.int32)
            hidden, _ = model.hidden(params, branch, fork(cache, jnp.repeat(stop_BK, branches // 2, 1)))
            return hidden.sum()

        return jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"]

    assert flops(16) < 2 * flops(2)  # repeated prefixes would take eight times as much
