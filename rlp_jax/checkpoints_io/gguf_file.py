# SPDX-License-Identifier: Apache-2.0
"""GGUF files, in: metadata to `ModelConfig`, quantised tensors to float32, tokenizer metadata to `Tokenizer`.

The `gguf` package parses the container and dequantises. What is ours is the meaning of the fields, and undoing what
converters do: in "llama" files each head's rotary pairs are interleaved instead of split in halves, and Llama 3's
rotary scaling is a tensor of divisors; in "gemma3" files the norms hold 1 + scale, and what all sizes have in common
(which layers are local, their rotary base) is left out.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlp_jax.checkpoints_io.hf_config import checked
from rlp_jax.checkpoints_io.leaves import HOST, Target
from rlp_jax.checkpoints_io.names import CheckpointError, Params, assemble, check
from rlp_jax.checkpoints_io.safetensors_file import shown
from rlp_jax.checkpoints_io.tables import STRUCTURE
from rlp_jax.models.layers import RopeScaling, rope_divisors
from rlp_jax.models.transformer import ModelConfig

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen2": "qwen2", "gemma3": "gemma3_text"}  # -> our family
_ROPE_DIVISORS = "rope_freqs.weight"


def read_file(path: str | os.PathLike) -> tuple[ModelConfig, Params, dict[str, Any]]:
    """Config, parameters (numpy float32) and all metadata of a GGUF file. Raises as `open_file` and `assemble` do."""
    config, fields, read_params = open_file(path)
    return config, read_params(HOST), fields


def open_file(path: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any], Callable[[Target], Params]]:
    """Config and all metadata of a GGUF file, and the function that reads its parameters into their place.

    Raises:
      CheckpointError: not GGUF, truncated, an unknown architecture or quantisation, or tensors that do not fit.
    """
    path = pathlib.Path(path)
    reader = _open(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = config_from_fields(fields, stored, str(path))

    def read(name: str) -> np.ndarray:
        from gguf import dequantize

        tensor = stored[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{path}: tensor {name} of type {tensor.tensor_type.name} cannot be dequantised ({error})"
            ) from None
        array = array.reshape(_shape(tensor))
        if config.family == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
            heads = config.n_heads if name.endswith(".attn_q.weight") else config.n_kv_heads
            array = split_halves(array, heads)
        if config.norm_offset and name.endswith("norm.weight"):
            array = array - np.float32(config.norm_offset)
        return array

    found = {name: _shape(tensor) for name, tensor in stored.items() if name != _ROPE_DIVISORS}
    check(config, "gguf", found, str(path))
    return config, fields, lambda target: assemble(config, "gguf", found, read, str(path), target)


def split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved pairs (0, E/2, 1, E/2 + 1, ...) back to halves. [N·E, D] -> [N·E, D]."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def config_from_fields(fields: dict[str, Any], tensor_names, source: str) -> ModelConfig:
    """A `ModelConfig` from GGUF metadata; the head is tied where the file holds no output.weight.

    Raises:
      CheckpointError: an unknown architecture, a missing field, or a feature the decoder does not have.
    """
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{source}: architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )

    def field(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise CheckpointError(f"{source}: metadata field {arch}.{key} is missing")
        return value

    if field("expert_count", 0):
        raise CheckpointError(f"{source}: mixture of experts ({arch}.expert_count) is not supported")
    n_heads, n_kv_heads = field("attention.head_count"), field("attention.head_count_kv", field("attention.head_count"))
    if not isinstance(n_heads, int) or not isinstance(n_kv_heads, int):
        raise CheckpointError(f"{source}: {arch}.attention.head_count varies by layer, which is not supported")
    d_model = field("embedding_length")
    head_dim = field("attention.key_length", d_model // n_heads)
    if field("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{source}: keys and values of different widths are not supported")
    if field("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{source}: rotary positions on a part of each head are not supported")
    if "token_embd.weight" not in tensor_names:
        raise CheckpointError(f"{source}: tensor token_embd.weight missing from the weights")
    rope_theta, n_layers = _short(field("rope.freq_base", 10_000.0)), field("block_count")
    return checked(
        ModelConfig(
            family=ARCHITECTURES[arch],
            **STRUCTURE[ARCHITECTURES[arch]],
            **(_gemma3_fields(field, n_layers, head_dim) if arch == "gemma3" else {}),
            vocab_size=_shape(tensor_names["token_embd.weight"])[0],
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=field("feed_forward_length"),
            rope_theta=rope_theta,
            rope_scaling=_rope_scaling(field, tensor_names, head_dim, rope_theta, source),
            norm_eps=_short(field("attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in tensor_names,
            max_positions=field("context_length"),
        ),
        source,
    )


def _rope_scaling(
    field: Callable, tensors: Mapping[str, Any], head_dim: int, theta: float, source: str
) -> RopeScaling | None:
    kind = field("rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", _short(field("rope.scaling.factor")))
    if kind != "none":
        raise CheckpointError(f"{source}: rope scaling {shown(repr(kind))} is not supported; supported: linear, llama3")
    if _ROPE_DIVISORS not in tensors:
        return None
    divisors = np.asarray(tensors[_ROPE_DIVISORS].data, np.float32)
    if np.all(divisors == 1):
        return None
    # The file has the result alone. Published Llama 3.1 and 3.2 share the other three numbers of the formula.
    scaling = RopeScaling("llama3", _short(divisors.max()))
    expected = rope_divisors(head_dim, theta, scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise CheckpointError(
            f"{source}: tensor {_ROPE_DIVISORS} is not the rotary scaling of Llama 3.1 or 3.2 (low 1, high 4, "
            f"{scaling.original_positions} positions): load the Hugging Face directory instead"
        )
    return scaling


def _gemma3_fields(field: Callable, n_layers: int, head_dim: int) -> dict[str, Any]:
    """What Gemma 3's files leave out: five local layers to a global one, and in the 27B (62 layers) its own scale."""
    return {
        "window": field("attention.sliding_window"),
        "local_layers": tuple(y for y in range(n_layers) if (y + 1) % 6),
        "local_rope_theta": _short(field("rope.freq_base_swa", 10_000.0)),
        "query_scalar": 168 if n_layers == 62 else head_dim,
    }


def _open(path: pathlib.Path):
    from gguf import GGUFReader

    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: truncated or damaged GGUF file ({error})") from None


def _shape(tensor) -> tuple[int, ...]:
    """GGUF lists the fastest axis first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _short(value: float) -> float:
    """The shortest decimal of a float32 field: 1e-5, where the file's float32 reads 9.999999747378752e-06."""
    return float(str(np.float32(value)))
