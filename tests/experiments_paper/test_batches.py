# SPDX-License-Identifier: Apache-2.0
"""What the study's bases read: branches are thinking documents, weighted to the mix, and the loss counts them so."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tiny_base
from experiments.paper import batches, domains, pretrain
from experiments.paper.domains import CORPORA, TOKENIZER
from rlp_jax.models.transformer import LanguageModel

PAD = TOKENIZER.pad_id
SMALL = dataclasses.replace(pretrain.DECODER, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24)
SMALL_HYBRID = dataclasses.replace(
    pretrain.HYBRID, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
    hybrid=dataclasses.replace(pretrain.HYBRID.hybrid, heads=2, head_dim=8, state_size=8),
)  # fmt: skip


def batch(long=False, **arguments) -> dict:
    return batches.batch(np.random.default_rng(3), list(CORPORA) * 3, long, **arguments)


@pytest.mark.parametrize("long", [False, True])
def test_branches_follow_their_places(long):
    data = batch(long)
    assert data["tokens_BT"].shape[1] == (domains.LONG_DOCUMENT_TOKENS if long else domains.DOCUMENT_TOKENS)
    seen = set()
    for b, r in np.argwhere(data["weight_BRS"][..., 0] > 0):
        branch = [int(token) for token in data["branch_BRS"][b, r] if token != PAD]
        stop = data["prefix_BR"][b, r]
        following = data["context_BT"][b, stop : stop + 2].tolist()
        close = branch.index(batches.CLOSE)
        problem, thought = data["problem_BR"][b, r], TOKENIZER.decode(branch[1:close])
        assert branch[0] == batches.OPEN and close + 1 <= domains.THOUGHT_TOKENS + 1
        assert data["answer_BR"][b, r] == following[0]
        if problem is None:
            assert data["corpus_B"][b] in domains.GENERAL and branch[close + 1 :] == following[:1]
        else:
            assert branch[close + 1 :] == following == TOKENIZER.encode(f"{problem.answer} .")
            told = TOKENIZER.decode(data["context_BT"][b, :stop].tolist())
            assert told.startswith(domains.INSTRUCTION) and told.endswith(problem.question)
            if data["kind_BR"][b, r] in ("right", "wrong"):
                chain = getattr(problem, data["kind_BR"][b, r])
                states = TOKENIZER.decode(data["branch_BRS"][b, r][data["state_BRS"][b, r]].tolist()).split()
                assert thought == chain.words() and states == list(chain.states[1:])
        seen.add((data["corpus_B"][b], problem is None))
    assert {(corpus, False) for corpus in domains.BENCHMARKS} <= seen
    assert {(corpus, True) for corpus in domains.GENERAL} <= seen


def test_weights_are_the_shares_of_the_mix():
    data = batch(ordinary=False)
    weight_BR = data["weight_BRS"][..., 0]
    assert set(data["kind_BR"][weight_BR > 0]) <= set(domains.THOUGHT_MIX)
    for kind in ("right", "wrong"):
        np.testing.assert_allclose(weight_BR[data["kind_BR"] == kind], domains.THOUGHT_MIX[kind])
    np.testing.assert_allclose(weight_BR.reshape(18, batches.PLACES, -1).sum(-1), data["stop_BK"] > 0, atol=1e-6)
    close = (data["branch_BRS"] == batches.CLOSE).argmax(-1)
    relative = data["weight_BRS"] / np.maximum(weight_BR[..., None], 1e-9)
    for s in range(batches.BRANCH_TOKENS):
        real = data["branch_BRS"][..., s] != PAD
        counts = (close + 1 == s) | data["state_BRS"][..., s]
        expected = np.where(counts, batches.STATE_WEIGHT, 1)
        np.testing.assert_allclose(relative[..., s][real], expected[real], rtol=1e-6)


def test_a_batch_is_a_function_of_its_number():
    first, again, other, later = (batches.training_batch(0, k, 12) for k in (0, 0, 1, batches.LONG_EVERY - 1))
    for name, value in batches.arrays(first).items():
        np.testing.assert_array_equal(value, batches.arrays(again)[name])
    assert (first["tokens_BT"] != other["tokens_BT"]).any()
    assert later["tokens_BT"].shape == (4, domains.LONG_DOCUMENT_TOKENS)
    counts = Counter(batches.training_batch(0, 0, 18)["corpus_B"].tolist())
    assert counts == batches.MIX and set(counts) == set(CORPORA)


@pytest.mark.parametrize("config", [SMALL, SMALL_HYBRID], ids=["decoder", "hybrid"])
def test_branches_are_thinking_documents_read_alone(config):
    model = LanguageModel(config)
    params, data = tiny_base.first_params(model, 0), batch()
    logits = jax.jit(lambda p, d: tiny_base.branch_logits(model, p, d))(params, batches.arrays(data))
    b, r = np.argwhere(data["weight_BRS"][..., 0] > 0)[-1]
    stop, branch = data["prefix_BR"][b, r], data["branch_BRS"][b, r][:-1]
    alone, _ = model.apply(params, jnp.concatenate([data["context_BT"][b, :stop], branch])[None])
    real = (branch != PAD).sum()
    np.testing.assert_allclose(logits[b, r, :real], alone[0, stop : stop + real], atol=2e-4)


def test_the_loss_weighs_sequences():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    tokens = jnp.array([[1, 2, 3, 4], [1, 2, PAD, PAD]])
    logprob = jax.nn.log_softmax(logits)
    first, second = -(logprob[0, 0, 2] + logprob[0, 1, 3] + logprob[0, 2, 4]), -logprob[1, 0, 2]
    total, count = tiny_base.cross_entropy(logits, tokens)
    np.testing.assert_allclose([total, count], [first + second, 4], rtol=1e-5)
    total, count = tiny_base.cross_entropy(logits, tokens, jnp.array([[9, 1, 1, 1], [9, 3.0, 3, 3]]))
    np.testing.assert_allclose([total, count], [first + 3 * second, 6], rtol=1e-5)
