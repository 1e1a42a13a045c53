# SPDX-License-Identifier: Apache-2.0
"""Checked configs; what the command line refuses is in test_cli.py."""

import dataclasses
import json

import pytest

from rlp_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RLPConfig,
    RPTConfig,
    to_json,
)
from rlp_jax.settings import check_devices, experiment_of, fingerprint, from_json, is_run, load_experiment, validate

GOOD = Config(model="m", data=DataConfig(sources=("a.txt",)))


def test_the_papers_defaults_are_valid():
    validate(GOOD)


def test_what_is_kept_for_good_must_be_saved():
    checkpoint = CheckpointConfig(every=20, keep_every=50)
    with pytest.raises(ConfigError, match=r"keep_every is 50: only multiples of checkpoint\.every, 20, are saved"):
        validate(dataclasses.replace(GOOD, checkpoint=checkpoint))
    validate(dataclasses.replace(GOOD, checkpoint=dataclasses.replace(checkpoint, keep_every=60)))


def test_json_round_trip():
    config = dataclasses.replace(GOOD, rlp=RLPConfig(group_size=4), optimizer=OptimizerConfig(final_learning_rate=0.0))
    assert from_json(to_json(config), "file") == config


@pytest.mark.parametrize("text", ["", "[1]", '{"rlp": 3}', '{"rlp": {"grup": 3}}', '{"colour": 1}'])
def test_json_of_something_else(text):
    with pytest.raises(ConfigError, match=r"some/config\.json is not a run's config\.json"):
        from_json(text, "some/config.json")


def test_every_field_counts_in_the_fingerprint_that_decides_a_steps_numbers():
    def changed(tree):
        """The config's dict with one leaf changed, for each leaf."""
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from ({**tree, name: inner} for inner in changed(value))
            else:
                yield {**tree, name: "x"}

    trees = list(changed(dataclasses.asdict(GOOD)))
    same = [tree for tree in trees if fingerprint(from_json(json.dumps(tree), "")) == fingerprint(GOOD)]
    assert len(trees) > 40
    assert [[name for name in tree if tree[name] != dataclasses.asdict(GOOD)[name]] for tree in same] == (
        [["steps"]] + 3 * [["data"]] + 3 * [["report"]] + 6 * [["mesh"]] + 3 * [["checkpoint"]]
    )
    cosine = dataclasses.replace(GOOD, optimizer=OptimizerConfig(final_learning_rate=1e-7))
    assert fingerprint(cosine) != fingerprint(dataclasses.replace(cosine, steps=7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rpt": RPTConfig(rounds=0)}, r"rpt.rounds is 0: it must be at least 1"),
        ({"rpt": RPTConfig(entropy_threshold=-1.0)}, r"rpt.entropy_threshold is -1.0: it must not be negative"),
        ({"rpt": RPTConfig(answer_close="")}, r"rpt.answer_close is empty"),
        ({"algorithm": "rlvr", "rlp": RLPConfig(positions=2)}, r"rlp.positions is 2: algorithm rlvr responds .* once"),
        ({"rlp": RLPConfig(reward="likelihood")}, r"rlp.reward is 'likelihood': algorithm rpt has a judge's"),
    ],
)
def test_settings_of_the_judged_algorithms(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(dataclasses.replace(GOOD, **{"algorithm": "rpt", **changes}))
    validate(dataclasses.replace(GOOD, algorithm="rpt", rlp=RLPConfig(positions=2)))


def test_batches_must_divide_over_data_and_fsdp():
    config = dataclasses.replace(GOOD, batch_documents=24, rlp=RLPConfig(microbatches=2))
    check_devices(config, (1, 2, 3, 5))
    with pytest.raises(ConfigError, match="has 12 documents, not a multiple of the 8 devices"):
        check_devices(config, (2, 2, 2, 1))


def test_sampling_takes_devices_from_those_of_the_learner():
    mesh = MeshConfig(rollout="gathered", rollout_tensor=4)
    config = dataclasses.replace(GOOD, batch_documents=8, rlp=RLPConfig(), mesh=mesh)
    validate(config)
    check_devices(config, (1, 1, 4, 2))
    for shape in ((1, 1, 3, 2), (1, 1, 1, 8)):
        with pytest.raises(ConfigError, match=rf"rollout_tensor is 4: with fsdp={shape[2]} and tensor={shape[3]}"):
            check_devices(dataclasses.replace(config, batch_documents=3), shape)
    with pytest.raises(ConfigError, match=r"rollout_tensor is 4: it is 0, or devices that sample .* mesh.rollout=gath"):
        validate(dataclasses.replace(config, mesh=dataclasses.replace(mesh, rollout="same")))


def test_the_experiments_are_valid_and_found_by_their_model():
    config = load_experiment("quickstart")
    validate(config)
    assert experiment_of(config.model).template == config.template
    for name in ("quickstart_cpt", "quickstart_sft", "pod/qwen3_1_7b_cpt"):
        rival = load_experiment(name)
        validate(rival)
        assert rival.algorithm == name[-3:] and rival.template == load_experiment(name[:-4]).template
    assert experiment_of("some/other/model") is None


def test_arguments_of_an_experiment(tmp_path):
    file = tmp_path / "sizes.py"
    file.write_text(
        "from rlp_jax.config import CheckpointConfig, Config, ConfigError\n\n\n"
        "def config(name='a'):\n    if name == 'bad':\n        raise ConfigError('name is bad')\n"
        "    return Config(name=name)\n"
    )
    assert load_experiment(str(file)).name == "a"
    assert load_experiment(str(file), ["name=b=c"]).name == "b=c"
    with pytest.raises(ConfigError, match=r"--with nam=b: not an argument of this experiment.*it takes name$"):
        load_experiment(str(file), ["nam=b"])
    with pytest.raises(ConfigError, match=r"^name is bad$"):
        load_experiment(str(file), ["name=bad"])


def test_a_run_directory_is_told_from_a_model(tmp_path):
    assert not is_run(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert not is_run(tmp_path)
    (tmp_path / "config.json").write_text(to_json(GOOD))
    assert is_run(tmp_path)
