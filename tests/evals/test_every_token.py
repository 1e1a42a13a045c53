# SPDX-License-Identifier: Apache-2.0
"""Every number that the report's viewer shows, from whole plain sequences and log-softmax in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import byte_tokenizer, hasty_compilation

from rlp_jax.checkpoints_io.load import load
from rlp_jax.config import ReportConfig
from rlp_jax.data.pipeline import heldout_batches, load_documents
from rlp_jax.data.template import template_tokens
from rlp_jax.evals import every_token
from rlp_jax.report.recorded import is_document
from rlp_jax.settings import load_experiment

ROOM = 80  # tokens of the longest plain sequence


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(model, params, tokens):
    return model.apply(params, tokens)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("every_token")
    with hasty_compilation(root / "cache"):
        yield root


class Case:
    """The quickstart with a policy that is not its moving average."""

    def __init__(self):
        config = load_experiment("quickstart")
        data = dataclasses.replace(config.data, sources=("compose:64",), heldout_documents=3)
        rlp = dataclasses.replace(config.rlp, horizon=2, thought_tokens=9, temperature=0.8)
        report = ReportConfig(documents=2, positions=6, group_size=3)
        self.config = dataclasses.replace(config, data=data, rlp=rlp, report=report)
        self.model, self.params, self.tokenizer = load("quickstart")
        self.average = jax.tree.map(lambda leaf: 1.02 * leaf, self.params)
        self.template = template_tokens(config.template, self.tokenizer)
        self.documents = load_documents(data, self.tokenizer, 0, "span").heldout
        batches = heldout_batches(self.documents, 4, 3, 32, self.tokenizer.pad_id)
        (self.batch,) = every_token.first_documents(batches, 2)
        self.key = jax.random.key(5)

    def rows(self):
        return every_token.rows_of(
            self.model, self.params, self.average, self.batch, self.tokenizer, self.template, self.config, self.key
        )

    def logprobs(self, params, sequence, temperature=1.0):
        """[len(sequence), V] in float64 from one forward of the sequence alone."""
        tokens = np.zeros((1, ROOM), np.int32)
        tokens[0, : len(sequence)] = sequence
        logits_SV = np.asarray(plain_logits(self.model, params, jnp.asarray(tokens))[0], np.float64) / temperature
        top_S1 = logits_SV.max(-1, keepdims=True)
        return (logits_SV - top_S1 - np.log(np.exp(logits_SV - top_S1).sum(-1, keepdims=True)))[: len(sequence)]

    def after(self, params, tokens, t, thought, closed, temperature=1.0):
        """Mean log-probability of the tokens from t on after a thought, and of the thought's own tokens at a
        temperature."""
        target = tokens[t : t + 2]
        head = [*self.template.context, *tokens[:t], *self.template.open]
        close = [] if closed else list(self.template.close)
        sequence = [*head, *thought, *close, *target]
        plain_SV, warm_SV = self.logprobs(params, sequence), self.logprobs(params, sequence, temperature)
        first = len(head) + len(thought) + len(close)
        own = [warm_SV[len(head) - 1 + i, token] for i, token in enumerate(thought)]
        return np.mean([plain_SV[first - 1 + h, target[h]] for h in range(2)]), np.array(own)


@pytest.fixture(scope="module")
def case(root):
    return Case()


@pytest.fixture(scope="module")
def rows(case):
    return case.rows()


def test_rows_by_plain_sequences(case, rows):
    assert [row["document"] for row in rows] == [document.id for document in case.documents[:2]]
    temperature = case.config.rlp.temperature
    moved = 0.0
    for row, document in zip(rows, case.documents, strict=False):
        assert is_document(row)
        tokens = [int(token) for token in document.tokens_T]
        assert "".join(row["tokens"]) == case.tokenizer.decode(tokens) and len(row["tokens"]) == len(tokens)
        assert len(row["position"]) == 6 and row["position"] == sorted(set(row["position"]))
        assert row["trained"] == [bool(document.span_T[t]) for t in row["position"]] and sum(row["trained"]) == 3
        for k, t in list(enumerate(row["position"]))[::2]:
            plain_TV = case.logprobs(case.average, tokens)
            s_ema = np.mean([plain_TV[t - 1 + h, tokens[t + h]] for h in range(2)])
            assert row["s_ema"][k] == pytest.approx(s_ema, abs=1e-3)
            s_empty, _ = case.after(case.params, tokens, t, [], False)
            assert row["gain_empty"][k] == pytest.approx(s_empty - s_ema, abs=1e-3)
            rewards = [thought["reward"] for thought in row["thoughts"][k]]
            assert row["gain"][k] == pytest.approx(np.mean(rewards), abs=2e-4)
            for g, thought in enumerate(row["thoughts"][k]):
                others = [reward for other, reward in enumerate(rewards) if other != g]
                assert thought["advantage"] == pytest.approx(rewards[g] - np.mean(others), abs=4e-4)
                own = case.tokenizer.encode("".join(thought["tokens"]))
                assert len(own) == thought["length"] <= 9 and thought["rest"] == ""
                assert thought["stopped"] == (own[-1:] == list(case.template.close))
                assert thought["close"] == (len(case.template.close) if thought["stopped"] else 0)
                s_pred, policy = case.after(case.params, tokens, t, own, thought["stopped"], temperature)
                _, average = case.after(case.average, tokens, t, own, thought["stopped"], temperature)
                assert thought["reward"] == pytest.approx(s_pred - s_ema, abs=1e-3)
                np.testing.assert_allclose(thought["logprob"], policy, atol=1e-3)
                np.testing.assert_allclose(thought["ratio_ema"], policy - average, atol=1e-3)
                np.testing.assert_allclose(thought["ratio_sampler"], 0, atol=1e-3)
                moved = max(moved, *np.abs(thought["ratio_ema"]))
    assert moved > 0.01  # or a ratio of nought would have passed


def test_the_policy_is_its_average_before_training(case):
    same = every_token.rows_of(
        case.model, case.params, case.params, case.batch, case.tokenizer, case.template, case.config, case.key
    )
    for row in same:
        for group in row["thoughts"]:
            for thought in group:
                assert not np.any(thought["ratio_ema"])


def test_a_long_thought_is_kept_in_part(case, monkeypatch):
    monkeypatch.setattr(every_token, "TOKENS_KEPT", 4)
    whole, short = case.rows()[0], None
    monkeypatch.setattr(every_token, "TOKENS_KEPT", 256)
    full = case.rows()[0]
    for k, group in enumerate(whole["thoughts"]):
        for g, short in enumerate(group):
            thought = full["thoughts"][k][g]
            content = thought["tokens"][: len(thought["tokens"]) - thought["close"]]
            assert short["tokens"] == thought["tokens"][:4] and len(short["logprob"]) == len(short["tokens"])
            assert "".join(short["tokens"][: len(content)]) + short["rest"] == "".join(content)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40), st.integers(1, 50))
def test_positions_are_spread_and_preferred_ones_come_first(flags, limit):
    candidate = np.array([flag for flag, _ in flags], bool)
    prefer = np.array([flag for _, flag in flags], bool)
    chosen = every_token._positions(candidate, prefer, limit)
    assert len(chosen) == min(limit, candidate.sum()) and chosen == sorted(set(chosen))
    assert candidate[chosen].all()
    assert prefer[chosen].sum() == min(limit, (candidate & prefer).sum())


@given(st.text(max_size=30), st.binary(max_size=3))
def test_characters_of_several_tokens_stand_whole(text, noise):
    """A token is a byte here."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text)
    parts = every_token.whole_characters(tokens, tokenizer)
    assert len(parts) == len(tokens) and "".join(parts) == tokenizer.decode(tokens)
    assert "\ufffd" in text or [part for part in parts if part] == list(text)
    odd = [*tokens, *(tokenizer.encode(chr(256 + byte))[0] for byte in noise)]  # lone parts of characters
    assert len(every_token.whole_characters(odd, tokenizer)) == len(odd)
