# SPDX-License-Identifier: Apache-2.0
"""Every number of a record on the quickstart's model, from whole plain sequences and log-softmax in float64."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import RICH, Branch, rough_params, unshared_scores
from tiny_run import hasty_compilation

from rlp_jax.checkpoints_io.load import load
from rlp_jax.config import ConfigError, SuiteConfig
from rlp_jax.data.pipeline import heldout_batches
from rlp_jax.data.template import template_tokens
from rlp_jax.evals import likelihood, where
from rlp_jax.rollout.scoring import Thoughts
from rlp_jax.settings import load_experiment
from rlp_jax.state import Purpose, step_key

ROOM = 80  # tokens of the longest plain sequence


def quiet(text):
    pass


class Case:
    """The quickstart with few positions; its policy is not its baseline."""

    def __init__(self):
        config = load_experiment("quickstart")
        data = dataclasses.replace(config.data, sources=("compose:64",), heldout_documents=6)
        rlp = dataclasses.replace(config.rlp, horizon=2)
        self.model, self.params, self.tokenizer = load("quickstart")
        self.baseline = jax.tree.map(lambda leaf: 1.02 * leaf, self.params)
        self.template = template_tokens(config.template, self.tokenizer)
        evaluation = dataclasses.replace(config.eval, batch_documents=4, documents=6)
        settings = SuiteConfig(positions=2, samples=3, seed=3, thought_tokens=12, temperature=0.9)
        self.config, self.documents = where.heldout_documents(
            dataclasses.replace(config, rlp=rlp, data=data, eval=evaluation), settings, self.tokenizer, None
        )
        self.key = step_key(3, 0, Purpose.EVALUATION)
        self.batches = heldout_batches(self.documents, 4, 6, 32, self.tokenizer.pad_id)

    def run(self, path, documents=None, say=quiet):
        return where.run_gain(
            self.model, self.params, self.baseline, self.tokenizer, self.template, self.config,
            self.documents if documents is None else documents, (), "weights", path, say,
        )  # fmt: skip

    def logprobs(self, params, sequence):
        """[len(sequence), V] in float64 from one forward of the sequence alone."""
        tokens = np.zeros((1, ROOM), np.int32)
        tokens[0, : len(sequence)] = sequence
        logits_SV = np.asarray(plain_logits(self.model, params, jnp.asarray(tokens))[0], np.float64)
        top_S1 = logits_SV.max(-1, keepdims=True)
        return (logits_SV - top_S1 - np.log(np.exp(logits_SV - top_S1).sum(-1, keepdims=True)))[: len(sequence)]

    def after(self, tokens, position, thought):
        """Cross-entropies [H] of the scored tokens after a thought, tags around it."""
        horizon = self.config.rlp.horizon
        target = [int(x) for x in tokens[position : position + horizon]]
        head = [*self.template.context, *tokens[:position], *self.template.open, *thought, *self.template.close]
        logprob_SV = self.logprobs(self.params, [*head, *target])
        return [-logprob_SV[len(head) - 1 + h, target[h]] for h in range(horizon)]

    def before(self, params, tokens, position):
        """Cross-entropies [H] of a plain document's scored tokens, and the prediction's entropies."""
        logprob_TV = self.logprobs(params, [int(x) for x in tokens])
        at = range(position - 1, position - 1 + self.config.rlp.horizon)
        entropy = [-(np.exp(logprob_TV[t]) * logprob_TV[t]).sum() for t in at]
        return [-logprob_TV[t, tokens[t + 1]] for t in at], entropy


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(model, params, tokens):
    return model.apply(params, tokens)[0]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Scored are answers, which thoughts quote, and the full stops behind them."""
    with hasty_compilation(tmp_path_factory.mktemp("cache")):
        yield Case()


