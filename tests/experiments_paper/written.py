# SPDX-License-Identifier: Apache-2.0
"""Result files of the study written by hand, for tests of its tables."""

from pathlib import Path
from typing import Any

from experiments.paper import outcome
from experiments.paper.domains import BENCHMARKS
from experiments.paper.results import METRICS

EVALUATION = {"gain": 0.5, "gain_empty": 0.1, "gain_shuffled": 0.15, "ce_think": 1.0, "ce_no_think_policy": 1.5}
EVALUATION |= {"ce_empty": 1.4, "ce_shuffled": 1.35, "thought_len": 10.0}
COMPUTE = {"input_tokens": 20_000, "sampled_tokens": 200_000, "seconds": 90.0}


def _row(label: str, gain: float, content: float) -> dict[str, Any]:
    return {"label": label, "gain": gain, "content": content}


FIVE = [_row(f"{i} to {i + 1}", 0.1 * i, 0.2 * i) for i in range(5)]
# As `locate.locate` gives it: what the tables read of it.
WHERE = {
    "where": {
        "class": [_row("number", 0.25, 0.5), _row("word start", -1.5, 0.125)],
        "span": [_row("outside", -2.0, 0.25), _row("in data.span", 0.75, 1.0)],
        "entropy": FIVE,
        "place": FIVE[:4],
    },
    "probes": {
        "quotes": {"target": {"own": 0.25, "shuffled": 0.125, "excess": 0.125}},
        "quoting": {"carried": 0.5, "carried_other": 0.75, "carried_beyond_other": -0.25},
        "gain": -1.0,
        "gain_without": -1.25,
    },
    "alarms": {},
}


def shares(value: float) -> dict[str, dict[str, float]]:
    """The same share right on every benchmark, with a standard error of a hundredth."""
    return {name: dict.fromkeys(METRICS, value) | {"pass1_se": 0.01} for name in BENCHMARKS}


def write(folder: Path, arm: str, seed: int, share: float, **changes: Any) -> Path:
    """A result of one run, the decoder's main one unless told otherwise, right at `share` of every benchmark."""
    raw = {"arm": arm, "base": "decoder", "stage": "", "seed": seed, "axis": "", "value": None, "sweep": False}
    raw |= {"chosen": False, "settings": {"learning_rate": 1e-4, "steps": 40}, "scores": shares(share)}
    raw |= {"validation": shares(share), "evaluation": {"before": EVALUATION, "after": EVALUATION}, "budget": {}}
    raw |= {"compute": COMPUTE} | changes
    rate = [f"{raw['settings']['learning_rate']:g}"] if raw["sweep"] else []
    parts = [raw[key] for key in ("base", "stage", "axis", "value", "arm") if raw[key]]
    raw["name"] = "--".join(map(str, [*parts, f"seed{seed}", *rate]))
    path = folder / f"{raw['name']}.json"
    outcome.write(path, raw)
    return path
