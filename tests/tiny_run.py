# SPDX-License-Identifier: Apache-2.0
"""A whole run in seconds: a model of 30,000 random parameters on disk, a few documents, and their config."""

import contextlib
import dataclasses
import json
import random
from pathlib import Path

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    ReportConfig,
    RLPConfig,
    Template,
)
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import LanguageModel, ModelConfig


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


LLAMA = ModelConfig(
    "llama", vocab_size=256, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=48, max_positions=64
)


def write_model(directory: Path, config: ModelConfig = LLAMA) -> Path:
    model = LanguageModel(config)
    save_hf(directory, model, model.init(jax.random.key(7)), byte_tokenizer())
    return directory


def write_documents(path: Path, count: int = 60) -> Path:
    random_ = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            letters = "".join(random_.choice("abcd") for _ in range(random_.randint(12, 28)))
            file.write(json.dumps({"text": f"{i} {letters}"}) + "\n")
    return path


def tiny_config(directory: Path, **changes) -> Config:
    """A config whose model and data are written below `directory`."""
    if not (directory / "model").exists():
        write_model(directory / "model")
        write_documents(directory / "documents.jsonl")
    config = Config(
        name="tiny",
        model=str(directory / "model"),
        steps=6,
        batch_documents=4,
        template=Template(instruction="", open="<", close=">"),
        rlp=RLPConfig(group_size=2, thought_tokens=5, horizon=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        data=DataConfig(sources=(str(directory / "documents.jsonl"),), document_tokens=32, heldout_fraction=0.2),
        eval=EvalConfig(every=4, documents=4, batch_documents=4, group_size=2),
        report=ReportConfig(documents=0),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    return dataclasses.replace(config, **changes)


def compilation(cache: Path) -> dict:
    """Settings, as environment variables, under which programs are compiled in haste and shared between runs."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
    }


@contextlib.contextmanager
def hasty_compilation(cache: Path):
    """The same within this process."""
    settings = {name.lower(): value for name, value in compilation(cache).items()}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
