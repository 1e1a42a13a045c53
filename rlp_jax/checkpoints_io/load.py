# SPDX-License-Identifier: Apache-2.0
"""The way in and out: a preset name or a path becomes (model, params, tokenizer), and these become a directory."""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from rlp_jax.checkpoints_io import fetch, gguf_file, huggingface
from rlp_jax.checkpoints_io.leaves import HOST, Target
from rlp_jax.checkpoints_io.names import CheckpointError, Params
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.presets import CONFIGS, WEIGHTS, Packaged
from rlp_jax.models.transformer import LanguageModel, ModelConfig


class Loaded(NamedTuple):
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer


def resolve(path_or_preset: str | os.PathLike) -> pathlib.Path:
    """The directory or file behind a name; fetches weights where a preset needs it.

    Raises:
      CheckpointError: neither a preset with weights nor an existing path.
    """
    name = os.fspath(path_or_preset)
    source = WEIGHTS.get(name)
    if isinstance(source, Packaged):
        return pathlib.Path(__file__).parents[1] / source.directory
    if source is not None:
        return fetch.fetch(source)
    if pathlib.Path(name).exists():
        return pathlib.Path(name)
    if name in CONFIGS:
        raise CheckpointError(
            f"model {name!r} is a shape without weights: give the path of its Hugging Face directory or GGUF file, "
            f"or one of {', '.join(WEIGHTS)}"
        )
    close = difflib.get_close_matches(name.lower(), {**WEIGHTS, **CONFIGS}, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"presets with weights: {', '.join(WEIGHTS)}"
    raise CheckpointError(f"model {name!r} is neither a preset nor an existing directory or .gguf file; {hint}")


def load(
    path_or_preset: str | os.PathLike,
    compute_dtype: str = "float32",
    host: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    param_dtype: str = "float32",
) -> Loaded:
    """Reads a pretrained model, tensor by tensor into the memory where it stays.

    Beyond the parameters themselves (over a mesh: this process's shards of them) memory holds one tensor at a time.

    Args:
      path_or_preset: a name of `presets.WEIGHTS` ("quickstart", "smollm2-135m-instruct"), a Hugging Face directory,
        or a .gguf file.
      compute_dtype: "float32" or "bfloat16", what the model computes in.
      host: leave the parameters as numpy arrays.
      mesh: shard the parameters over it, by the rules of sharding.py.
      param_dtype: "float32", or "bfloat16" to hold a model that is not trained in half the memory.

    Returns:
      (model, params, tokenizer): params in the tree of ARCHITECTURE.md, on the mesh or else on the default device.

    Raises:
      CheckpointError: weights that are absent, damaged or not supported, or a tokenizer larger than the vocabulary.
      TokenizerError: an unreadable tokenizer.
    """
    target = Target(mesh, host, param_dtype)
    opened = open_model(path_or_preset, compute_dtype)
    return Loaded(opened.model, opened.read(target), opened.tokenizer)


class Opened(NamedTuple):
    """A model whose files have been checked and whose weights have not been read: `read(target)` gives the params."""

    model: LanguageModel
    tokenizer: Tokenizer
    read: Callable[[Target], Params]

    def abstract(self) -> Params:
        """The parameters' shapes and types (float32)."""
        return jax.eval_shape(self.model.init, jax.random.key(0))


def open_shape(
    path_or_preset: str | os.PathLike, compute_dtype: str = "float32"
) -> tuple[LanguageModel, Tokenizer | None]:
    """A model whose weights are not needed, and its tokenizer: of a published shape's name (`presets.CONFIGS`) nothing
    is read, and there is none; else its files are opened. Errors are those of `load`."""
    config = CONFIGS.get(os.fspath(path_or_preset))
    if config is not None:
        return LanguageModel(_with_dtype(config, compute_dtype)), None
    opened = open_model(path_or_preset, compute_dtype)
    return opened.model, opened.tokenizer


def open_model(path_or_preset: str | os.PathLike, compute_dtype: str = "float32") -> Opened:
    """Everything about a pretrained model but its weights' values. Arguments and errors are those of `load`."""
    config, tokenizer, read = _open(resolve(path_or_preset))
    return Opened(LanguageModel(_with_dtype(config, compute_dtype)), tokenizer, read)


def read(path: pathlib.Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """Config, numpy parameters and tokenizer of a Hugging Face directory or a GGUF file. Raises as `load` does."""
    config, tokenizer, read_params = _open(path)
    return config, read_params(HOST), tokenizer


def _open(path: pathlib.Path) -> tuple[ModelConfig, Tokenizer, Callable[[Target], Params]]:
    if path.is_dir():
        config, read_params = huggingface.open_directory(path)
        tokenizer = Tokenizer.from_directory(path)
    elif path.suffix == ".gguf":
        config, fields, read_params = gguf_file.open_file(path)
        tokenizer = Tokenizer.from_gguf(fields, str(path))
    else:
        raise CheckpointError(f"{path}: expected a Hugging Face directory or a .gguf file")
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
            "they do not belong together"
        )
    return config, tokenizer, read_params


def _with_dtype(config: ModelConfig, compute_dtype: str) -> ModelConfig:
    if compute_dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"compute_dtype is {compute_dtype!r}, expected 'float32' or 'bfloat16'")
    return dataclasses.replace(config, compute_dtype=compute_dtype)


def save_hf(
    directory: str | os.PathLike,
    model: LanguageModel,
    params: Params,
    tokenizer: Tokenizer | None,
    dtype: str = "float32",
) -> None:
    """Writes a Hugging Face directory that `load` and transformers read back: all of it or nothing.

    Args:
      directory: must not exist, or be empty.
      model, params, tokenizer: as `load` returns them.
      dtype: "float32" (stored bit for bit) or "bfloat16" (rounded to nearest).

    Raises:
      CheckpointError: the directory is not empty, the tree does not fit the model or holds values that are not finite,
        or the tokenizer is too large.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
        )
    huggingface.write_directory(directory, model.config, params, tokenizer, dtype=dtype)
