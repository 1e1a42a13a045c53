# SPDX-License-Identifier: Apache-2.0
"""Next-token loss on packed documents: the numbers of unpacked ones, no token lost, whatever is computed together."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import on_eight_devices
from hybrids import hybrid
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import PLAIN, RICH, next_token_loss, relative_error, rough_params, tiny
from rich.console import Console
from sharded_next_token import CASES
from slow_step import batch_of, recorder, small
from tiny_run import hasty_compilation, tiny_config

from rlp_jax.baselines import cpt
from rlp_jax.baselines.next_token import NextToken, pack, take_texts
from rlp_jax.config import Config, ConfigError, CPTConfig, RLPConfig
from rlp_jax.learner import in_shards
from rlp_jax.rows import not_finite_rows
from rlp_jax.settings import validate
from rlp_jax.state import init_state
from rlp_jax.train import train

LENGTHS = (9, 7, 2, 9, 5, 1)
MODELS = {
    "llama": small(),
    "qwen3": small("qwen3", vocab_size=30),
    "gemma3": tiny("gemma3"),  # a window
    "hybrid": hybrid("M*-"),
    "blocked": small(attention="blocked"),
}

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
    ("name", "template", "sequence_tokens"),
    [
        ("llama", PLAIN, 11),
        ("llama", RICH, 24),
        ("llama", RICH, 1_000),
        ("qwen3", PLAIN, 24),
        ("gemma3", RICH, 24),
        ("blocked", RICH, 24),
        ("hybrid", RICH, 24),
    ],
)
def test_loss_and_gradient_are_those_of_unpacked_documents(name, template, sequence_tokens):
    model = MODELS[name]
    params, batch = rough_params(model), batch_of(model.config.vocab_size, LENGTHS)
    wanted_BT = np.ones(batch["tokens_BT"].shape, bool)
    loss, gradient, tokens = next_token_loss(model, params, template, batch, wanted_BT)
    learner = NextToken(model, template, sequence_tokens)
    found, metrics = jax.jit(learner.gradient)(params, batch, wanted_BT)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert relative_error(found, gradient) < 1e-5
    # Without a BOS token nothing predicts a document's first.
    assert metrics["tokens"] == tokens == sum(LENGTHS) - (0 if template.plain else len(LENGTHS))
    assert 0 <= metrics["padding"] < 1


@functools.cache
def packed(template, sequence_tokens):
    """Of tokens [B, T] and lengths: the documents of every turn, how many are used, the sequences and layouts."""
    learner = NextToken(MODELS["llama"], template, sequence_tokens)

    def function(batch):
        texts = learner.texts(batch, jnp.ones(batch["tokens_BT"].shape, bool))
        shards, capacity, index_APd, used = learner.assign(texts)
        assert shards == 1
        every = jax.vmap(lambda index_d: take_texts(in_shards(texts, 1), index_d[None]))(index_APd[0])
        return index_APd[0], used, jax.vmap(lambda x: pack(jax.tree.map(lambda y: y[0], x), capacity))(every)

    return jax.jit(function)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=7, max_size=7),
    case=st.sampled_from([(PLAIN, 1), (RICH, 29), (PLAIN, 48), (RICH, 500)]),
)
def test_packing_loses_no_token_and_lets_no_document_see_another(lengths, case):
    template, _ = case
    batch = batch_of(50, lengths, T=12)
    index_Pd, used, turns = jax.device_get(packed(*case)(batch))
    seen = []
    for p, index_d in enumerate(index_Pd):
        held, place = index_d[index_d < len(lengths)], 0
        assert (p < used) == bool(len(held))
        one, (position_C, ranges) = jax.tree.map(lambda x, p=p: x[p], turns)
        for b in held:
            document = [*template.plain, *batch["tokens_BT"][b, : lengths[b]]]
            here = slice(place, place + len(document))
            assert one.tokens_T[here].tolist() == document
            assert position_C[here].tolist() == list(range(len(document)))
            assert (ranges.own_start_BC[here] == place).all()
            assert one.target_T[here][:-1].tolist() == document[1:]
            assert one.wanted_T[here].tolist() == [True] * (len(document) - 1) + [False]
            place += len(document)
            seen.append(b)
        assert place == one.length <= len(one.tokens_T) and not one.wanted_T[place:].any()
        assert (ranges.prefix_start_BC == ranges.prefix_end_BC).all()
        assert ranges.own_start_BC[place:].tolist() == list(range(place, len(one.tokens_T)))
    assert sorted(seen) == list(range(len(lengths)))


def learnt(params, sequence_tokens=16, batch=None, ema_decay=0.9, optimizer=None):
    """State before and after a step on the llama, metrics and scores."""
    model, optimizer = MODELS["llama"], optimizer or recorder(0.1)
    config = Config(cpt=CPTConfig(sequence_tokens), rlp=RLPConfig(ema_decay=ema_decay))
    step = cpt.make_step(model, optimizer, RICH, config)
    state = init_state(params, optimizer)
    before = jax.tree.map(np.array, state)
    batch = batch or batch_of(16, LENGTHS)
    samples = step.sample(state.params, state.ema_params, batch, jax.random.key(0))
    assert samples is None and step.judge is None
    return before, *step.learn(state, batch, samples)


def test_a_step_moves_the_policy_and_its_average():
    before, state, metrics, scores = learnt(rough_params(MODELS["llama"]))
    assert scores is None and state.step == 1 and metrics["finite"] == 1
    assert set(metrics) == {"loss", "tokens", "padding", "grad_norm", "finite"}
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(state.opt_state)), rel=1e-6)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, before.params, state.opt_state)
    assert relative_error(state.params, wanted) < 1e-6
    average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before.ema_params, state.params)
    assert relative_error(state.ema_params, average) < 1e-6


def test_a_step_that_is_not_finite_changes_nothing():
    params = rough_params(MODELS["llama"])
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(np.nan)
    before, state, metrics, _ = learnt(params, optimizer=optax.adam(0.1))
    assert metrics["finite"] == 0 and state.step == 1
    for old, new in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(state[1:]), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_eight_devices_give_the_numbers_of_one(family):
    printed = on_eight_devices("import sys, sharded_next_token; sharded_next_token.main(sys.argv[1])", family)
    assert printed.count("off by") == len(CASES[family])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    with hasty_compilation(root / "cache"):
        yield root


def rows(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def test_a_run_trains_resumes_and_reports_without_thoughts(root):
    out, config = io.StringIO(), tiny_config(root, algorithm="cpt", cpt=CPTConfig(sequence_tokens=64))
    report = train(config, root / "whole", Console(file=out))
    train(dataclasses.replace(config, steps=4), root / "halves", Console(file=io.StringIO()))
    train(config, root / "halves", Console(file=io.StringIO()))
    whole, halves = rows(root / "whole", "metrics.jsonl"), rows(root / "halves", "metrics.jsonl")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "tokens", "input_tokens", "finite"):
        assert [row[name] for row in whole] == [row[name] for row in halves], name
    assert rows(root / "whole", "eval.jsonl") == rows(root / "halves", "eval.jsonl")
    first, *_, last = rows(root / "whole", "eval.jsonl")
    assert last["ce_no_think_policy"] < first["ce_no_think_policy"]
    assert all("thought_len" not in row and row["input_tokens"] > row["tokens"] > 0 for row in whole)
    assert not (root / "whole" / "thoughts.jsonl").exists()
    page = report.read_text()
    assert "the policy&#39;s cross-entropy without a thought is" in page and '"name":"loss"' in page
    assert '"name":"reward"' not in page and "thoughts a position" not in page
    assert " loss " in out.getvalue() and " stop " not in out.getvalue()


def test_steps_that_are_not_finite_are_kept_without_thoughts():
    batch = batch_of(16, LENGTHS)
    kept = not_finite_rows(3, batch, None, None, str)
    assert [row["document"] for row in kept] == batch["document_B"].tolist()
    assert all(set(row) == {"step", "document", "text", "tokens"} for row in kept)


def test_settings_that_cannot_work(root):
    config = tiny_config(root, algorithm="cpt")
    with pytest.raises(
        ConfigError, match=r"cpt\.sequence_tokens is 31, data\.document_tokens 32: a sequence has to hold"
    ):
        validate(dataclasses.replace(config, cpt=CPTConfig(31)))
    with pytest.raises(ConfigError, match=r"rlp\.kl_coefficient is 0\.1, and algorithm cpt samples no thoughts"):
        validate(dataclasses.replace(config, rlp=RLPConfig(kl_coefficient=0.1)))
