# SPDX-License-Identifier: Apache-2.0
"""A run's result file: one small JSON object, what its settings must be, and which run of a sweep is the best.

name, arm, base, stage, seed, axis, value   its place in the study (`study.Run`)
sweep, chosen     whether it only served to choose a learning rate; whether its rate is the one that was chosen
settings          learning_rate, steps, what it started from and was matched to, and all that is not the default
scores, validation   `examine.examine` on test or on validation problems, the other one empty
evaluation        before and after training, on held-out documents (rlp_jax/evals/likelihood.py)
budget            of a run that is matched to another (`config.Budget`)
alarms            when its thoughts collapsed (`alarms.of_run`), [] for never; absent where nothing is trained
where             where in text its thoughts pay (`locate.locate`), of bases and arms before post-training
compute           input_tokens, sampled_tokens, flops where counted, seconds: of all steps; wall_seconds and
                  processor_seconds of the training process, examination_seconds
fingerprints      sha256 of the data, the base's weights, those it started from and its own
versions
"""

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.paper.study import Run
from rlp_jax.config import Config, ConfigError, to_json
from rlp_jax.evals.alarms import of_run
from rlp_jax.report.run import read_run

PACKAGES = ("rlp_jax", "jax", "jaxlib", "numpy", "optax", "flax")
# Settings that say where something is or how often it is saved, and those with a place of their own.
LEFT_OUT = ("name", "model", "budget.", "checkpoint.", "report.", "optimizer.learning_rate", "steps")

DIGITS = 4  # of what `where` holds, after the point
CLOSE_TOKENS = 1  # of the closing tag, a word of the study's tokenizer

Result = dict[str, Any]


def read(path: Path) -> Result:
    """Raises ConfigError where it is no result file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "settings", "scores", "validation", "fingerprints"} <= set(result):
            raise ValueError("it lacks settings, scores or fingerprints")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no result of the study: {error}") from None
    return result


def write(path: Path, result: Result) -> None:
    """All of it or nothing."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def settings(run: Run, config: Config | None, references: dict[str, str], problems: int) -> dict[str, Any]:
    """What has to be the same for a result to be this run's, as JSON gives it back.

    Args:
      config: with its learning rate.
      references: start, match_run and rival_run by the names of the runs that they turned out to be.
      problems: of each benchmark.
    """
    own = {"problems": problems, "split": run.split} | {name: value for name, value in references.items() if value}
    if config is not None:
        own |= {"learning_rate": config.optimizer.learning_rate, "match": run.match}
        own |= {} if run.match else {"steps": config.steps}
        default = flat(Config())
        own |= {
            name: value
            for name, value in flat(config).items()
            if value != default[name] and not name.startswith(LEFT_OUT)
        }
    return json.loads(json.dumps(own))


def flat(config: Config) -> dict[str, Any]:
    """Settings by dotted names."""
    found = {}
    for name, value in json.loads(to_json(config)).items():
        parts = {f"{name}.{part}": inner for part, inner in value.items()} if isinstance(value, dict) else {name: value}
        found |= parts
    return found


def differing(result: Result, wanted: dict[str, Any]) -> list[str]:
    """Names of settings in which a result is not the run that the study has now."""
    recorded = dict(result["settings"])
    if wanted.get("match"):
        recorded.pop("steps", None)  # they followed from what it was matched to
    names = recorded.keys() | wanted.keys()
    return sorted(name for name in names if recorded.get(name) != wanted.get(name))


def assemble(
    run: Run,
    wanted: dict[str, Any],
    run_dir: Path,
    scores: dict,
    where: dict,
    compute: dict[str, float],
    fingerprints: dict,
) -> Result:
    """The result of a run that has been trained and examined.

    Args:
      wanted: of `settings`.
      run_dir: of the training; not looked at where there was none.
      where: of `locate.locate`, {} where it is not asked for.
      compute: what was measured outside it.
    """
    trained, evaluation, budget, found = {}, {}, {}, {}
    if run.config is not None:
        evaluation = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        ended = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        trained = {"steps": ended["steps"]}
        budget = ended["budget"] if run.match else {}
        found["alarms"] = of_run(read_run(run_dir).metrics, CLOSE_TOKENS)
        compute = training_compute(run_dir) | ({"flops": budget["flops"]} if budget.get("flops") else {}) | compute
    place = {name: getattr(run, name) for name in ("name", "arm", "base", "stage", "seed", "axis", "value")}
    return place | {
        "sweep": bool(run.sweep),
        "chosen": not run.sweep,
        "settings": wanted | trained,
        "scores": {} if run.sweep else scores,
        "validation": scores if run.sweep else {},
        "evaluation": evaluation,
        "budget": budget,
        "compute": compute,
        "fingerprints": fingerprints,
        "versions": versions(),
        **found,
        **({"where": rounded(where)} if where else {}),
    }


def rounded(value: Any) -> Any:
    """JSON with no more digits than its intervals deserve."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def training_compute(run_dir: Path) -> dict[str, float]:
    """Tokens and seconds of all steps; the first one's seconds, which hold the compilation, by themselves too."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    totals = {
        name: sum(row[name] for row in rows)
        for name in ("input_tokens", "sampled_tokens", "seconds")
        if name in rows[0]
    }
    return totals | {"first_step_seconds": rows[0]["seconds"]}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def weights_fingerprint(directory: Path) -> str:
    """sha256 of a Hugging Face directory's weights."""
    return _sha256(sorted(directory.glob("*.safetensors")), directory)


def data_fingerprint(directory: Path) -> str:
    """sha256 of the study's data files, names included."""
    return _sha256(sorted(directory.rglob("*.jsonl")), directory)


def _sha256(files: list[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def mark_chosen(results: dict[str, Result], runs: list[Run], chosen: Run) -> list[str]:
    """Sets `chosen` in the results of a sweep. Returns the names of those that changed."""
    changed = []
    for run in runs:
        result = results[run.name]
        if result["chosen"] != (run == chosen):
            result["chosen"] = run == chosen
            changed.append(run.name)
    return changed


def describe(result: Result) -> str:
    """Where a run's time went, and what it scored, in a line."""
    compute, scores = result["compute"], result["scores"] or result["validation"]
    shares = "  ".join(f"{name} {values['pass1']:.2f}" for name, values in scores.items())
    if "wall_seconds" not in compute:
        return f"examined in {compute['examination_seconds']:.0f} s; {shares}"
    first, steps = compute["first_step_seconds"], compute["seconds"] - compute["first_step_seconds"]
    rest = "resumed" if compute["resumed"] else f"rest {compute['wall_seconds'] - first - steps:.0f}"
    return (
        f"trained in {compute['wall_seconds']:.0f} s ({compute['processor_seconds']:.0f} s of a processor): first step "
        f"{first:.0f}, {result['settings']['steps'] - 1} others {steps:.0f}, {rest}; examined in "
        f"{compute['examination_seconds']:.0f} s; {shares}"
    )
