"""From the command line to a checked `Config`: experiment files, `--set` overrides, JSON, and what cannot work.

No jax here: a typing error is answered at once.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import re
import runpy
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from rlp_jax.config import (
    RESPONDING,
    WITHOUT_THOUGHTS,
    CheckpointConfig,
    Config,
    ConfigError,
    MeshConfig,
    ReportConfig,
    RLPConfig,
    to_json,
)

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
            known = sorted({str(p.relative_to(r).with_suffix("")) for r in EXPERIMENTS for p in _experiment_files(r)})
            raise ConfigError(f"unknown experiment {name_or_file!r}{_suggest(name_or_file, known)}")
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


def _experiment_files(root: Path) -> Iterable[Path]:
    files = (path for path in root.rglob("*.py") if {"results", "benchmarks"}.isdisjoint(path.parts))
    return [path for path in files if "def config(" in path.read_text()]


def override(config: Config, assignments: Iterable[str]) -> Config:
    """The config with `field=value` and `section.field=value` applied, each value read as its field's type.

    Raises:
      ConfigError: an unknown field (with the nearest names) or a value that its type does not allow.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write field=value, for instance rlp.group_size=8")
        config = _replace(config, name.strip(), name.strip().split("."), text)
    return config


def _replace(node: Any, name: str, path: list[str], text: str) -> Any:
    hints = typing.get_type_hints(type(node))
    head, *rest = path
    if head not in hints:
        prefix = name.removesuffix(".".join(path))
        near = _suggest(name, [prefix + hint for hint in hints] + ([] if prefix else _all_fields()))
        raise ConfigError(f"unknown setting {name!r}{near}")
    value = getattr(node, head)
    if dataclasses.is_dataclass(value):
        if not rest:
            raise ConfigError(f"{name} is a group of settings: set one of {', '.join(_field_names(value))}")
        return dataclasses.replace(node, **{head: _replace(value, name, rest, text)})
    if rest:
        raise ConfigError(f"unknown setting {name!r}: {name.removesuffix('.' + '.'.join(rest))} has no parts")
    return dataclasses.replace(node, **{head: _parse(name, hints[head], text)})


