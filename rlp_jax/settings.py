# SPDX-License-Identifier: Apache-2.0
"""From the command line to a checked `Config`: experiment files and JSON, with overrides.py and validation.py.

No jax here: a typing error is answered at once.
"""

import dataclasses
import hashlib
import inspect
import json
import runpy
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlp_jax.config import FREE, CheckpointConfig, Config, ConfigError, MeshConfig, to_json, uncounted
from rlp_jax.nearest import suggest
from rlp_jax.overrides import override as override
from rlp_jax.validation import check_devices as check_devices
from rlp_jax.validation import validate as validate

PACKAGE = Path(__file__).resolve().parent
# In a checkout beside the package, in an installed wheel inside it.
EXPERIMENTS = (PACKAGE.parent / "experiments", PACKAGE / "experiments")


def load_experiment(name_or_file: str, arguments: Iterable[str] = ()) -> Config:
    """The config of `experiments/NAME.py`, or of a given .py file that defines `config() -> Config`.

    Args:
      name_or_file: as on the command line.
      arguments: "name=value", texts that the experiment's `config` takes by keyword.

    Raises:
      ConfigError: no such experiment, it takes no such argument, or the file does not give a Config.
    """
    if name_or_file.endswith(".py"):
        path = Path(name_or_file)
        if not path.is_file():
            raise ConfigError(f"experiment file {name_or_file} does not exist")
    else:
        candidates = [root / f"{name_or_file}.py" for root in EXPERIMENTS]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
        if path is None:
            raise ConfigError(f"unknown experiment {name_or_file!r}{suggest(name_or_file, experiments())}")
    try:
        function = runpy.run_path(str(path)).get("config")
        config = function(**_arguments(function, arguments)) if callable(function) else None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be used: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path} does not define `config()` that returns a rlp_jax.config.Config")
    return config


def _arguments(function: typing.Callable, arguments: Iterable[str]) -> dict[str, str]:
    known, given = list(inspect.signature(function).parameters), {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"--with {argument}: not an argument of this experiment, as name=value; {takes}")
        given[name] = value
    return given


def experiments() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted({str(p.relative_to(r).with_suffix("")) for r in EXPERIMENTS for p in _experiment_files(r)})


def _experiment_files(root: Path) -> Iterable[Path]:
    files = (path for path in root.rglob("*.py") if {"results", "benchmarks"}.isdisjoint(path.parts))
    return [path for path in files if "def config(" in path.read_text()]


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def from_json(text: str, where: str) -> Config:
    """The config that `config.to_json` wrote.

    Raises:
      ConfigError: not such a file.
    """

    def build(kind, values, prefix=""):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(values) - set(hints)) if isinstance(values, dict) else [values]
        if unknown:
            raise ConfigError(f"{where} is not a run's config.json: unknown setting {prefix}{unknown[0]}")
        built = {}
        for name, value in values.items():
            if dataclasses.is_dataclass(hints[name]):
                value = build(hints[name], value, f"{prefix}{name}.")
            built[name] = tuple(value) if isinstance(value, list) else value
        return kind(**built)

    try:
        return build(Config, json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not a run's config.json: {error}") from error


def read_config(run_dir: Path) -> Config:
    """The config of a run directory. Raises ConfigError where it has another version's."""
    file = Path(run_dir) / "config.json"
    return from_json(file.read_text(encoding="utf-8"), str(file))


def is_run(path: Path) -> bool:
    """Whether a path is a run directory rather than a model: a model's config.json has no optimizer."""
    file = Path(path) / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and {"rlp", "optimizer"} <= set(settings)


def experiment_of(model: str) -> Config | None:
    """The config of the first experiment that trains this model: how to frame a thought for it."""
    paths = [path for root in EXPERIMENTS for path in sorted(root.glob("*.py")) if "def config(" in path.read_text()]
    return next((config for config in map(load_experiment, map(str, paths)) if config.model == model), None)


def fingerprint(config: Config) -> str:
    """Of everything that decides a run's numbers step by step; a run with a constant learning rate may be extended,
    so its number of steps is left out. Devices change the rounding alone."""
    config = dataclasses.replace(config, mesh=MeshConfig(), checkpoint=CheckpointConfig())
    if config.optimizer.final_learning_rate is None:
        config = dataclasses.replace(config, steps=0)
    return hashlib.sha256(to_json(config, without=uncounted(config)).encode()).hexdigest()[:16]


def check_same_run(config: Config, recorded: Config, run_dir: Path) -> None:
    """A run directory is continued with the config it began with. `mesh`, `checkpoint`, `report` and how documents
    are read may change, and `steps` may grow where the learning rate is constant: a cosine's every step depends on the
    last.

    Raises:
      ConfigError: naming the fields that differ.
    """
    old, new = _flat(dataclasses.asdict(recorded)), _flat(dataclasses.asdict(config))
    free = ("mesh", "checkpoint", *FREE)
    differing = [name for name in new if new[name] != old[name] and not {name, name.split(".")[0]} & {*free}]
    if differing == ["steps"] and config.steps > recorded.steps and config.optimizer.final_learning_rate is None:
        return
    if differing:
        listed = ", ".join(f"{name} ({old[name]!r} there, {new[name]!r} here)" for name in differing)
        raise ConfigError(f"{run_dir} belongs to a run with another config: {listed}; choose another --run-dir")
