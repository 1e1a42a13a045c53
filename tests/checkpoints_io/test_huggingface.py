# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories: a round trip is exact, and every kind of damage is one clear line."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlp_jax.checkpoints_io.hf_config import config_from_json, config_to_json
from rlp_jax.checkpoints_io.huggingface import read_directory, write_directory
from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.models.presets import CONFIGS

ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path, model, params, tokenizer):
    write_directory(tmp_path / "out", model.config, params, tokenizer)
    return tmp_path / "out"


def edit_tensors(directory, change):
    tensors = load_file(directory / ONE)
    change(tensors)
    save_file(tensors, directory / ONE)


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def read_error(directory) -> str:
    with pytest.raises(CheckpointError) as error:
        read_directory(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("on_device", [False, True])
def test_round_trip_is_bitwise(tmp_path, model, params, tokenizer, same_tree, on_device):
    given = jax.tree.map(jax.device_put, params) if on_device else params
    write_directory(tmp_path / "a", model.config, given, tokenizer)
    config, read = read_directory(tmp_path / "a")
    assert config == model.config
    same_tree(read, params)
    write_directory(tmp_path / "b", config, read, tokenizer)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_layout_of_the_file(directory, model, params):
    """Spot checks by index, written out by hand: heads, transposes, layers."""
    tensors, config = load_file(directory / ONE), model.config
    E = config.head_dim
    q, o = params["layers"]["attention"]["q"]["kernel"], params["layers"]["attention"]["o"]["kernel"]
    prefix = "model.layers.1.self_attn"
    assert tensors[f"{prefix}.q_proj.weight"][2 * E + 3, 5] == q[1, 5, 2, 3]
    assert tensors[f"{prefix}.k_proj.weight"].shape == (config.n_kv_heads * E, config.d_model)
    assert tensors[f"{prefix}.o_proj.weight"][5, 2 * E + 3] == o[1, 2, 3, 5]
    assert tensors["model.layers.0.mlp.down_proj.weight"][5, 7] == params["layers"]["mlp"]["down"]["kernel"][0, 7, 5]
    assert ("lm_head.weight" in tensors) == (not config.tie_embeddings)


def test_shards_hold_the_same(tmp_path, model, params, same_tree):
    write_directory(tmp_path / "out", model.config, params, shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(names) > 3
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = index["weight_map"]
    assert set(files.values()) == names
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    whole = {index["weight_map"][name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in files}
    assert all(os.path.getsize(tmp_path / "out" / name) < 20_000 + 2_000 for name in names - whole)
    same_tree(read_directory(tmp_path / "out")[1], params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types_become_float32(directory, params, same_tree, dtype):
    edit_tensors(directory, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    same_tree(read_directory(directory)[1], jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params))


def test_rotary_tables_and_a_stored_tied_head_are_ignored(directory, model, params, same_tree):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        if model.config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(directory, change)
    same_tree(read_directory(directory)[1], params)


def test_missing_surplus_misshapen_and_non_finite_tensors_are_named(directory, model):
    name = "model.layers.1.mlp.up_proj.weight"
    original = (directory / ONE).read_bytes()

    def error(change):
        (directory / ONE).write_bytes(original)
        edit_tensors(directory, change)
        return read_error(directory)

    assert f"tensor {name} missing" in error(lambda tensors: tensors.pop(name))
    layer = [key for key in load_file(directory / ONE) if ".layers.0." in key]
    assert f"and {len(layer) - 3} more missing" in error(lambda t: [t.pop(key) for key in layer])
    assert "tensor score.weight found" in error(lambda t: t.update({"score.weight": np.ones(3, np.float32)}))
    assert "bias are not supported" in error(
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(3, np.float32)})
    )
    F, D = model.config.d_ff, model.config.d_model
    assert f"tensor {name} has shape [{D}, {F}], the configuration needs [{F}, {D}]" in error(
        lambda t: t.update({name: np.ascontiguousarray(t[name].T)})
    )
    assert f"tensor {name} holds values that are not finite" in error(lambda t: t[name].__setitem__((1, 1), np.nan))
    assert f"tensor {name} is stored as I8" in error(lambda t: t.update({name: t[name].astype(np.int8)}))


def test_truncated_and_absent_files_are_named(directory):
    data = (directory / ONE).read_bytes()
    for kept in (len(data) - 1, len(data) // 2, 100, 4, 0):
        (directory / ONE).write_bytes(data[:kept])
        assert f"{directory / ONE}: truncated" in read_error(directory)
    (directory / ONE).unlink()
    assert "no model.safetensors" in read_error(directory)
    (directory / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin: pickled weights are not read" in read_error(directory)
    (directory / "config.json").write_text("{")
    assert "config.json: not valid JSON" in read_error(directory)
    (directory / "config.json").unlink()
    assert "no config.json" in read_error(directory)


@pytest.mark.parametrize("target", ["../model-00001.safetensors", "/etc/passwd", "..", "a\\b", "C:x", 3, ""])
def test_an_index_cannot_point_outside_the_directory(tmp_path, model, params, target):
    write_directory(tmp_path / "out", model.config, params, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = target
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    assert "tensor model.norm.weight points to" in read_error(tmp_path / "out")


def test_an_index_that_promises_too_much(tmp_path, model, params):
    write_directory(tmp_path / "out", model.config, params, shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = index["weight_map"]
    files["model.norm.weight"] = next(file for file in files.values() if file != files["model.norm.weight"])
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    assert "tensor model.norm.weight is missing, which the index promises" in read_error(tmp_path / "out")
    (tmp_path / "out" / files["model.embed_tokens.weight"]).unlink()
    assert "no such weights file" in read_error(tmp_path / "out")


def test_a_head_that_contradicts_the_tie(tmp_path, model, params):
    if not model.config.tie_embeddings:
        pytest.skip("tied models only")
    write_directory(tmp_path / "out", model.config, params)
    edit_tensors(tmp_path / "out", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight differs" in read_error(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3' has low_freq_factor None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"hidden_size": "24"}, "hidden_size is '24', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 5}, "cannot share 5"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
    ],
)
def test_unsupported_configurations_name_the_field(directory, fields, words):
    edit_config(directory, **fields)
    message = read_error(directory)
    assert words in message
    assert str(directory / "config.json") in message


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_json(name):
    fields = json.loads(json.dumps(config_to_json(CONFIGS[name], None)))
    assert config_from_json(fields, "config.json") == CONFIGS[name]


def test_writing_refuses_a_full_directory_and_leaves_nothing_behind(tmp_path, model, params, tokenizer):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        write_directory(tmp_path / "out", model.config, params, tokenizer)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "keep.txt"]


def test_writing_into_an_empty_directory_and_below_new_ones(tmp_path, model, params):
    (tmp_path / "empty").mkdir()
    write_directory(tmp_path / "empty", model.config, params)
    write_directory(tmp_path / "x" / "y" / "z", model.config, params)
    assert (tmp_path / "empty" / ONE).is_file() and (tmp_path / "x" / "y" / "z" / ONE).is_file()


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, model, params):
    class Broken:
        shape = params["final_norm"]["scale"].shape

        def __array__(self, *args, **kwargs):
            raise OSError("device lost")

    with pytest.raises(OSError, match="device lost"):
        write_directory(tmp_path / "out", model.config, params | {"final_norm": {"scale": Broken()}})
    assert list(tmp_path.iterdir()) == []


def test_trees_that_do_not_fit_are_refused_before_writing(tmp_path, model, params):
    def error(tree, config=model.config):
        with pytest.raises(CheckpointError) as info:
            write_directory(tmp_path / "out", config, tree)
        assert list(tmp_path.iterdir()) == []
        return str(info.value)

    without = {key: value for key, value in params.items() if key != "final_norm"}
    assert "final_norm/scale is missing" in error(without)
    assert "extra does not belong" in error(params | {"extra": np.ones(3, np.float32)})
    assert "final_norm/scale has shape [7]" in error(params | {"final_norm": {"scale": np.ones(7, np.float32)}})
    assert "no table of names; supported: llama, qwen3" in error(
        params, dataclasses.replace(model.config, family="mamba")
    )
    flipped = dataclasses.replace(model.config, qk_norm=not model.config.qk_norm)
    assert "not a published architecture" in error(params, flipped)
