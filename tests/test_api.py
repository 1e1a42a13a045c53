# SPDX-License-Identifier: Apache-2.0
"""The public API: everything it names is there, imported when it is used, and does what the commands do."""

import dataclasses
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from tiny_run import hasty_compilation, tiny_config

import rlp_jax

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("api")
    with hasty_compilation(root / "cache"):
        yield root


@pytest.fixture(scope="module")
def summary(root):
    return rlp_jax.train(tiny_config(root, steps=2), root / "run")


def test_importing_the_package_brings_nothing():
    code = (
        "import sys, rlp_jax\ndir(rlp_jax)\nprint(*sorted(m for m in sys.modules if m.startswith(('rlp_jax', 'jax'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rlp_jax"]


def test_every_name_is_there_documented_and_typed():
    for name in rlp_jax.__all__:
        value = getattr(rlp_jax, name)
        assert value.__doc__, name
        if inspect.isfunction(value):
            unsaid = [p.name for p in inspect.signature(value).parameters.values() if p.annotation is p.empty]
            assert not unsaid and inspect.signature(value).return_annotation is not inspect.Signature.empty, name
    assert set(rlp_jax.__all__) <= set(dir(rlp_jax))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rlp_jax.trian  # noqa: B018


def test_type_checkers_see_the_same_names():
    """The TYPE_CHECKING block is what a type checker believes: run it."""
    source = inspect.getsource(rlp_jax)
    block = source.split("if TYPE_CHECKING:\n")[1].split("\n__all__")[0]
    names: dict[str, typing.Any] = {}
    exec(inspect.cleandoc(block), names)
    assert {name for name in names if not name.startswith("__")} == set(rlp_jax.__all__)
    for name in rlp_jax.__all__:
        assert names[name] is getattr(rlp_jax, name), name


def test_functions_are_not_hidden_by_modules_of_their_name():
    code = (
        "import rlp_jax.train, rlp_jax.report.page, rlp_jax\nfrom rlp_jax.train import train\n"
        "from rlp_jax import report\n"
        "assert rlp_jax.train.__module__ == report.__module__ == 'rlp_jax.api', rlp_jax.train\n"
        "assert train.__module__ == 'rlp_jax.train'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_experiment_takes_arguments_and_overrides():
    config = rlp_jax.experiment("quickstart", overrides=["rlp.group_size=8"])
    assert isinstance(config, rlp_jax.Config) and config.rlp.group_size == 8
    assert rlp_jax.experiment("smollm2", corpus="encyclopedia").name == "smollm2-encyclopedia"
    with pytest.raises(rlp_jax.ConfigError, match="did you mean quickstart"):
        rlp_jax.experiment("quikstart")
    with pytest.raises(rlp_jax.ConfigError, match="not an argument of this experiment"):
        rlp_jax.experiment("quickstart", corpus="encyclopedia")


def test_train_gives_the_summary_and_reads_a_finished_run(root, summary):
    assert set(summary) == {"before", "after"} and np.isfinite(summary["after"]["gain"])
    assert summary == json.loads((root / "run" / "summary.json").read_text())
    assert rlp_jax.train(tiny_config(root, steps=2), root / "run") == summary
    with pytest.raises(rlp_jax.ConfigError, match="steps is 0"):
        rlp_jax.train(tiny_config(root, steps=0), root / "none")
    assert not (root / "none").exists()


def test_sample_of_a_loaded_model_and_of_a_run(root, summary):
    config = tiny_config(root)
    loaded = rlp_jax.load(config.model)
    found = rlp_jax.sample(loaded, "4 abcdabcd", 4, thoughts=3, tokens=6, horizon=3, config=config)
    assert found.prefix == "4 ab" and found.target == "cda" and found.position == 4
    assert len(found.thoughts) == 3 and all(thought.tokens <= 6 for thought in found.thoughts)
    for thought in found.thoughts:
        assert np.mean(thought.token_gains) == pytest.approx(thought.gain, rel=1e-4, abs=1e-5)
    assert found.best.gain == max(thought.gain for thought in found.thoughts)
    again = rlp_jax.sample(config.model, "4 abcdabcd", 4, thoughts=3, tokens=6, horizon=3, template=config.template)
    assert [thought.text for thought in again.thoughts] == [thought.text for thought in found.thoughts]
    end = rlp_jax.sample(str(root / "run"), "4 abcd", thoughts=2)
    assert (end.target, end.baseline, end.best) == ("", None, end.thoughts[0])
    assert all(thought.gain is None and thought.token_gains == () for thought in end.thoughts)
    with pytest.raises(ValueError, match="position is 99"):
        rlp_jax.sample(loaded, "4 abcd", 99, config=config)


def test_export_of_a_run_and_of_a_loaded_model(root, summary, tmp_path):
    out = rlp_jax.export(root / "run", tmp_path / "run")
    again = rlp_jax.export(rlp_jax.load(out), tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    average = rlp_jax.export(root / "run", tmp_path / "average", ema=True)
    assert (out / "model.safetensors").read_bytes() != (average / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not an empty directory"):
        rlp_jax.export(root / "run", out)
    with pytest.raises(ValueError, match="is not a run directory, it has no moving average"):
        rlp_jax.export(out, tmp_path / "other", ema=True)


def test_evaluate_and_report(root, summary, tmp_path):
    settings = rlp_jax.SuiteConfig(positions=1, samples=2)
    result = rlp_jax.evaluate(root / "run", "gain", limit=3, settings=settings, out=tmp_path)
    assert set(result["tasks"]) == {"gain"} and (tmp_path / "gain.jsonl").is_file()
    with pytest.raises(rlp_jax.ConfigError, match="unknown task 'gian'"):
        rlp_jax.evaluate(root / "run", "gian")
    assert rlp_jax.report(root / "run") == root / "run" / "report.html"


def test_settings_are_plain_dataclasses(root):
    config = dataclasses.replace(tiny_config(root), rlp=rlp_jax.RLPConfig(group_size=3))
    assert config.rlp.group_size == 3 and typing.get_type_hints(type(config))["rlp"] is rlp_jax.RLPConfig
