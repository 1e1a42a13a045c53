# SPDX-License-Identifier: Apache-2.0
"""Evaluation and its controls by brute force: near temperature 0 a thought is the most likely continuation, so every
figure can be worked out with whole, plain sequences."""

import dataclasses

import jax
import numpy as np
import pytest
from reference import PLAIN, RICH, Branch, apply, rough_params, tiny, unshared_scores

from rlp_jax.config import Config, EvalConfig, RLPConfig
from rlp_jax.evals.likelihood import evaluate, interval, summarise

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = tiny(n_layers=1)
PARAMS, BASELINE = rough_params(MODEL), rough_params(MODEL, 1)
H, L = 2, 4
CONFIG = Config(
    rlp=RLPConfig(horizon=H, thought_tokens=L, temperature=1e-4, position_mode="span"),
    eval=EvalConfig(positions=1, group_size=2),
)
WARM = dataclasses.replace(CONFIG, rlp=dataclasses.replace(CONFIG.rlp, temperature=0.8))
POSITIONS = [4, 2, 7]


def batch_of(rows=(0, 1, 2), seed=0):
    """Three documents with one possible position each; `rows` may repeat them, as a batch that is filled up does."""
    rows = np.asarray(rows)
    tokens_BT = np.random.default_rng(seed).integers(8, 50, (3, 10)).astype(np.int32)
    span_BT = np.arange(10) == np.array(POSITIONS)[:, None]
    return {
        "tokens_BT": tokens_BT[rows],
        "length_B": np.array([9, 10, 10], np.int32)[rows],
        "span_BT": span_BT[rows],
        "document_B": np.array([2**40 + 5, 77, 2**33], np.int64)[rows],
    }


def run(batches, config=CONFIG, template=RICH, key=0):
    return evaluate(MODEL, PARAMS, BASELINE, batches, template, config, jax.random.key(key))


def greedy_thought(template, document, position):
    head, thought = [*template.context, *document[:position], *template.open], []
    while len(thought) < L and tuple(thought[-len(template.close) :]) != template.close:
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(head) + len(thought)] = head + thought
        thought.append(int(np.argmax(apply(MODEL, PARAMS, padded)[0][0, len(head) + len(thought) - 1])))
    return thought, tuple(thought[-len(template.close) :]) == template.close


def brute_force(template, others):
    """Per-document cross-entropies; `others[b]` is whose thought the shuffled control gives to document b."""
    tokens_BT = batch_of()["tokens_BT"].tolist()
    targets = [tokens_BT[b][t : t + H] for b, t in enumerate(POSITIONS)]
    thoughts = [greedy_thought(template, tokens_BT[b], t) for b, t in enumerate(POSITIONS)]

    def cross_entropy(given):
        rows = [
            Branch(template, tokens_BT[b], t, *given[b], targets[b]) for b, t in enumerate(POSITIONS)
        ]  # fmt: skip
        return np.array([-float(target.mean()) for _, target in unshared_scores(MODEL, PARAMS, rows, 1.0)])

    def plain(params):
        out = []
        for b, t in enumerate(POSITIONS):
            sequence = np.array([[*template.plain, *tokens_BT[b]]], np.int32)
            logprob = jax.nn.log_softmax(apply(MODEL, params, sequence)[0][0])
            at = len(template.plain) + t - 1
            out.append(-np.mean([float(logprob[at + h, targets[b][h]]) for h in range(H)]))
        return np.array(out)

    return {
        "think": cross_entropy(thoughts),
        "empty": cross_entropy([([], False)] * 3),
        "shuffled": cross_entropy([thoughts[b] for b in others]),
        "no_think": plain(BASELINE),
        "no_think_policy": plain(PARAMS),
    }, thoughts


@pytest.mark.parametrize("template", [PLAIN, RICH], ids=["no BOS", "BOS"])
def test_every_figure_by_brute_force(template):
    wanted, thoughts = brute_force(template, [2, 0, 1])
    result = run([batch_of()], template=template)
    assert len({tuple(thought) for thought, _ in thoughts}) == 3  # or shuffling would show nothing
    for name, ce_B in wanted.items():
        np.testing.assert_allclose(result[f"ce_{name}"], ce_B.mean(), rtol=1e-4, err_msg=name)
    for name in ("think", "empty", "shuffled"):
        gain_B = wanted["no_think"] - wanted[name]
        label = "gain" if name == "think" else f"gain_{name}"
        np.testing.assert_allclose(result[label], gain_B.mean(), rtol=1e-4, atol=1e-4)
        half = 1.96 * np.sqrt(gain_B.var(ddof=1) / 3)
        np.testing.assert_allclose(
            result[f"{label}_ci95"], [gain_B.mean() - half, gain_B.mean() + half], rtol=1e-3, atol=1e-3
        )
    np.testing.assert_allclose(result["thought_len"], np.mean([len(thought) for thought, _ in thoughts]))
    np.testing.assert_allclose(result["stop_rate"], np.mean([stopped for _, stopped in thoughts]))
    assert result["documents"] == 3


