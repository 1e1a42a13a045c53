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

from rlp_jax.checkpoints_io.hf_config import config_from_json, config_to_json, token_ids
from rlp_jax.checkpoints_io.names import CheckpointError, Params, assemble, disassemble
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import ModelConfig

FLOATS = ("F32", "BF16", "F16", "F64")
SHARD_BYTES = 4 * 10**9


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
            _write_json(partial / "generation_config.json", token_ids(tokenizer))
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