def _parse(name: str, hint: Any, text: str) -> Any:
    """The text as a value of the annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in args:
            raise ConfigError(f"{name} is {text!r}: choose one of {', '.join(args)}")
        return text
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in args:
            return None
        return _parse(name, next(arg for arg in args if arg is not type(None)), text)
    if origin is tuple:
        return tuple(_parse(name, args[0], part.strip()) for part in text.split(",") if part.strip())
    if hint is bool:
        values = {"true": True, "false": False, "1": True, "0": False}
        if text.lower() not in values:
            raise ConfigError(f"{name} is {text!r}: write true or false")
        return values[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ConfigError(f"{name} is {text!r}: write {kind}") from None
    return text


def _field_names(node: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(node)]


def _all_fields() -> list[str]:
    return list(_flat(dataclasses.asdict(Config())))


def _suggest(name: str, known: list[str]) -> str:
    """The nearest of the known names: those that end alike (`group_size` -> `rlp.group_size`), then by spelling within
    the same section, where a common "rlp." says nothing."""
    section, _, last = name.rpartition(".")
    near = [other for other in known if other.rpartition(".")[2] == last]
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    close = [beside[other] for other in difflib.get_close_matches(last, beside, n=3, cutoff=0.6)]
    near += [other for other in close or difflib.get_close_matches(name, known, n=3, cutoff=0.6) if other not in near]
    if near:
        return f": did you mean {' or '.join(near[:3])}?"
    return f": there are {', '.join(known)}" if known else ""


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
    config = dataclasses.replace(config, mesh=MeshConfig(), checkpoint=CheckpointConfig(), report=ReportConfig())
    if config.optimizer.final_learning_rate is None:
        config = dataclasses.replace(config, steps=0)
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def check_same_run(config: Config, recorded: Config, run_dir: Path) -> None:
    """A run directory is continued with the config it began with. `mesh`, `checkpoint` and `report` may change, and
    `steps` may grow where the learning rate is constant: a cosine's every step depends on the last.

    Raises:
      ConfigError: naming the fields that differ.
    """
    old, new = _flat(dataclasses.asdict(recorded)), _flat(dataclasses.asdict(config))
    free = ("mesh", "checkpoint", "report")
    differing = [name for name in new if new[name] != old[name] and name.split(".")[0] not in free]
    if differing == ["steps"] and config.steps > recorded.steps and config.optimizer.final_learning_rate is None:
        return
    if differing:
        listed = ", ".join(f"{name} ({old[name]!r} there, {new[name]!r} here)" for name in differing)
        raise ConfigError(f"{run_dir} belongs to a run with another config: {listed}; choose another --run-dir")


def validate(config: Config) -> None:
    """Checks every setting that can be checked without model, data and devices.

    Raises:
      ConfigError: the first setting that cannot work.
    """
    rlp, data, evaluation, optimizer = config.rlp, config.data, config.eval, config.optimizer
    if rlp.group_size < 2:
        raise ConfigError(f"rlp.group_size is {rlp.group_size}: a group-relative advantage needs at least 2 thoughts")
    if config.report.group_size < 2:
        raise ConfigError(f"report.group_size is {config.report.group_size}: advantages need at least 2 thoughts")
    at_least_one = {
        "steps": config.steps,
        "batch_documents": config.batch_documents,
        "max_skipped": config.max_skipped,
        "rlp.positions": rlp.positions,
        "rlp.horizon": rlp.horizon,
        "rlp.thought_tokens": rlp.thought_tokens,
        "rlp.updates_per_batch": rlp.updates_per_batch,
        "rlp.minibatches": rlp.minibatches,
        "rlp.microbatches": rlp.microbatches,
        "cpt.sequence_tokens": config.cpt.sequence_tokens,
        "sft.sequence_tokens": config.sft.sequence_tokens,
        "rpt.rounds": config.rpt.rounds,
        "rpt.entropy_top": config.rpt.entropy_top,
        "data.document_tokens": data.document_tokens,
        "data.min_tokens": data.min_tokens,
        "data.heldout_documents": data.heldout_documents,
        "eval.documents": evaluation.documents,
        "eval.positions": evaluation.positions,
        "eval.group_size": evaluation.group_size,
        "eval.batch_documents": evaluation.batch_documents,
        "report.positions": config.report.positions,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    not_negative = {
        "seed": config.seed,
        "eval.every": evaluation.every,
        "report.documents": config.report.documents,
        "rlp.top_k": rlp.top_k,
        "rlp.slots": rlp.slots,
        "rlp.importance_cap": rlp.importance_cap,
        "rlp.clip_high": rlp.clip_high,
        "rlp.kl_coefficient": rlp.kl_coefficient,
        "rpt.entropy_threshold": config.rpt.entropy_threshold,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.warmup_steps": optimizer.warmup_steps,
        "checkpoint.keep_every": config.checkpoint.keep_every,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise ConfigError(f"{name} is {value}: it must not be negative")
    if config.checkpoint.keep_every % config.checkpoint.every:
        raise ConfigError(
            f"checkpoint.keep_every is {config.checkpoint.keep_every}: only multiples of checkpoint.every, "
            f"{config.checkpoint.every}, are saved"
        )
    positive = {
        "rlp.temperature": rlp.temperature,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.clip_norm": optimizer.clip_norm,
    }
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}: it must be positive and finite")
    below_one = {
        "rlp.clip_low": rlp.clip_low,
        "rlp.ema_decay": rlp.ema_decay,
        "rlp.min_p": rlp.min_p,
        "optimizer.beta1": optimizer.beta1,
        "optimizer.beta2": optimizer.beta2,
        "data.heldout_fraction": data.heldout_fraction,
    }
    for name, value in below_one.items():
        if not 0 <= value < 1 and not (name in ("rlp.clip_low", "rlp.ema_decay") and value == 1):
            raise ConfigError(f"{name} is {value}: it must be at least 0 and below 1")
    if rlp.rollout_dtype == "int8" and importlib.util.find_spec("qwix") is None:
        raise ConfigError("rlp.rollout_dtype is 'int8', which needs a library: pip install 'rlp_jax[int8]'")
    if not 0 < rlp.top_p <= 1:
        raise ConfigError(f"rlp.top_p is {rlp.top_p}: it must be above 0 and at most 1")
    if data.heldout_fraction == 0:
        raise ConfigError("data.heldout_fraction is 0: the run's evaluation needs held-out documents")
    if optimizer.final_learning_rate is not None and not optimizer.final_learning_rate >= 0:
        raise ConfigError(f"optimizer.final_learning_rate is {optimizer.final_learning_rate}: it must not be negative")
    updates = config.steps * config.updates
    if optimizer.warmup_steps >= updates:
        raise ConfigError(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, the run has {updates} updates: make it smaller"
        )
    if rlp.horizon >= data.document_tokens:
        raise ConfigError(
            f"rlp.horizon is {rlp.horizon}, data.document_tokens {data.document_tokens}: a document cannot hold a "
            "prefix and the horizon"
        )
    if config.batch_documents % (rlp.microbatches * rlp.minibatches):
        raise ConfigError(
            f"batch_documents is {config.batch_documents}, not a multiple of rlp.microbatches {rlp.microbatches}"
            + (f" times rlp.minibatches {rlp.minibatches}" if rlp.minibatches > 1 else "")
        )
    if evaluation.batch_documents < 2 or evaluation.documents < 2:
        name = "eval.batch_documents" if evaluation.batch_documents < 2 else "eval.documents"
        raise ConfigError(f"{name} is 1: the shuffled control needs the thought of another document, so at least 2")
    if config.mesh.rollout_tensor < 0 or (config.mesh.rollout_tensor and config.mesh.rollout != "gathered"):
        raise ConfigError(
            f"mesh.rollout_tensor is {config.mesh.rollout_tensor}: it is 0, or devices that sample from weights "
            "gathered once, with mesh.rollout=gathered"
        )
    if config.algorithm in WITHOUT_THOUGHTS:
        _validate_without_thoughts(config)
    if config.algorithm in RESPONDING:
        _validate_responding(config)
    if not config.model:
        raise ConfigError("model is empty: give a preset, a Hugging Face directory or a GGUF file")
    if not data.sources:
        raise ConfigError("data.sources is empty: give .jsonl or .txt files, or a built-in generator")


def _validate_without_thoughts(config: Config) -> None:
    if config.rlp.kl_coefficient > 0:
        raise ConfigError(
            f"rlp.kl_coefficient is {config.rlp.kl_coefficient}, and algorithm {config.algorithm} samples no thoughts "
            "that it could hold back: set it to 0"
        )
    sequence_tokens = getattr(config, config.algorithm).sequence_tokens
    if sequence_tokens < config.data.document_tokens:
        raise ConfigError(
            f"{config.algorithm}.sequence_tokens is {sequence_tokens}, data.document_tokens "
            f"{config.data.document_tokens}: a sequence has to hold the longest document"
        )
    try:
        re.compile(config.sft.answer_pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"sft.answer_pattern is {config.sft.answer_pattern!r}, no regular expression: {error}"
        ) from None


def _validate_responding(config: Config) -> None:
    name, settings = config.algorithm, getattr(config, config.algorithm)
    if not settings.answer_close:
        raise ConfigError(f"{name}.answer_close is empty: give the text that ends an answer")
    if name == "rlvr" and config.rlp.positions != 1:
        raise ConfigError(f"rlp.positions is {config.rlp.positions}: algorithm rlvr responds to a document once, set 1")
    if config.rlp.reward != RLPConfig().reward:
        raise ConfigError(f"rlp.reward is {config.rlp.reward!r}: algorithm {name} has a judge's, leave it as it is")


def check_devices(config: Config, mesh_shape: tuple[int, int, int, int]) -> None:
    """The batch must split over the mesh.

    Args:
      config: the run's.
      mesh_shape: slices, and devices along data, fsdp, tensor.

    Raises:
      ConfigError: a microbatch (batch_documents / minibatches / microbatches) does not divide over the first three.
    """
    ways = math.prod(mesh_shape[:3])
    part = config.batch_documents // (config.rlp.microbatches * config.rlp.minibatches)
    if part % ways:
        raise ConfigError(
            f"a microbatch has {part} documents, not a multiple of the {ways} devices along the mesh's "
            "slices, data and fsdp axes"
        )
    fsdp, tensor, sampling = *mesh_shape[2:], config.mesh.rollout_tensor
    if sampling and (sampling % tensor or fsdp % (sampling // tensor)):
        raise ConfigError(
            f"mesh.rollout_tensor is {sampling}: with fsdp={fsdp} and tensor={tensor} it must be a multiple of "
            f"{tensor} that divides {fsdp * tensor}"
        )
