# SPDX-License-Identifier: Apache-2.0
"""Dry runs: counts against the arrays themselves, memory against a compiled program, and nothing written."""

import dataclasses

import jax
import pytest
from tiny_run import tiny_config

from rlp_jax.aot.dry_run import describe, dry_run
from rlp_jax.aot.programs import batch_shapes, template_of
from rlp_jax.checkpoints_io.load import load
from rlp_jax.cli import main
from rlp_jax.config import Config, DataConfig, RLPConfig, with_algorithm
from rlp_jax.optimizer import make_optimizer
from rlp_jax.rlp import make_step
from rlp_jax.settings import load_experiment
from rlp_jax.state import init_state


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("dry"))


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_counts_are_those_of_the_arrays(config):
    run, loaded = dry_run(config), load(config.model)
    state = init_state(loaded.params, make_optimizer(config.optimizer, 6))
    assert run.parameters["all"] == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert sum(count for name, count in run.parameters.items() if name != "all") == run.parameters["all"]
    assert run.memory["parameters"] == run.memory["EMA"] == nbytes(state.params)
    assert run.memory["optimizer"] == nbytes(state.opt_state)
    assert run.shapes["thought_BKGL"] == "int32[4,1,2,5]" and run.shapes["tokens_BT"] == "int32[4,32]"
    assert run.measured and run.tokens["sampled"] == 4 * 2 * 5 and run.tokens["scored"] == 4 * 2 * 2
    assert run.run_tokens["sampled"] == 6 * run.tokens["sampled"]
    # The documents of the file have 12 to 28 letters, a number and a space before them.
    assert 4 * 14 < run.tokens["read"] < 4 * 31


def test_the_matched_budget_is_the_papers_rule(config):
    run = dry_run(config)
    read, sampled = run.run_tokens["read"], run.run_tokens["sampled"]
    assert run.matched.steps == round((read + sampled) / run.tokens["read"])
    assert run.matched.budget.flops == 0.0 and f"{run.matched.steps:,} steps" in describe(run)


def test_the_learners_memory_is_that_of_its_program(config):
    """The compiler's own figure for the learner, state and all: the formula is off by less than a factor of two."""
    wide = dataclasses.replace(config, rlp=RLPConfig(group_size=4, thought_tokens=12, horizon=2), batch_documents=8)
    model, params, tokenizer = load(wide.model)
    for remat in ("none", "layer"):
        own = dataclasses.replace(wide, remat=remat)
        remated = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=remat))
        optimizer = make_optimizer(own.optimizer, 6)
        step = make_step(remated, optimizer, template_of(own.template, tokenizer), own)
        state = jax.eval_shape(lambda optimizer=optimizer: init_state(params, optimizer))
        batch = batch_shapes(8, own.data.document_tokens)
        samples = jax.eval_shape(step.sample, params, params, batch, jax.random.key(0))
        used = jax.jit(step.learn).lower(state, batch, samples).compile().memory_analysis()
        actual = used.argument_size_in_bytes + used.temp_size_in_bytes
        memory = dry_run(own).memory
        guessed = sum(memory[name] for name in ("parameters", "EMA", "optimizer", "learner"))
        assert 0.5 < guessed / actual < 2.0, (remat, guessed, actual)


def test_remat_and_microbatches_save_what_they_are_for(config):
    def learner(**changes):
        rlp = dataclasses.replace(config.rlp, microbatches=changes.pop("microbatches", 1))
        return dry_run(dataclasses.replace(config, rlp=rlp, **changes)).memory["learner"]

    assert learner(remat="layer") < learner(remat="elementwise") < learner(remat="none")
    assert learner(remat="none", microbatches=4) < learner(remat="none")


def test_slots_and_types_of_sampling_save_caches(config):
    def memory(**changes):
        return dry_run(dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, **changes))).memory

    assert memory(slots=1)["caches"] < memory()["caches"]
    low = memory(rollout_dtype="bfloat16")
    assert low["caches"] == pytest.approx(memory()["caches"] / 2, rel=0.02)
    assert low["sampler's weights"] == low["parameters"] / 2


def test_a_published_shape_needs_neither_weights_nor_documents():
    config = load_experiment("pod/qwen3_1_7b")
    run = dry_run(
        dataclasses.replace(config, batch_documents=4, rlp=dataclasses.replace(config.rlp, thought_tokens=64))
    )
    assert run.parameters["all"] == 1_720_574_976 and not run.measured
    assert run.tokens["read"] == 4 * 2048
    text = describe(run)
    assert "documents.jsonl is not there to be read" in text and "rlp compile" in text


@pytest.mark.parametrize("algorithm", ["cpt", "sft"])
def test_without_thoughts(config, algorithm):
    run = dry_run(with_algorithm(config, algorithm))
    assert set(run.tokens) == {"read"} and "thought_BKGL" not in run.shapes and run.matched is None
    assert "caches" not in run.memory and "sampled" not in describe(run)


def test_large_files_are_not_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr("rlp_jax.aot.dry_run.MEASURED_BYTES", 10)
    run = dry_run(config)
    assert not run.measured and run.tokens["read"] == 4 * 32
    assert any("files are large" in note for note in run.notes)


def test_the_command_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--dry-run", "--set", "rlp.group_size=2"]) == 0
    out = capsys.readouterr().out
    assert "dry run of quickstart" in out and "int32[16,2,2,16]" in out and list(tmp_path.iterdir()) == []
    assert main(["train", "quickstart", "--dry-run", "--set", "rlp.group_size=1"]) == 2
    assert main(["train", "quickstart", "--dry-run", "--set", "model=quikstart"]) == 2
    assert "did you mean 'quickstart'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_settings_that_do_not_fit_are_found(config):
    with pytest.raises(ValueError, match="the model's context holds 64"):
        dry_run(dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, thought_tokens=100)))
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        dry_run(Config(model="quickstart", data=DataConfig()))
