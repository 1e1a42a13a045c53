# SPDX-License-Identifier: Apache-2.0
"""`rlp train` takes a checkpoint of each kind of model by its path: steps, evaluation, export."""

import dataclasses
import io
import json

import hybrids
import jax
import numpy as np
import pytest
import reference
from rich.console import Console
from tiny_run import hasty_compilation, tiny_config, write_documents, write_model

from rlp_jax.checkpoints_io.load import load
from rlp_jax.cli import main
from rlp_jax.train import train

# Llama is what tests/test_train.py trains; Qwen3 and scaled rotary angles differ from it inside attention alone.
FAMILIES = {
    **{name: reference.tiny(name).config for name in ("qwen2", "gemma3")},
    "nemotron_h": hybrids.hybrid().config,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with hasty_compilation(tmp_path_factory.mktemp("cache")):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run(name, cache, tmp_path):
    shape = dataclasses.replace(FAMILIES[name], vocab_size=256, max_positions=64)
    write_model(tmp_path / "model", shape)
    write_documents(tmp_path / "documents.jsonl")
    train(tiny_config(tmp_path, steps=2), tmp_path / "run", Console(file=io.StringIO()))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["finite"] and row["grad_norm"] > 0 for row in metrics)
    assert all(row["logprob_gap"] < 1e-5 for row in metrics)  # the sampler and the trainer are one function
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert np.isfinite(
        [summary[when][key] for when in summary for key in ("gain", "gain_empty", "gain_shuffled")]
    ).all()

    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    before, after = load(tmp_path / "model"), load(tmp_path / "exported")
    assert dataclasses.replace(after.model.config, remat="none") == dataclasses.replace(
        before.model.config, remat="none"
    )
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before.params, after.params)
    assert all(jax.tree.leaves(moved))
