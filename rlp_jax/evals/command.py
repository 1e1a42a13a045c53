# SPDX-License-Identifier: Apache-2.0
"""What `rlp eval` does: a model, tasks, data, and a result that goes out as lines or as JSON."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rlp_jax.checkpoint import load_run
from rlp_jax.checkpoints_io.load import load
from rlp_jax.config import Config, ConfigError, SuiteConfig
from rlp_jax.data.template import template_tokens
from rlp_jax.evals.alarms import of_run
from rlp_jax.evals.devices import mesh_for
from rlp_jax.evals.examine import Examinee, fingerprint, run_task
from rlp_jax.evals.perplexity import NAME as PERPLEXITY
from rlp_jax.evals.perplexity import over_file, run_perplexity
from rlp_jax.evals.problems import read_problems
from rlp_jax.evals.suite import averages, summarise
from rlp_jax.evals.tasks import TASKS
from rlp_jax.evals.token_classes import read_rules
from rlp_jax.evals.where import NAME as GAIN
from rlp_jax.evals.where import file_documents, heldout_documents, run_gain
from rlp_jax.evals.where_table import lines as gain_lines
from rlp_jax.nearest import suggest
from rlp_jax.report.run import read_run
from rlp_jax.settings import experiment_of, is_run, load_experiment, read_config
from rlp_jax.sharding import make_mesh
from rlp_jax.writers import strict

AVERAGES = {
    "math_avg": "Math Avg",
    "science_avg": "Science Avg",
    "science_avg@1": "Science Avg@1",
    "overall": "Overall",
}


class Request(NamedTuple):
    """The command's arguments.

    model: preset, Hugging Face directory, GGUF file or run directory. data, limit, experiment, text: as on the command
    line. ema: of a run, evaluate the moving average. out: where the records go; None: beside the run, or evals/NAME.
    classes: file of token classes, for gain. mesh: devices along its axes, as data=2,tensor=4; see `mesh_for`.
    """

    model: str
    tasks: tuple[str, ...]
    data: str | None
    settings: SuiteConfig
    limit: int | None = None
    ema: bool = False
    experiment: str | None = None
    text: str | None = None
    out: Path | None = None
    classes: Path | None = None
    mesh: str | None = None


def check(request: Request) -> None:
    """Raises ConfigError at the first thing that cannot work, before anything is loaded."""
    known = (*TASKS, PERPLEXITY, GAIN)
    for number, name in enumerate(request.tasks):
        if name not in known:
            raise ConfigError(f"--tasks: unknown task {name!r}{suggest(name, known)}")
        if name in request.tasks[:number]:
            raise ConfigError(f"--tasks: {name} is there twice")
    if not request.tasks:
        raise ConfigError(f"--tasks is empty: name some of {', '.join(known)}")
    settings = request.settings
    least = {
        "--limit": (request.limit, 1),
        "--max-tokens": (settings.max_tokens, 1),
        "--thought-tokens": (settings.thought_tokens, 1),
        "--samples": (settings.samples, 0),
        "--positions": (settings.positions, 1),
        "--batch": (settings.batch, 1),
        "--shots": (settings.shots, 0),
        "--seed": (settings.seed, 0),
    }
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise ConfigError(f"{name} is {value}: it must be at least {smallest}")
    if settings.temperature is not None and not (settings.temperature > 0 and math.isfinite(settings.temperature)):
        raise ConfigError(f"--temperature is {settings.temperature}: it must be positive; greedy responses come anyway")
    if len(request.tasks) > 1 and request.data is not None and Path(request.data).is_file():
        raise ConfigError(f"--data {request.data} is a file, for {len(request.tasks)} tasks: give a directory of files")
    if PERPLEXITY in request.tasks and (request.data is None or not Path(request.data).exists()):
        raise ConfigError(f"--tasks perplexity needs --data with a file of documents, found {request.data}")
    if GAIN in request.tasks:
        known_data = is_run(request.model) or request.experiment or experiment_of(request.model)
        if request.data is None and not known_data:
            raise ConfigError(f"--tasks gain needs --data: {request.model} has no experiment with held-out documents")
        if request.data is None and request.text is not None:
            raise ConfigError("--text is of the records of --data: without it, gain reads the held-out documents")
        if request.data is not None and not Path(request.data).exists():
            raise ConfigError(f"--tasks gain: no file or directory {request.data} for --data")
    elif request.classes is not None:
        raise ConfigError("--classes is of --tasks gain alone")


def evaluate(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the tasks.

    Args:
      say: told how far it is, and of what was repaired.

    Returns:
      model, out (directory of the records), tasks (name to what `suite.summarise`, `run_perplexity` or `run_gain`
      gives; gain of a run has `warnings` too, see `alarms.of_run`), and the paper's averages.

    Raises:
      ConfigError: bad input. StorageError: records that cannot be written.
    """
    check(request)
    problems = {
        name: read_problems(TASKS[name], request.data, request.limit) for name in request.tasks if name in TASKS
    }  # fmt: skip
    rules = read_rules(request.classes) if request.classes else ()
    config = load_experiment(request.experiment) if request.experiment else None
    trained = read_config(request.model) if is_run(request.model) else None
    layout = mesh_for(request.mesh, trained, jax.device_count())
    mesh = make_mesh(layout)
    if trained:
        run = load_run(request.model, mesh=mesh)
        model, tokenizer, config = run.model, run.tokenizer, config or run.config
        params, baseline = (run.ema_params if request.ema else run.params), run.ema_params
        place = Path(request.model) / "evals" / f"{run.step}{'-ema' if request.ema else ''}"
    elif request.ema:
        raise ConfigError(f"--ema: {request.model} is not a run directory, it has no moving average")
    else:
        model, params, tokenizer = load(request.model, mesh=mesh)
        baseline, config = params, config or experiment_of(request.model)
        place = Path("evals") / Path(request.model).name
    out = request.out or place
    settings = resolved(request.settings, config)
    config = dataclasses.replace(config or Config(), mesh=layout)
    template = template_tokens(config.template, tokenizer)
    examinee = Examinee(model, params, tokenizer, template, fingerprint(params), layout)
    results = {}
    for name in request.tasks:
        path = out / f"{name}.jsonl"
        if name in (PERPLEXITY, GAIN):
            # An experiment's text is that of its own data: of another file's records only where the user says so.
            own = is_run(request.model) or request.experiment
            text = request.text or (None if own else "{text}")
            weights = fingerprint((params, baseline))
            if request.data is not None:
                changed = over_file(config, settings, request.data, text, template, model.config.max_positions)
        if name == PERPLEXITY:
            results[name] = run_perplexity(
                model, params, baseline, tokenizer, template, changed, weights, request.limit, path, say
            )
        elif name == GAIN:
            if request.data is None:
                changed, documents = heldout_documents(config, settings, tokenizer, request.limit)
            else:
                documents = file_documents(changed, tokenizer, request.limit)
            results[name] = run_gain(
                model, params, baseline, tokenizer, template, changed, documents, rules, weights, path, say
            )
            if is_run(request.model):
                results[name]["warnings"] = of_run(read_run(request.model).metrics, len(template.close))
        else:
            results[name] = summarise(run_task(examinee, TASKS[name], problems[name], settings, path, say))
    scored = {name: result for name, result in results.items() if name in TASKS}
    return {"model": request.model, "out": str(out), "tasks": results, **(averages(scored) if scored else {})}


