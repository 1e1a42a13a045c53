# SPDX-License-Identifier: Apache-2.0
"""RLP, reinforcement as a pretraining objective, in JAX.

    import rlp_jax as rlp

    config = rlp.experiment("quickstart")                       # settings: rlp.Config, varied with dataclasses.replace
    summary = rlp.train(config, "runs/mine")                    # trains, or goes on with that run
    thoughts = rlp.sample("runs/mine", "c flip turn swap = e .", position=5)
    rlp.evaluate("runs/mine", "gain")
    rlp.export("runs/mine", "exported")                         # a Hugging Face directory
    rlp.report("runs/mine")                                     # figures and report.html

    model, params, tokenizer = rlp.load("quickstart")           # or a Hugging Face directory, a GGUF file
    logits_BTV, cache = model.apply(params, tokens_BT)
    branches = rlp.fork(cache, prefix_length_BR)                # thoughts that share their documents' prefix

`rlp_jax.objective` holds the algorithm alone and needs nothing but jax and chex. Everything is imported when it is
first used: `import rlp_jax` itself brings nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlp_jax import objective as objective
    from rlp_jax.api import Thought, Thoughts, evaluate, experiment, export, report, sample, train
    from rlp_jax.checkpoints_io.load import Loaded, load
    from rlp_jax.config import (
        CheckpointConfig,
        Config,
        ConfigError,
        CPTConfig,
        DataConfig,
        EvalConfig,
        MeshConfig,
        OptimizerConfig,
        ReportConfig,
        RLPConfig,
        RLVRConfig,
        RPTConfig,
        SFTConfig,
        SuiteConfig,
        Template,
    )
    from rlp_jax.models.cache import fork
    from rlp_jax.models.transformer import LanguageModel

__all__ = [
    "CPTConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LanguageModel",
    "Loaded",
    "MeshConfig",
    "OptimizerConfig",
    "RLPConfig",
    "RLVRConfig",
    "RPTConfig",
    "ReportConfig",
    "SFTConfig",
    "SuiteConfig",
    "Template",
    "Thought",
    "Thoughts",
    "evaluate",
    "experiment",
    "export",
    "fork",
    "load",
    "objective",
    "report",
    "sample",
    "train",
]

_ELSEWHERE = {
    "LanguageModel": "rlp_jax.models.transformer",
    "Loaded": "rlp_jax.checkpoints_io.load",
    "fork": "rlp_jax.models.cache",
    "load": "rlp_jax.checkpoints_io.load",
}
_API = {"Thought", "Thoughts", "evaluate", "experiment", "export", "report", "sample", "train"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for: `rlp --help` and `rlp_jax.objective` stay light."""
    if name not in __all__:
        raise AttributeError(f"module 'rlp_jax' has no attribute {name!r}")
    if name == "objective":
        return import_module("rlp_jax.objective")
    home = _ELSEWHERE.get(name, "rlp_jax.api" if name in _API else "rlp_jax.config")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`train` and `report` are functions here and modules below: importing the modules must not hide the functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _API and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
