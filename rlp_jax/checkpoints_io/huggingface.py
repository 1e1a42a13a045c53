"""Hugging Face model directories, in and out: config.json, safetensors (one file or shards), generation_config.json.

Only safetensors is read: a pickled file (pytorch_model.bin) runs code when opened.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors looks up)
import numpy as np

from rlp_jax.checkpoints_io.names import CheckpointError, Params, assemble, disassemble
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import ModelConfig

MODEL_TYPES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FLOATS = ("F32", "BF16", "F16", "F64")
SHARD_BYTES = 4 * 10**9
_KEY_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: absent, undecodable, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def config_from_json(fields: dict[str, Any], source: str) -> ModelConfig:
    """A `ModelConfig` from the fields of config.json, with the defaults of the reference implementation.

    Args:
      fields: the parsed config.json.
      source: its path, for messages.

    Raises:
      CheckpointError: an unknown architecture, a missing field, or a feature the decoder does not have.
    """
    family = fields.get("model_type")
    if family not in MODEL_TYPES:
        raise CheckpointError(f"{source}: model_type {family!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    _refuse_unsupported(fields, source)
    sizes = {ours: _positive_int(fields, theirs, source) for ours, theirs in _KEY_NAMES.items()}
    n_heads = sizes["n_heads"]
    default_head_dim = 128 if family == "qwen3" else sizes["d_model"] // n_heads
    default_kv_heads = 32 if family == "qwen3" else n_heads
    rope = fields.get("rope_parameters") or {}
    return checked(
        ModelConfig(
            family=family,
            **sizes,
            n_kv_heads=_positive_int(fields, "num_key_value_heads", source, default_kv_heads),
            head_dim=_positive_int(fields, "head_dim", source, default_head_dim),
            rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            max_positions=_positive_int(fields, "max_position_embeddings", source, 2_048),
        ),
        source,
    )


def checked(config: ModelConfig, source: str) -> ModelConfig:
    """The config, if its head counts can work."""
    if config.n_heads % config.n_kv_heads:
        raise CheckpointError(
            f"{source}: {config.n_heads} query heads cannot share {config.n_kv_heads} key/value heads evenly"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{source}: head_dim {config.head_dim} is odd, rotary positions need an even one")
    return config


def _refuse_unsupported(fields: dict[str, Any], source: str) -> None:
    rope = {**(fields.get("rope_parameters") or {}), **(fields.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(fields.get("layer_types") or ())
    refused = {
        f"rope scaling {kind!r}": kind != "default",
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        f"hidden_act {fields.get('hidden_act')!r}": fields.get("hidden_act", "silu") not in ("silu", "swish"),
        "sliding-window attention": bool(fields.get("use_sliding_window")) or not layer_types <= {"full_attention"},
        "partial_rotary_factor": rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0,
        "quantization_config (load the unquantised weights)": bool(fields.get("quantization_config")),
    }
    for feature, present in refused.items():
        if present:
            raise CheckpointError(f"{source}: {feature} is not supported")


def _positive_int(fields: dict[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = fields.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{source}: field {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive integer")
    return value


def read_directory(directory: str | os.PathLike) -> tuple[ModelConfig, Params]:
    """Config and parameters (numpy float32) of a Hugging Face model directory.

    Raises:
      CheckpointError: see `config_from_json`, `names.assemble`; also absent, truncated or pickled weight files.
    """
    directory = pathlib.Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json, so not a Hugging Face model directory")
    config = config_from_json(read_json(directory / "config.json"), str(directory / "config.json"))
    with contextlib.ExitStack() as stack:
        located = {}
        for file, wanted in _weight_files(directory).items():
            handle = _open(directory / file, stack)
            present = set(handle.keys())
            if wanted is not None and (absent := sorted(wanted - present)):
                raise CheckpointError(f"{directory / file}: tensor {absent[0]} is missing, which the index promises")
            located.update(dict.fromkeys(present, (directory / file, handle)))
        # Old exports store the rotary table, a constant.
        located = {name: value for name, value in located.items() if not name.endswith("rotary_emb.inv_freq")}

        def read(name: str) -> np.ndarray:
            file, handle = located[name]
            if (dtype := handle.get_slice(name).get_dtype()) not in FLOATS:
                raise CheckpointError(f"{file}: tensor {name} is stored as {dtype}; supported: {', '.join(FLOATS)}")
            return handle.get_tensor(name)

        if config.tie_embeddings and "lm_head.weight" in located:
            _check_tied_head(read, located, directory)
        found = {name: tuple(handle.get_slice(name).get_shape()) for name, (_, handle) in located.items()}
        return config, assemble(config, "huggingface", found, read, str(directory))


def _check_tied_head(read, located: dict, directory: pathlib.Path) -> None:
    """Some tied checkpoints store the head too: drop it, if it is the embedding."""
    embedding = "model.embed_tokens.weight"
    if embedding in located and not np.array_equal(read("lm_head.weight"), read(embedding)):
        raise CheckpointError(
            f"{directory}: tensor lm_head.weight differs from {embedding}, but config.json ties them: "
            "set tie_word_embeddings to false"
        )
    del located["lm_head.weight"]


def _weight_files(directory: pathlib.Path) -> dict[str, set[str] | None]:
    """File name -> the tensors the index places there (None: no index)."""
    index_path = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return {"model.safetensors": None}
    if not index_path.is_file():
        if pickled := sorted(path.name for path in directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{directory / pickled[0]}: pickled weights are not read, they can run code; convert to safetensors"
            )
        raise CheckpointError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    files: dict[str, set[str] | None] = {}
    for tensor, file in weight_map.items():
        # A plain name cannot leave the directory, whatever the platform's separators.
        if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
            raise CheckpointError(f"{index_path}: tensor {tensor} points to {file!r}, expected a file name")
        files.setdefault(file, set()).add(tensor)
    return files


def _open(path: pathlib.Path, stack: contextlib.ExitStack):
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        return stack.enter_context(safe_open(path, framework="np"))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def config_to_json(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The fields of config.json that transformers needs to rebuild the model."""
    fields = {
        "architectures": [MODEL_TYPES[config.family]],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in _KEY_NAMES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
    }
    return fields | (_token_ids(tokenizer) if tokenizer else {})


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    eos = list(tokenizer.eos_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_id,
    }


def write_directory(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory that transformers loads: all of it or nothing.

    Args:
      directory: must not exist, or be empty.
      config: the model's.
      params: the tree of ARCHITECTURE.md, numpy or jax arrays; stored as float32.
      tokenizer: its files are written too.
      shard_bytes: larger models are split into files of at most this size (a tensor is never split).

    Raises:
      CheckpointError: the directory is not empty, or the parameters do not fit the config.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: already exists and is not an empty directory; choose another")
    entries = disassemble(config, params)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_json(partial / "config.json", config_to_json(config, tokenizer))
        if tokenizer:
            tokenizer.save(partial)
            _write_json(partial / "generation_config.json", _token_ids(tokenizer))
        _write_weights(partial, entries, shard_bytes)
        _open_permissions(partial)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(directory: pathlib.Path, entries: list, shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    shards, room = [], 0
    for entry in entries:
        size = 4 * int(np.prod(entry[1]))
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: read() for name, _, read in shard}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys((name for name, _, _ in shard), file))
    if len(shards) > 1:
        total = sum(4 * int(np.prod(shape)) for _, shape, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _open_permissions(directory: pathlib.Path) -> None:
    """mkdtemp and safetensors make private files: give them the permissions any new file has."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)
    directory.chmod(0o777 & ~mask)
