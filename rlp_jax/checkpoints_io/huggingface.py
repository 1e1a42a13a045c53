# SPDX-License-Identifier: Apache-2.0
"""Hugging Face model directories, in and out: config.json, safetensors (one file or shards), generation_config.json.

Only safetensors is read: a pickled file (pytorch_model.bin) runs code when opened. A directory is somebody else's: its
files may lie about themselves and link to places they should not, so all of it is checked before weights are read.
"""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from rlp_jax.checkpoints_io import nemotron_h
from rlp_jax.checkpoints_io.hf_config import config_from_json, config_to_json, token_ids
from rlp_jax.checkpoints_io.leaves import HOST, Target
from rlp_jax.checkpoints_io.names import CheckpointError, Params, assemble, check, disassemble
from rlp_jax.checkpoints_io.safetensors_file import (
    BYTES,
    FLOATS,
    MAX_JSON,
    Entry,
    parse_json,
    read_header,
    shown,
    write_file,
)
from rlp_jax.checkpoints_io.tables import tensors
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import ModelConfig

SHARD_BYTES = 4 * 10**9
COMPARE_BYTES = 32 * 2**20
STORED = {"float32": "F32", "bfloat16": "BF16"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: absent, too long, undecodable, or not an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON + 1), str(path))


def read_directory(directory: str | os.PathLike, target: Target = HOST) -> tuple[ModelConfig, Params]:
    """Config and parameters of a Hugging Face model directory. Raises as `open_directory` and `names.assemble` do."""
    config, read = open_directory(directory)
    return config, read(target)


def open_directory(directory: str | os.PathLike) -> tuple[ModelConfig, Callable[[Target], Params]]:
    """Config of a Hugging Face model directory, and the function that reads its parameters into their place.

    Everything but the values of the weights has been checked then: names, shapes, types, files, links.

    Raises:
      CheckpointError: see `config_from_json`, `names.check`, `safetensors_file.read_header`; also absent or pickled
        weight files, a tensor in two files, and files that are links out of the directory.
    """
    directory = pathlib.Path(directory)
    for file in TEXT_FILES:
        refuse_links_outside(directory / file)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json, so not a Hugging Face model directory")
    config = config_from_json(read_json(directory / "config.json"), str(directory / "config.json"))
    located: dict[str, Entry] = {}
    for file, wanted in _weight_files(directory).items():
        refuse_links_outside(directory / file)
        present = read_header(directory / file)
        if absent := sorted(wanted - present.keys()):
            raise CheckpointError(f"{directory / file}: tensor {shown(absent[0])} is missing, which the index promises")
        if twice := sorted(present.keys() & located.keys()):
            raise CheckpointError(
                f"{directory / file}: tensor {shown(twice[0])} is in {located[twice[0]].path.name} too"
            )
        located |= present
    # Old exports store the rotary table, a constant.
    located = {name: entry for name, entry in located.items() if not name.endswith("rotary_emb.inv_freq")}
    for name, entry in located.items():
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{entry.path}: tensor {shown(name)} is stored as {entry.dtype}; supported: {', '.join(FLOATS)}"
            )
    if config.family == nemotron_h.MODEL_TYPE:
        located = nemotron_h.published_names(located)
    head = located.pop("lm_head.weight", None) if config.tie_embeddings else None
    found = {name: entry.shape for name, entry in located.items()}
    check(config, "huggingface", found, str(directory))

    def read(target: Target) -> Params:
        if head is not None:
            name = next(t.name.huggingface for t in tensors(config) if t.name.path == "embed/embedding")
            _check_tied_head(head, name, located[name], directory)
        return assemble(config, "huggingface", found, located.__getitem__, str(directory), target)

    return config, read