def test_a_filled_up_batch_counts_each_document_once_and_shuffles_in_another_one():
    """Row 0 again at the end: the row above row 0 is then its own copy, whose thought would be no control."""
    wanted, _ = brute_force(RICH, [2, 0, 1])
    result = run([batch_of((0, 1, 2, 0)) | {"weight_B": np.array([1.0, 1.0, 1.0, 0.0], np.float32)}])
    assert result["documents"] == 3
    for name, ce_B in wanted.items():
        np.testing.assert_allclose(result[f"ce_{name}"], ce_B.mean(), rtol=1e-4, err_msg=name)


def test_identities_keys_and_batches():
    first, same, other = (run([batch_of()], WARM, key=key) for key in (0, 0, 1))
    assert first == same and first["ce_think"] != other["ce_think"]
    assert first["ce_empty"] == other["ce_empty"] and first["ce_no_think"] == other["ce_no_think"]
    for name in ("think", "empty", "shuffled"):
        label = "gain" if name == "think" else f"gain_{name}"
        assert first[label] == pytest.approx(first["ce_no_think"] - first[f"ce_{name}"], abs=1e-6)
    assert first["gain_over_empty"] == pytest.approx(first["gain"] - first["gain_empty"], abs=1e-6)
    assert first["gain_over_shuffled"] == pytest.approx(first["gain"] - first["gain_shuffled"], abs=1e-6)
    # A document's own figures do not depend on its batch.
    apart = run([batch_of((0, 1)), batch_of((2, 0)) | {"weight_B": np.array([1.0, 0.0])}], WARM)
    assert apart["documents"] == 3
    for name in ("ce_think", "ce_empty", "ce_no_think", "acc_think", "thought_len", "stop_rate"):
        assert apart[name] == pytest.approx(first[name], rel=1e-5), name


def test_documents_without_a_position_do_not_count():
    batch = batch_of()
    batch["span_BT"] = batch["span_BT"] & (np.arange(3) != 1)[:, None]
    wanted, _ = brute_force(RICH, [2, 0, 1])
    result = run([batch])
    assert result["documents"] == 2
    np.testing.assert_allclose(result["ce_think"], wanted["think"][[0, 2]].mean(), rtol=1e-4)


def test_refusals():
    for batches in ([batch_of((1,))], [batch_of((1, 1))]):
        with pytest.raises(ValueError, match="at least 2"):
            run(batches)
    nowhere = batch_of() | {"weight_B": np.zeros(3)}
    for batches in ([nowhere], []):
        with pytest.raises(ValueError, match="no held-out document"):
            run(batches)


def test_interval_by_hand():
    # mean 3, squared distances 4 + 0 + 0 + 4, so the standard error is sqrt(8/3) / sqrt(4) = 0.816497; times 1.96
    assert interval(np.array([1.0, 3.0, 3.0, 5.0])) == pytest.approx([3 - 1.600333, 3 + 1.600333], abs=1e-6)
    assert interval(np.array([1.0])) is None


def test_summary_by_hand():
    columns = {
        "ce_no_think": np.array([3.0, 5.0]), "ce_think": np.array([1.0, 4.0]), "ce_empty": np.array([4.0, 4.0]),
        "ce_shuffled": np.array([3.0, 6.0]), "acc_think": np.array([1.0, 0.5]),
    }  # fmt: skip
    result = summarise(columns)
    # gains (2, 1), (-1, 1), (0, -1); paired differences empty - think (3, 0), shuffled - think (2, 2)
    assert (result["gain"], result["gain_empty"], result["gain_shuffled"]) == (1.5, 0.0, -0.5)
    assert (result["gain_over_empty"], result["gain_over_shuffled"]) == (1.5, 2.0)
    # of (2, 1): standard deviation sqrt(1/2), standard error 1/2
    assert result["gain_ci95"] == pytest.approx([1.5 - 0.98, 1.5 + 0.98])
    assert result["gain_over_shuffled_ci95"] == [2.0, 2.0]
    assert result["acc_think"] == 0.75 and result["documents"] == 2
