# SPDX-License-Identifier: Apache-2.0
"""What the study's runs left behind: one small JSON file a run, read into records that every table is made of.

This is the one file that knows how the JSON is laid out; the tables see records alone.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.paper.domains import MATH, REASONING

FOLDER = Path(__file__).parents[1] / "results" / "paper"
BASES = ("decoder", "hybrid", "decoder_early", "decoder_late")
ARMS = ("base", "cpt_tokens", "cpt_flops", "rpt_tokens", "rpt_flops", "rlp")
STAGES = ("", "sft", "rlvr")  # "": after the arm itself
# What an ablation may change, one at a time.
AXES = (
    "rollouts", "thought_tokens", "kl", "tau", "horizon", "positions", "place", "advantage", "temperature", "rpt",
    "corpus",
)  # fmt: skip
ABLATED = {"rpt": "rpt_tokens"}  # the arm that an axis changes, where it is not RLP
METRICS = ("pass1", "greedy", "plain")  # sampled with a thought, greedy with a thought, without a thought


class ResultError(ValueError):
    """A result file that cannot be read, in one line."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
      name: of the file NAME.json, unique.
      arm, base, stage: of ARMS, BASES and STAGES.
      seed: of the run; a base model's is 0.
      axis, value: what an ablation changed and to what; axis "" for the study's main runs.
      sweep: whether the run only served to choose a learning rate.
      chosen: whether its rate is the one its sweep chose.
      settings: all that matter, by name; learning_rate, steps and match_run, the run it was matched to, among them.
      scores, validation: {benchmark: {metric: share right, metric_se: its standard error over problems}} on test and
        validation problems; {} where not examined.
      evaluation: {"before": ..., "after": ...}, each as `rlp_jax.evals.likelihood.evaluate` returns it.
      budget: of a run that is matched to another (`rlp_jax.config.Budget`), else {}.
      compute: input_tokens, sampled_tokens, flops, seconds; those that are known.
      where: as `rlp_jax.evals.breakdown.summarise` returns it, {} where it was not asked.
      alarms: of the run's training, as `rlp_jax.evals.alarms.of_run` returns them; None where they were not kept.
    """

    name: str
    arm: str
    base: str
    stage: str
    seed: int
    axis: str
    value: Any
    sweep: bool
    chosen: bool
    settings: dict[str, Any]
    scores: dict[str, dict[str, float]]
    validation: dict[str, dict[str, float]]
    evaluation: dict[str, dict[str, Any]]
    budget: dict[str, Any]
    compute: dict[str, float]
    where: dict[str, Any] = dataclasses.field(default_factory=dict)
    alarms: list[dict[str, Any]] | None = None


def load(folder: Path = FOLDER) -> list[Record]:
    """Every record of a folder, by name; [] where there is none.

    Raises:
      ResultError: a file is no JSON, lacks something or names an unknown arm, base, stage or axis.
    """
    return [_read(path) for path in sorted(Path(folder).glob("*.json"))]


def _read(path: Path) -> Record:
    try:
        raw = json.loads(path.read_text())
        record = Record(
            name=raw["name"],
            arm=raw["arm"],
            base=raw["base"],
            stage=raw["stage"],
            seed=raw["seed"],
            axis=raw["axis"],
            value=raw["value"],
            sweep=raw["sweep"],
            chosen=raw["chosen"],
            settings=raw["settings"],
            scores=raw["scores"],
            validation=raw["validation"],
            evaluation=raw["evaluation"],
            budget=raw["budget"],
            compute=raw["compute"],
            where=raw.get("where", {}),
            alarms=raw.get("alarms"),
        )
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise ResultError(f"{path}: no result of the study, {error} is missing or of another kind") from None
    for name, known in (("arm", ARMS), ("base", BASES), ("stage", STAGES), ("axis", ("", *AXES))):
        if getattr(record, name) not in known:
            raise ResultError(f"{path}: {name} {getattr(record, name)!r} is none of {', '.join(map(repr, known))}")
    return record


def select(
    records: Iterable[Record],
    arm: str,
    base: str = "decoder",
    stage: str = "",
    axis: str = "",
    value: Any = None,
) -> list[Record]:
    """The runs of one cell of a table, by seed: those that count, not the ones that only chose a rate."""
    wanted = (arm, base, stage, axis, value)
    found = [r for r in records if not r.sweep and (r.arm, r.base, r.stage, r.axis, r.value) == wanted]
    return sorted(found, key=lambda record: record.seed)


def average(record: Record, names: Iterable[str], metric: str = "pass1", split: str = "scores") -> float | None:
    """Mean share right over benchmarks, or None where one of them was not examined."""
    shares = [getattr(record, split).get(name, {}).get(metric) for name in names]
    return None if None in shares else sum(shares) / len(shares)


def overall(record: Record, metric: str = "pass1", split: str = "scores") -> float | None:
    """Mean of the mathematics and the reasoning average, or None where a benchmark was not examined."""
    parts = [average(record, names, metric, split) for names in (MATH, REASONING)]
    return None if None in parts else sum(parts) / 2


def standard_error(record: Record, metric: str = "pass1") -> float | None:
    """Of `overall`, over the problems of all benchmarks."""
    parts = []
    for names in (MATH, REASONING):
        parts += [(record.scores.get(name, {}).get(f"{metric}_se"), 0.5 / len(names)) for name in names]
    if any(error is None for error, _ in parts):
        return None
    return math.sqrt(sum((error * weight) ** 2 for error, weight in parts))
