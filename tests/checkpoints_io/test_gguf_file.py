# SPDX-License-Identifier: Apache-2.0
"""GGUF files written here with the `gguf` package: what is read equals what went in."""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest

from rlp_jax.checkpoints_io import gguf_file
from rlp_jax.checkpoints_io.load import read
from rlp_jax.checkpoints_io.names import CheckpointError, disassemble
from rlp_jax.checkpoints_io.tables import STRUCTURE, tensors
from rlp_jax.models.layers import RopeScaling
from rlp_jax.models.transformer import LanguageModel, ModelConfig


def interleave(weight, heads):
    """How the converter of llama.cpp orders the rows of q and k: row i of each half of a head in turn."""
    rows = []
    for head in np.split(weight, heads):
        first, second = np.split(head, 2)
        rows += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.stack(rows)


def write_gguf(path, config, params, tokenizer=None, quantise=None, fields=None, arch=None, tensor_changes=None):
    """A GGUF file of a model. `fields` and `tensor_changes` replace or (None) drop metadata and tensors."""
    names = {
        tensor.name.huggingface.format(layer): tensor.name.gguf.format(layer)
        for tensor in tensors(config)
        for layer in range(config.n_layers)
    }
    arrays = {names[name]: give() for name, _, give in disassemble(config, params)}
    if config.norm_offset:
        for name in arrays:
            if name.endswith("norm.weight"):
                arrays[name] = arrays[name] + np.float32(config.norm_offset)
    if config.family == "llama":
        for name in arrays:
            if name.endswith(("attn_q.weight", "attn_k.weight")):
                heads = config.n_heads if "attn_q" in name else config.n_kv_heads
                arrays[name] = interleave(arrays[name], heads)
    arrays |= tensor_changes or {}
    metadata = {
        "context_length": config.max_positions,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        **(fields or {}),
    }
    arch = arch or {"gemma3_text": "gemma3"}.get(config.family, config.family)
    if arch == "gemma3":
        metadata = {"attention.sliding_window": config.window, **metadata}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if value is not None:
            kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            kind[type(value)](f"{arch}.{key}", value)
    if tokenizer is not None:
        vocab = json.loads(tokenizer._json)
        tokens = sorted(vocab["model"]["vocab"], key=vocab["model"]["vocab"].get)
        special = [token["content"] for token in vocab["added_tokens"]]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens + special)
        writer.add_token_types([1] * len(tokens) + [3] * len(special))
        writer.add_token_merges([])
        writer.add_eos_token_id(tokenizer.eos_ids[0])
        writer.add_pad_token_id(tokenizer.pad_id)
    for name, array in arrays.items():
        if array is None:
            continue
        if quantise is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def read_error(path) -> str:
    with pytest.raises(CheckpointError) as error:
        gguf_file.read_file(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def test_float32_is_read_bitwise(path, model, params, same_tree):
    config, read_params, _ = gguf_file.read_file(write_gguf(path, model.config, params))
    assert config == model.config
    same_tree(read_params, params)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 2e-2), ("Q5_1", 1e-1), ("Q4_1", 2e-1)]
)
def test_quantised_tensors_are_near(path, model, kind, tolerance):
    """Rows of at least 32 so that the blocks of every type fit."""
    config = dataclasses.replace(model.config, d_model=32, d_ff=64, head_dim=8, n_heads=4, n_kv_heads=2)
    shapes = jax.eval_shape(type(model)(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    write_gguf(path, config, params, quantise=gguf.GGMLQuantizationType[kind])
    _, read_params, _ = gguf_file.read_file(path)
    kernel = ("layers", "attention", "q", "kernel")
    ours, reference = read_params, params
    for key in kernel:
        ours, reference = ours[key], reference[key]
    assert 0 < np.abs(ours - reference).max() < tolerance * np.abs(reference).max()


def test_a_whole_file_with_tokenizer(path, model, params, tokenizer, same_tree):
    write_gguf(path, model.config, params, tokenizer)
    config, read_params, read_tokenizer = read(path)
    assert config == model.config
    same_tree(read_params, params)
    assert read_tokenizer.encode("naïve <eos>x") == tokenizer.encode("naïve <eos>x")
    assert (read_tokenizer.eos_ids, read_tokenizer.pad_id, read_tokenizer.bos_id) == ((257,), 258, None)


def test_truncated_and_foreign_files(path, model, params):
    data = write_gguf(path, model.config, params).read_bytes()
    for kept in (len(data) - 64, len(data) // 2, 3_000, 200, 30, 8):
        path.write_bytes(data[:kept])
        assert "truncated or damaged" in read_error(path)
    for foreign in (b"", b"PK\3\4 a zip"):
        path.write_bytes(foreign)
        assert "not a GGUF file" in read_error(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "gemma2"}, "architecture 'gemma2' is not supported; supported: llama, qwen3"),
        ({"fields": {"rope.scaling.type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"fields": {"expert_count": 8}}, "mixture of experts"),
        ({"fields": {"attention.head_count": [4, 4, 2]}}, "varies by layer"),
        ({"fields": {"attention.value_length": 2}}, "keys and values of different widths"),
        ({"fields": {"rope.dimension_count": 2}}, "a part of each head"),
        ({"fields": {"block_count": None}}, "block_count is missing"),
        ({"fields": {"block_count": 5}}, "missing from the weights"),
        ({"tensor_changes": {"rope_freqs.weight": np.array([1, 3], np.float32)}}, "not the rotary scaling of Llama 3"),
        ({"tensor_changes": {"rope_freqs.weight": np.full(7, 3, np.float32)}}, "not the rotary scaling of Llama 3"),
        ({"fields": {"rope.scaling.type": "linear"}}, "rope.scaling.factor is missing"),
        ({"tensor_changes": {"blk.0.attn_q.bias": np.ones(2, np.float32)}}, "layers with a bias are not supported"),
        ({"tensor_changes": {"blk.1.ffn_up.weight": None}}, "tensor blk.1.ffn_up.weight missing"),
        ({"tensor_changes": {"token_embd.weight": None}}, "tensor token_embd.weight missing"),
        ({"tensor_changes": {"output_norm.weight": np.ones(3, np.float32)}}, "output_norm.weight has shape [3]"),
        ({"tensor_changes": {"output_norm.weight": np.full(24, np.inf, np.float32)}}, "not finite"),
        ({"tensor_changes": {"output_norm.weight": np.ones(24, np.int8)}}, "of type I8 cannot be dequantised"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(path, model, params, changes, words):
    write_gguf(path, model.config, params, **changes)
    assert words in read_error(path)


QWEN2 = ModelConfig(
    family="qwen2", vocab_size=60, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=4, d_ff=40,
    rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, qkv_bias=True, max_positions=128,
)  # fmt: skip
LLAMA3 = ModelConfig(
    family="llama", vocab_size=60, d_model=24, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=40,
    rope_theta=500_000.0, norm_eps=1e-5, max_positions=131_072,
)  # fmt: skip
GEMMA3 = ModelConfig(
    family="gemma3_text", vocab_size=60, d_model=24, n_layers=7, n_heads=4, n_kv_heads=1, head_dim=8, d_ff=40,
    rope_theta=1e6, norm_eps=1e-6, max_positions=128, local_layers=(0, 1, 2, 3, 4, 6), window=16,
    local_rope_theta=10_000.0, query_scalar=8, **STRUCTURE["gemma3_text"],
)  # fmt: skip


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_qwen2_and_its_biases(path, same_tree):
    params = random_params(QWEN2)
    config, read_params, _ = gguf_file.read_file(write_gguf(path, QWEN2, params))
    assert config == QWEN2
    same_tree(read_params, params)


def test_gemma3_norms_are_stored_with_their_offset(path):
    params = random_params(GEMMA3)
    config, read_params, _ = gguf_file.read_file(write_gguf(path, GEMMA3, params))
    assert config == GEMMA3
    for (where, ours), (_, wanted) in zip(
        jax.tree_util.tree_leaves_with_path(read_params), jax.tree_util.tree_leaves_with_path(params), strict=True
    ):
        # 1 + scale is rounded in the file; nothing else is.
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-7 if where[-1].key == "scale" else 0)


def test_gemma3_27b_scales_its_queries_otherwise():
    fields = {
        "general.architecture": "gemma3", "gemma3.block_count": 62, "gemma3.attention.head_count": 32,
        "gemma3.attention.head_count_kv": 16, "gemma3.attention.key_length": 128, "gemma3.embedding_length": 5376,
        "gemma3.feed_forward_length": 21504, "gemma3.attention.sliding_window": 1024, "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0, "gemma3.context_length": 131072,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip

    class Embedding:
        shape = (5376, 262_208)

    config = gguf_file.config_from_fields(fields, {"token_embd.weight": Embedding}, "x.gguf")
    assert (config.query_scalar, config.rope_scaling, len(config.local_layers)) == (168, RopeScaling("linear", 8.0), 52)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_divisors_become_its_scaling(path, same_tree, factor):
    """The tensor by the published formula, one frequency at a time."""
    config = dataclasses.replace(LLAMA3, rope_scaling=RopeScaling("llama3", factor))
    divisors = []
    for i in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * i / config.head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert len({*divisors}) > 3
    params = random_params(config)
    write_gguf(path, config, params, tensor_changes={"rope_freqs.weight": np.array(divisors, np.float32)})
    read_config, read_params, _ = gguf_file.read_file(path)
    assert read_config == config
    same_tree(read_params, params)


def test_linear_scaling(path):
    config = dataclasses.replace(QWEN2, rope_scaling=RopeScaling("linear", 4.0))
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert gguf_file.read_file(write_gguf(path, config, random_params(config), fields=fields))[0] == config