def refuse_links_outside(path: pathlib.Path) -> None:
    """Checks that a file of a model directory, if it exists, lies in it.

    The model cache of huggingface_hub is allowed: its snapshots hold links into the blobs of the same model,
    models--NAME/snapshots/REVISION/FILE -> models--NAME/blobs/HASH.

    Raises:
      CheckpointError: a symbolic link to elsewhere.
    """
    try:
        home = path.parent.resolve()
        real = path.resolve()
    except (OSError, RuntimeError):  # a loop
        raise CheckpointError(f"{path}: a symbolic link that leads nowhere") from None
    cache = home.parent.parent
    blobs = cache / "blobs" if home.parent.name == "snapshots" and cache.name.startswith("models--") else home
    if not (real.is_relative_to(home) or real.parent == blobs):
        raise CheckpointError(
            f"{path}: a symbolic link out of the model directory (to {shown(str(real))}): put the file itself there"
        )


def _check_tied_head(head: Entry, name: str, embedding: Entry, directory: pathlib.Path) -> None:
    """Some tied checkpoints store the head too: it is dropped, if it is the embedding."""
    rows = max(1, COMPARE_BYTES // (8 * embedding.shape[1]))
    if head.shape != embedding.shape or not all(
        np.array_equal(head[first : first + rows], embedding[first : first + rows])
        for first in range(0, head.shape[0], rows)
    ):
        raise CheckpointError(
            f"{directory}: tensor lm_head.weight differs from {name}, but config.json ties them: "
            "set tie_word_embeddings to false"
        )


def _weight_files(directory: pathlib.Path) -> dict[str, set[str]]:
    """File name -> the tensors the index places there (none without an index)."""
    index_path = directory / INDEX
    if (directory / SINGLE).is_file():
        return {SINGLE: set()}
    if not index_path.is_file():
        if pickled := sorted(path.name for path in directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{directory / pickled[0]}: pickled weights are not read, they can run code; convert to safetensors"
            )
        raise CheckpointError(f"{directory}: no {SINGLE} and no {INDEX}")
    refuse_links_outside(index_path)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        # A plain name cannot leave the directory, whatever the platform's separators.
        plain = isinstance(file, str) and file.isprintable() and not any(mark in file for mark in "/\\:")
        if not plain or not file.endswith(".safetensors") or len(file) > 255:
            raise CheckpointError(
                f"{index_path}: tensor {shown(tensor)} points to {shown(repr(file))}, expected the name of a "
                ".safetensors file"
            )
        files.setdefault(file, set()).add(tensor)
    return files


def write_directory(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "float32",
) -> None:
    """Writes a Hugging Face directory that transformers loads: all of it or nothing.

    Args:
      directory: must not exist, or be empty.
      config: the model's.
      params: the tree of ARCHITECTURE.md, numpy or jax arrays.
      tokenizer: its files are written too.
      shard_bytes: larger models are split into files of at most this size (a tensor is never split).
      dtype: "float32" (bit for bit) or "bfloat16" (rounded to nearest), what is stored.

    Raises:
      CheckpointError: the directory is not empty, or the parameters do not fit the config or are not finite.
    """
    if dtype not in STORED:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(STORED)}")
    directory = pathlib.Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: already exists and is not an empty directory; choose another")
    entries = disassemble(config, params)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_json(partial / "config.json", config_to_json(config, tokenizer) | {"torch_dtype": dtype})
        if tokenizer:
            tokenizer.save(partial)
            _write_json(partial / "generation_config.json", token_ids(tokenizer))
        _write_weights(partial, entries, shard_bytes, STORED[dtype])
        _open_permissions(partial)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(directory: pathlib.Path, entries: list, shard_bytes: int, dtype: str) -> None:
    shards, room = [], 0
    for entry in entries:
        size = BYTES[dtype] * int(np.prod(entry[1]))
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard, dtype)
        weight_map.update(dict.fromkeys((name for name, _, _ in shard), file))
    if len(shards) > 1:
        total = sum(BYTES[dtype] * int(np.prod(shape)) for _, shape, _ in entries)
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _open_permissions(directory: pathlib.Path) -> None:
    """mkdtemp and safetensors make private files: give them the permissions any new file has."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~mask)
    directory.chmod(0o777 & ~mask)