@pytest.fixture(scope="module")
def rows(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("where") / "gain.jsonl"
    result = case.run(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["settings"]["rlp"]["horizon"] == case.config.rlp.horizon
    return path, lines[1:], result


def test_records_by_plain_sequences(case, rows):
    by_id = {document.id: document.tokens_T for document in case.documents}
    horizon, encode = case.config.rlp.horizon, case.tokenizer.encode
    assert len(rows[1]) == 12 and len({row["document"] for row in rows[1]}) == 6
    # Whose thoughts the shuffled control takes: the row above, in batches of 4 that the first documents fill up.
    ids = [document.id for document in case.documents]
    above = {ids[i]: ids[j] for i, j in ((0, 3), (1, 0), (2, 1), (3, 2), (4, 1), (5, 4))}
    of = {document: [row for row in rows[1] if row["document"] == document] for document in ids}
    edited = 0
    for row in rows[1]:
        tokens, t = by_id[row["document"]], row["position"]
        target = [case.tokenizer.decode([x]) for x in tokens[t : t + horizon]]
        assert [text.strip() for text in row["target"]] == target and row["tokens"] == len(tokens)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-5)
        plain, entropy = case.before(case.baseline, tokens, t)
        near(row["ce_no_think"], plain)
        near(row["entropy"], entropy)
        near(row["ce_no_think_policy"], case.before(case.params, tokens, t)[0])
        near(row["ce_empty"], case.after(tokens, t, []))
        own = [case.after(tokens, t, encode(thought)) for thought in row["thought"]]
        near(row["ce_think"], own)
        near(row["gain"], np.array(plain) - np.mean(own, 0))
        near(np.array(row["format"]) + row["generic"] + row["content"], row["gain"], atol=1e-6)
        other = of[above[row["document"]]][of[row["document"]].index(row)]["thought"]
        near(row["ce_shuffled"], [case.after(tokens, t, encode(thought)) for thought in other])
        assert row["quotes_shuffled"]["target"] == [target[0] in thought.split() for thought in other]
        for g, thought in enumerate(row["thought"]):
            words = thought.split()
            assert row["quotes"]["target"][g] == (target[0] in words)
            if target[0] not in words:
                assert row["ce_removed"][g] is None and row["ce_removed_other"][g] is None
                continue
            edited += 1
            near(row["ce_removed"][g], case.after(tokens, t, encode(taken_out(words, target))))
            if row["ce_removed_other"][g] is not None and len(words) == 2 and words.count(target[0]) == 1:
                near(row["ce_removed_other"][g], case.after(tokens, t, encode(target[0])))
    assert edited > 3


def taken_out(words, target):
    """The text without runs of the target."""
    left, i = [], 0
    while i < len(words):
        n = next((n for n in range(len(target), 0, -1) if words[i : i + n] == target[:n]), 0)
        left += [] if n else [words[i]]
        i += max(n, 1)
    return " ".join(left)


def test_it_is_the_held_out_evaluation(case, rows):
    wanted = likelihood.evaluate(
        case.model, case.params, case.baseline, case.batches, case.template, case.config, case.key
    )  # fmt: skip
    result = rows[2]
    names = {"gain": "gain", "gain_empty": "format", "gain_over_shuffled": "content", "documents": "documents"}
    names |= {name: name for name in ("thought_len", "stop_rate", *(key for key in wanted if key.startswith("ce_")))}
    names |= {f"{a}_ci95": f"{names[a]}_ci95" for a in ("gain", "gain_empty", "gain_over_shuffled")}
    for theirs, ours in names.items():
        np.testing.assert_allclose(result[ours], wanted[theirs], rtol=1e-5, atol=1e-6, err_msg=ours)
    assert result["gain"] == pytest.approx(result["format"] + result["generic"] + result["content"], abs=1e-12)
    assert result["scored_tokens"] == 12 * case.config.rlp.horizon
    assert sum(row["count"] for row in result["where"]["class"]) == result["scored_tokens"]


def test_other_tokens_taken_out_are_scored_likewise(case, rows):
    """What was removed is known from `probes`; how its thought is scored is not."""
    by_id, checked = {document.id: document.tokens_T for document in case.documents}, 0
    for row in rows[1]:
        tokens, t = by_id[row["document"]], row["position"]
        target = [case.tokenizer.decode([x]) for x in tokens[t : t + case.config.rlp.horizon]]
        for g, thought in enumerate(row["thought"]):
            if row["ce_removed_other"][g] is None:
                continue
            words = thought.split()
            places = where.probes.quoted_places(words, target)
            others = where.probes.other_places(len(words), places, (3, row["document"], t, g))
            left = " ".join(where.probes.without(words, others))
            wanted = case.after(tokens, t, case.tokenizer.encode(left))
            np.testing.assert_allclose(row["ce_removed_other"][g], wanted, rtol=1e-4, atol=3e-5)
            checked += 1
    assert checked > 3


def test_edited_thoughts_of_a_hybrid():
    """The second forward restarts recurrent layers where the thoughts stand, all positions and edits side by side."""
    model, rng, K, G, L, H = hybrid(), np.random.default_rng(0), 2, 2, 4, 2
    params = rough_params(model)
    tokens_BT = rng.integers(8, 50, (2, 10)).astype(np.int32)
    position_BK = np.array([[2, 6], [4, 7]], np.int32)
    target_BKH = np.array([[tokens_BT[b, t : t + H] for t in position_BK[b]] for b in range(2)])
    thought_BRL = rng.integers(8, 50, (2, 2 * K * G, L)).astype(np.int32)
    length_BR = rng.integers(0, L + 1, (2, 2 * K * G)).astype(np.int32)
    thoughts = Thoughts(thought_BRL, length_BR, np.zeros((2, 2 * K * G), bool))
    got_BRH = where._score(model, RICH, 1.0, G, params, tokens_BT, position_BK, target_BKH, thoughts)
    branches = [
        Branch(RICH, tokens_BT[b].tolist(), position_BK[b, r // G % K], thought_BRL[b, r, : length_BR[b, r]].tolist(),
               False, target_BKH[b, r // G % K])
        for b in range(2) for r in range(2 * K * G)
    ]  # fmt: skip
    wanted = np.array([target for _, target in unshared_scores(model, params, branches, 1.0)])
    np.testing.assert_allclose(np.asarray(got_BRH).reshape(-1, H), wanted, rtol=1e-4, atol=1e-4)


def test_a_killed_one_goes_on(case, rows, tmp_path, monkeypatch):
    path, _, result = rows
    lines = path.read_text().splitlines(keepends=True)
    copy = tmp_path / "gain.jsonl"
    calls, of_batch = [], where.of_batch
    monkeypatch.setattr(where, "of_batch", lambda *args: calls.append(1) or of_batch(*args))
    for kept, batches in ((13, 0), (9, 1), (4, 2), (11, 1)):  # the first batch has 8 records
        calls.clear()
        copy.write_text("".join(lines[:kept]) + ("" if kept == 13 else lines[kept][:-9]))
        assert case.run(copy) == result and len(calls) == batches
        assert copy.read_text() == path.read_text()
    with pytest.raises(ConfigError, match="other settings: documents"):
        case.run(copy, case.documents[:5])


def test_what_is_refused(case, tmp_path):
    for documents in (case.documents[:1], case.documents[:1] * 2):
        with pytest.raises(ConfigError, match="at least 2"):
            case.run(tmp_path / "gain.jsonl", documents)
    bad = Case.__new__(Case)
    bad.__dict__ = case.__dict__ | {"params": jax.tree.map(lambda leaf: leaf * jnp.nan, case.params)}
    with pytest.raises(ValueError, match="not finite"):
        bad.run(tmp_path / "gain.jsonl")