def resolved(settings: SuiteConfig, config: Config | None) -> SuiteConfig:
    """The settings with what the user left to the run or experiment that the model comes from, None where it has
    none."""
    temperature, thought_tokens = (0.7, 256) if config is None else (config.rlp.temperature, config.rlp.thought_tokens)
    return dataclasses.replace(
        settings,
        temperature=temperature if settings.temperature is None else settings.temperature,
        thought_tokens=settings.thought_tokens or thought_tokens,
    )


def describe(result: dict[str, Any]) -> str:
    """The result in lines for a reader."""
    lines = []
    for name, row in result["tasks"].items():
        if name == PERPLEXITY:
            lines.append(
                f"perplexity of {row['documents']} documents: {row['ppl_no_think']:.3f} without thoughts, "
                f"{row['ppl_think']:.3f} with, {row['ppl_empty']:.3f} with empty ones, {row['ppl_shuffled']:.3f} with "
                "another document's"
            )
            continue
        if name == GAIN:
            lines.extend(gain_lines(row))
            continue
        sampled = "" if row["pass@1"] is None else f", pass@1[{row['samples']}] {_figure(row, 'pass@1')}"
        lines.append(
            f"{name}: {row['problems']} problems, greedy {_figure(row, 'greedy')}{sampled}; "
            f"{row['answered']:.0%} answered, {row['stopped']:.0%} stopped, {row['tokens']:.0f} tokens a response"
        )
    for name, label in AVERAGES.items():
        if result.get(name) is not None:
            lines.append(f"{label} {result[name]:.2f}")
    return "\n".join([*lines, f"records in {result['out']}"])


def _figure(row: dict[str, Any], name: str) -> str:
    error = row[f"{name}_se"]
    return f"{row[name]:.2f}" if error is None else f"{row[name]:.2f} ± {error:.2f}"


def as_json(result: dict[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(strict(result), allow_nan=False)
