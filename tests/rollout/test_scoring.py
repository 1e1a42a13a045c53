# SPDX-License-Identifier: Apache-2.0
"""Branch layout by hand and against a plain list, and scores against whole unshared sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FAMILIES, PLAIN, RICH, apply, rough_params, tiny

from rlp_jax.data.template import TemplateTokens
from rlp_jax.rollout import scoring

pytestmark = pytest.mark.usefixtures("quick_compiles")

TAGS = TemplateTokens(plain=(), context=(), open=(91, 92), close=(93, 94))


def laid_out(thoughts, stopped, targets, template, L):
    thought_BRL = np.zeros((1, len(thoughts), L), np.int32)
    for r, thought in enumerate(thoughts):
        thought_BRL[0, r, : len(thought)] = thought
    length_BR = jnp.asarray([[len(thought) for thought in thoughts]])
    given = scoring.Thoughts(jnp.asarray(thought_BRL), length_BR, jnp.asarray([stopped]))
    tokens_BRS, index_BRH = scoring.lay_out(given, jnp.asarray([targets]), template)
    return np.asarray(tokens_BRS)[0].tolist(), np.asarray(index_BRH)[0].tolist()


def test_layout_by_hand():
    tokens, index = laid_out(
        [[5, 6, 7, 8], [5, 6], [5, 6, 93, 94], [93, 94], []],
        [False, False, True, True, False],
        [[1], [1], [1], [1], [1]],
        TAGS,
        L=4,
    )
    assert tokens == [
        [91, 92, 5, 6, 7, 8, 93, 94],  # capped: closing tag appended; its last token predicts the target
        [91, 92, 5, 6, 93, 94, 0, 0],
        [91, 92, 5, 6, 93, 94, 0, 0],  # stopped: the tag is the thought's own
        [91, 92, 93, 94, 0, 0, 0, 0],  # nothing but the tag
        [91, 92, 93, 94, 0, 0, 0, 0],  # the empty thought looks the same
    ]
    assert index == [[7], [5], [5], [3], [3]]


def test_layout_with_a_horizon_by_hand():
    template = TAGS._replace(open=(91,), close=(93,))
    tokens, index = laid_out([[5, 6, 7], [5, 93], [5], []], [False, True, False, False], [[1, 2, 3]] * 4, template, L=3)
    assert tokens == [  # the last target is predicted, never read
        [91, 5, 6, 7, 93, 1, 2],
        [91, 5, 93, 1, 2, 0, 0],
        [91, 5, 93, 1, 2, 0, 0],
        [91, 93, 1, 2, 0, 0, 0],
    ]
    assert index == [[4, 5, 6], [2, 3, 4], [2, 3, 4], [1, 2, 3]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_layout_against_lists(data):
    n_open, n_close, H, L, R = (data.draw(st.integers(1, 3)) for _ in range(5))
    L += 2
    template = TAGS._replace(open=tuple(range(91, 91 + n_open)), close=tuple(range(81, 81 + n_close)))
    thoughts, stopped, targets = [], [], []
    for _ in range(R):
        thought = data.draw(st.lists(st.integers(1, 60), max_size=L))
        ends = data.draw(st.booleans()) and len(thought) >= n_close
        thoughts.append([*thought[: len(thought) - n_close], *template.close] if ends else thought)
        stopped.append(ends)
        targets.append(data.draw(st.lists(st.integers(1, 60), min_size=H, max_size=H)))
    tokens, index = laid_out(thoughts, stopped, targets, template, L)
    for r in range(R):
        asked = [*template.open, *thoughts[r], *(() if stopped[r] else template.close)]
        wanted = asked + targets[r][:-1]
        assert tokens[r] == wanted + [0] * (n_open + L + n_close + H - 1 - len(wanted))
        assert index[r] == [len(asked) - 1 + h for h in range(H)]


def test_context_and_targets_by_hand():
    tokens_BT = jnp.array([[5, 6, 7, 8], [1, 2, 3, 4]])
    np.testing.assert_array_equal(scoring.with_context(tokens_BT, (9, 10)), [[9, 10, 5, 6, 7, 8], [9, 10, 1, 2, 3, 4]])
    np.testing.assert_array_equal(scoring.with_context(tokens_BT, ()), tokens_BT)
    # at the document's edge the index is held back: such positions are invalid, reading them is safe
    np.testing.assert_array_equal(
        scoring.targets(tokens_BT, jnp.array([[0, 2], [1, 3]]), 2), [[[5, 6], [7, 8]], [[2, 3], [4, 4]]]
    )


def logprob_at(model, params, sequence, at):
    """log_softmax [V] in float64 of what predicts place `at` of a plain sequence."""
    logits = np.asarray(apply(model, params, np.asarray([sequence], np.int32))[0][0, at - 1], np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("template", [PLAIN, RICH, RICH._replace(plain=(3, 9))], ids=["no BOS", "BOS", "two"])
def test_baseline_reads_the_plain_document(family, template):
    model, H = tiny(family), 2
    params = rough_params(model)
    tokens_BT = np.random.default_rng(0).integers(8, 50, (2, 7)).astype(np.int32)
    position_BK = jnp.array([[template.first, 3], [1, 5]])

    @jax.jit
    def read(params):
        plain = scoring.read_plain(model, params, tokens_BT, template)
        target_BKH = scoring.targets(tokens_BT, position_BK, H)
        return (
            scoring.baseline_logprob(model, params, plain, position_BK, target_BKH),
            scoring.baseline_entropy(model, params, plain),
        )

    (logprob_BKH, correct_BKH), entropy_BT = read(params)
    assert entropy_BT.shape == (2, 7)
    shift = len(template.plain)
    for b in range(2):
        sequence = [*template.plain, *tokens_BT[b].tolist()]
        for k in range(2):
            for h in range(H):
                t = int(position_BK[b, k]) + h
                exact_V = logprob_at(model, params, sequence, shift + t)
                np.testing.assert_allclose(logprob_BKH[b, k, h], exact_V[tokens_BT[b, t]], rtol=1e-4, atol=1e-5)
                assert correct_BKH[b, k, h] == (exact_V.argmax() == tokens_BT[b, t])
        for t in range(template.first, 7):
            exact_V = logprob_at(model, params, sequence, shift + t)
            np.testing.assert_allclose(entropy_BT[b, t], -(np.exp(exact_V) * exact_V).sum(), rtol=1e-4, atol=1e-5)


def test_scores_of_one_branch_by_a_plain_sequence():
    model, temperature = tiny("qwen3"), 0.5
    params = rough_params(model)
    document = np.array([[20, 21, 22, 23, 24]], np.int32)
    thought = [30, 31, 32]
    sequence = [*RICH.context, 20, 21, *RICH.open, *thought, *RICH.close, 22, 23]
    start = len(RICH.context) + 2 + len(RICH.open)
    _, cache = apply(model, params, scoring.with_context(jnp.asarray(document), RICH.context))
    thoughts = scoring.Thoughts(jnp.array([[[*thought, 0]]]), jnp.array([[3]]), jnp.array([[False]]))
    scored = scoring.score_branches(
        model, params, cache, jnp.array([[len(RICH.context) + 2]]), thoughts, jnp.array([[[22, 23]]]), RICH, temperature
    )
    logits = np.asarray(apply(model, params, np.asarray([sequence], np.int32))[0][0], np.float64) / temperature
    cold = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for u, token in enumerate(thought):
        np.testing.assert_allclose(scored.logprob_BRL[0, 0, u], cold[start + u - 1, token], rtol=1e-4, atol=1e-5)
        entropy = -(np.exp(cold[start + u - 1]) * cold[start + u - 1]).sum()
        np.testing.assert_allclose(scored.entropy_BRL[0, 0, u], entropy, rtol=1e-4)
    for h, token in enumerate((22, 23)):  # at temperature 1
        exact_V = logprob_at(model, params, sequence, len(sequence) - 2 + h)
        np.testing.assert_allclose(scored.target_logprob_BRH[0, 0, h], exact_V[token], rtol=1e-4, atol=1e-5)
        assert scored.target_correct_BRH[0, 0, h] == (exact_V.argmax() == token)
    best = jnp.array([[[int(logprob_at(model, params, sequence, len(sequence) - 2).argmax())]]])
    scored = scoring.score_branches(
        model, params, cache, jnp.array([[len(RICH.context) + 2]]), thoughts, best, RICH, temperature
    )
    assert scored.target_correct_BRH.shape == (1, 1, 1) and scored.target_correct_BRH.all()
