# SPDX-License-Identifier: Apache-2.0
"""Perplexity over a file is `likelihood.evaluate` over its documents, batch by batch, and goes on after a kill."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from tiny_run import tiny_config

from rlp_jax.checkpoints_io.load import load
from rlp_jax.config import ConfigError, SuiteConfig
from rlp_jax.data.pipeline import heldout_batches, load_documents
from rlp_jax.data.template import template_tokens
from rlp_jax.evals import likelihood
from rlp_jax.evals.perplexity import over_file, run_perplexity
from rlp_jax.state import Purpose, step_key

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = SuiteConfig(samples=3, temperature=0.9, thought_tokens=4, positions=2, seed=5)


def quiet(text):
    pass


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("perplexity")
    config = tiny_config(root)
    model, params, tokenizer = load(config.model)
    baseline = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    template = template_tokens(config.template, tokenizer)
    config = over_file(config, SETTINGS, str(root / "documents.jsonl"), None, template, 64)
    return (model, params, baseline, tokenizer, template, config, "weights")


def test_settings_reach_the_evaluation(case):
    config = case[5]
    assert (config.rlp.thought_tokens, config.rlp.temperature, config.rlp.horizon) == (4, 0.9, 2)
    assert (config.eval.positions, config.eval.group_size, config.seed) == (2, 3, 5)
    assert config.data.document_tokens == 32
    other = over_file(config, SETTINGS, "file.jsonl", "{question}", case[4], 30).data
    assert (other.sources, other.text, other.span) == (("file.jsonl",), "{question}", "")
    assert other.document_tokens == 30 - 2 - 4 - 2  # tags, thought, horizon


def test_it_is_the_held_out_evaluation(case, tmp_path, monkeypatch):
    model, params, baseline, tokenizer, template, config, _ = case
    documents = load_documents(config.data, tokenizer, 0).train[:10]
    batches = heldout_batches(documents, 4, 10, 32, tokenizer.pad_id)
    key = step_key(5, 0, Purpose.EVALUATION)
    wanted = likelihood.evaluate(model, params, baseline, batches, template, config, key)
    path = tmp_path / "perplexity.jsonl"
    result = run_perplexity(*case, 10, path, quiet)
    for name, value in wanted.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
    assert result["documents"] == 10
    for name in ("think", "empty", "shuffled", "no_think", "no_think_policy"):
        assert result[f"ppl_{name}"] == pytest.approx(math.exp(wanted[f"ce_{name}"]), rel=1e-6)
    lines = path.read_text().splitlines(keepends=True)
    assert [len(json.loads(line).get("ce_think", ())) for line in lines] == [0, 4, 4, 2]

    calls, of_documents = [], likelihood.of_documents
    monkeypatch.setattr(likelihood, "of_documents", lambda *args: calls.append(1) or of_documents(*args))
    path.write_text("".join(lines[:2]) + lines[2][:-9])
    assert run_perplexity(*case, 10, path, quiet) == result and len(calls) == 2
    assert run_perplexity(*case, 10, path, quiet) == result and len(calls) == 2
    with pytest.raises(ConfigError, match="other settings: documents"):
        run_perplexity(*case, 9, path, quiet)


def test_what_is_refused(case, tmp_path):
    for limit in (1,):
        with pytest.raises(ConfigError, match="at least 2"):
            run_perplexity(*case, limit, tmp_path / "records.jsonl", quiet)
    config = dataclasses.replace(case[5], rlp=dataclasses.replace(case[5].rlp, thought_tokens=60))
    with pytest.raises(ConfigError, match="the model's context holds 64"):
        run_perplexity(*case[:5], config, "weights", 4, tmp_path / "records.jsonl", quiet)
    assert not (tmp_path / "records.jsonl").exists()
