# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H directories: a round trip without torch, and what config.json and tensors are refused for."""

import json
import math

import jax
import numpy as np
import pytest
from hybrids import CONFIG, hybrid
from reference import rough_params
from safetensors.numpy import load_file, save_file

from rlp_jax.checkpoints_io.hf_config import config_from_json, config_to_json
from rlp_jax.checkpoints_io.huggingface import read_directory, write_directory
from rlp_jax.checkpoints_io.tables import CheckpointError, tensors
from rlp_jax.models.presets import CONFIGS

FIELDS = config_to_json(CONFIG, None)


@pytest.mark.parametrize("pattern", ["M*-M*-M", "-M*"])
def test_round_trip_is_bitwise(pattern, tmp_path):
    model = hybrid(pattern)
    params = rough_params(model)
    write_directory(tmp_path / "out", model.config, params)
    config, again = read_directory(tmp_path / "out")
    assert config == model.config and jax.tree.structure(again) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = pattern.index("M")  # the first layer of its kind is the first row of its stack
    assert stored[f"backbone.layers.{layer}.mixer.conv1d.weight"].shape == (44, 1, 4)
    assert {int(name.split(".")[2]) for name in stored if ".layers." in name} == set(range(len(pattern)))


def test_rows_of_a_stack_are_the_layers_of_the_model():
    found = {}
    for tensor in tensors(CONFIGS["nemotron-nano-9b-v2"]):
        if tensor.name.path.endswith("norm/scale") and tensor.layers and "gate" not in tensor.name.path:
            kind = tensor.name.path.split("/")[1].split("_")[0]
            found |= dict.fromkeys(tensor.layers, {"mamba": "M", "attention": "*", "mlp": "-"}[kind])
    assert "".join(found[y] for y in range(56)) == CONFIGS["nemotron-nano-9b-v2"].hybrid.pattern


def test_names_of_both_styles(tmp_path):
    model, params = hybrid(), rough_params(hybrid())
    write_directory(tmp_path / "out", model.config, params)
    file = tmp_path / "out" / "model.safetensors"
    native = {name.replace("backbone.", "model."): value for name, value in load_file(file).items()}
    save_file(native, file)
    for a, b in zip(jax.tree.leaves(read_directory(tmp_path / "out")[1]), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    save_file(native | {"backbone.norm_f.weight": native["model.norm_f.weight"]}, file)
    with pytest.raises(CheckpointError, match=r"model\.norm_f\.weight found"):  # both at once
        read_directory(tmp_path / "out")


def test_tied_heads_are_refused(tmp_path):
    """transformers has no way to tie them: it would make up a head of its own."""
    model = hybrid(tie_embeddings=True)
    with pytest.raises(CheckpointError, match="tie_embeddings=True is not a published architecture"):
        write_directory(tmp_path / "out", model.config, rough_params(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("nemotron")])
def test_presets_as_config_json(name):
    assert config_from_json(json.loads(json.dumps(config_to_json(CONFIGS[name], None))), "here") == CONFIGS[name]


@pytest.mark.parametrize(
    "types",
    [
        ["linear_attention", "full_attention", "mlp", "linear_attention"],
        ["mamba", "attention", "mlp", "mamba"],
    ],
)
def test_types_of_layers_by_newer_and_older_names(types):
    fields = {
        key: value for key, value in FIELDS.items() if key not in ("hybrid_override_pattern", "num_hidden_layers")
    }
    assert config_from_json(fields | {"layers_block_type": types}, "here").hybrid.pattern == "M*-M"


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (None, (0.0, math.inf)),
        ([0.0, math.inf], (0.0, math.inf)),
        ([0.001, {"__float__": "Infinity"}], (0.001, math.inf)),
        ([0.0, "Infinity"], (0.0, math.inf)),
        ([0.01, 0.5], (0.01, 0.5)),
    ],
)
def test_time_step_limit(written, limit):
    config = config_from_json(FIELDS | {"time_step_limit": written}, "here")
    assert config.hybrid.time_step_limit == limit
    assert config_from_json(config_to_json(config, None), "here") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hybrid_override_pattern": "MEM*"}, "mixture-of-experts"),
        ({"layers_block_type": ["linear_attention", "moe"]}, "mixture-of-experts"),
        ({"layers_block_type": ["linear_attention", "conv"]}, "layer type 'conv' is not supported"),
        ({"hybrid_override_pattern": "M*x-M*-"}, "hybrid_override_pattern has 'x'"),
        ({"hybrid_override_pattern": ""}, "neither layers_block_type nor hybrid_override_pattern"),
        ({"hybrid_override_pattern": "M" * 600}, "600 layers, more than 512"),
        ({"num_hidden_layers": 9}, "num_hidden_layers is 9, but the pattern has 7"),
        ({"n_groups": 3}, "4 Mamba heads cannot share 3 groups"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        ({"time_step_limit": [0.5]}, "time_step_limit is"),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit is"),
        ({"time_step_limit": "x"}, "time_step_limit is"),
        ({"time_step_limit": 3}, "time_step_limit is"),
        ({"use_bias": True}, "use_bias is not supported"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is not supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is not supported"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"conv_kernel": "4"}, "conv_kernel"),
        ({"mamba_d_conv": []}, "mamba_d_conv"),
    ],
)
def test_refusals_name_the_field(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        config_from_json(FIELDS | {"num_hidden_layers": None} | change, "here")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    model = hybrid()
    write_directory(tmp_path / "out", model.config, rough_params(model))
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    name = "backbone.layers.6.mixer.conv1d.weight"
    save_file({key: value for key, value in stored.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=f"{name} missing"):
        read_directory(tmp_path / "out")
    save_file(stored | {name: stored[name][:, 0]}, file)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[44, 4\], the configuration needs \[44, 1, 4\]"):
        read_directory(tmp_path / "out")
