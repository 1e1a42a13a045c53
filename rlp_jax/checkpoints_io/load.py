"""The way in and out: a preset name or a path becomes (model, params, tokenizer), and these become a directory."""

import dataclasses
import difflib
import os
import pathlib
from typing import NamedTuple

import jax

from rlp_jax.checkpoints_io import fetch, gguf_file, huggingface
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
    close = difflib.get_close_matches(name.lower(), WEIGHTS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"presets with weights: {', '.join(WEIGHTS)}"
    raise CheckpointError(f"model {name!r} is neither a preset nor an existing directory or .gguf file; {hint}")


def load(path_or_preset: str | os.PathLike, compute_dtype: str = "float32", host: bool = False) -> Loaded:
    """Reads a pretrained model.

    Args:
      path_or_preset: a name of `presets.WEIGHTS` ("quickstart", "smollm2-135m-instruct"), a Hugging Face directory,
        or a .gguf file.
      compute_dtype: "float32" or "bfloat16", what the model computes in; parameters are float32 always.
      host: leave the parameters as numpy arrays, for models that must be sharded before they fit a device.

    Returns:
      (model, params, tokenizer): params in the tree of ARCHITECTURE.md, on the default device unless `host`.

    Raises:
      CheckpointError: weights that are absent, damaged or not supported, or a tokenizer larger than the vocabulary.
      TokenizerError: an unreadable tokenizer.
    """
    config, params, tokenizer = read(resolve(path_or_preset))
    model = LanguageModel(_with_dtype(config, compute_dtype))
    return Loaded(model, params if host else jax.tree.map(jax.device_put, params), tokenizer)


def read(path: pathlib.Path) -> tuple[ModelConfig, Params, Tokenizer]:
    """Config, numpy parameters and tokenizer of a Hugging Face directory or a GGUF file. Raises as `load` does."""
    if path.is_dir():
        tokenizer = Tokenizer.from_directory(path)
        config, params = huggingface.read_directory(path)
    elif path.suffix == ".gguf":
        config, params, fields = gguf_file.read_file(path)
        tokenizer = Tokenizer.from_gguf(fields, str(path))
    else:
        raise CheckpointError(f"{path}: expected a Hugging Face directory or a .gguf file")
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
            "they do not belong together"
        )
    return config, params, tokenizer


def _with_dtype(config: ModelConfig, compute_dtype: str) -> ModelConfig:
    if compute_dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"compute_dtype is {compute_dtype!r}, expected 'float32' or 'bfloat16'")
    return dataclasses.replace(config, compute_dtype=compute_dtype)


def save_hf(directory: str | os.PathLike, model: LanguageModel, params: Params, tokenizer: Tokenizer | None) -> None:
    """Writes a Hugging Face directory that `load` and transformers read back: all of it or nothing.

    Args:
      directory: must not exist, or be empty.
      model, params, tokenizer: as `load` returns them; float32 is stored, bit for bit.

    Raises:
      CheckpointError: the directory is not empty, the tree does not fit the model, or the tokenizer is too large.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}"
        )
    huggingface.write_directory(directory, model.config, params, tokenizer)
