"""GGUF files, in: metadata to `ModelConfig`, quantised tensors to float32, tokenizer metadata to `Tokenizer`.

The `gguf` package parses the container and dequantises. What is ours is the meaning of the fields, and undoing the
row order of q and k in "llama" files, where each head's rotary pairs are interleaved instead of split in halves.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rlp_jax.checkpoints_io.hf_config import checked
from rlp_jax.checkpoints_io.leaves import HOST, Target
from rlp_jax.checkpoints_io.names import CheckpointError, Params, assemble, check
from rlp_jax.models.transformer import ModelConfig

ARCHITECTURES = ("llama", "qwen3")


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
        return array

    found = {name: _shape(tensor) for name, tensor in stored.items()}
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

    scaling = field("rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        kind = scaling if scaling != "none" else "llama3"
        raise CheckpointError(f"{source}: rope scaling {kind!r} is not supported")
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
    return checked(
        ModelConfig(
            family=arch,
            vocab_size=_shape(tensor_names["token_embd.weight"])[0],
            d_model=d_model,
            n_layers=field("block_count"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=field("feed_forward_length"),
            rope_theta=_short(field("rope.freq_base", 10_000.0)),
            norm_eps=_short(field("attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in tensor_names,
            qk_norm=arch == "qwen3",
            max_positions=field("context_length"),
        ),
        source,
    )


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
