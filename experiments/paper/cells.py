# SPDX-License-Identifier: Apache-2.0
"""What the tables share: Markdown, figures as text, and a run's figures by seed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from experiments.paper import intervals
from experiments.paper.intervals import Interval
from experiments.paper.results import ABLATED, AXES, Record, overall, select

MISSING = "–"
NAMES = {
    "base": "base",
    "cpt_tokens": "CPT, same tokens",
    "cpt_flops": "CPT, same FLOPs",
    "rpt_tokens": "RPT, same tokens",
    "rpt_flops": "RPT, same FLOPs",
    "rlp": "RLP",
}
AFTER = {"": "the arm", "sft": "+ SFT", "rlvr": "+ SFT + RLVR"}
# Where the main run stands on each axis; it has no place on the others.
MAIN = {
    "rollouts": 16,
    "thought_tokens": 16,
    "kl": 0.0,
    "tau": 0.999,
    "horizon": 1,
    "place": "revealing",
    "advantage": "centred",
    "temperature": 0.7,
    "rpt": "as it is",
    "corpus": "mix",
}


class Section(NamedTuple):
    """title; only: pattern of the runs it needs, for the driver; text: its Markdown, None where no run is there."""

    title: str
    only: str
    text: Callable[[list[Record]], str | None]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number as text; a missing one is a dash."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")  # no sign before a zero
    return text.replace("-", "−")


def interval(value: Interval | None, digits: int = 1, sign: bool = False) -> str:
    """mean ± half; without an interval the mean alone."""
    if value is None:
        return MISSING
    mean = figure(value.mean, digits, sign)
    return mean if value.half is None else f"{mean} ± {figure(value.half, digits)}"


def bounds(value: Interval | None, digits: int = 1) -> str:
    """Mean [low, high] of a difference."""
    if value is None:
        return MISSING
    if value.half is None:
        return figure(value.mean, digits, sign=True)
    low, high = (figure(bound, digits, sign=True) for bound in (value.low, value.high))
    return f"{figure(value.mean, digits, sign=True)} [{low}, {high}]"


def seeds(runs: Sequence[Record]) -> str:
    return str(len(runs)) if runs else MISSING


def by_seed(runs: Iterable[Record], of: Callable[[Record], float | None] = overall, scale: float = 100) -> dict:
    """{seed: figure} of the runs that have it; shares in percent unless scaled otherwise."""
    found = {run.seed: of(run) for run in runs}
    return {seed: scale * value for seed, value in found.items() if value is not None}


def mean_of(runs: Iterable[Record], of: Callable[[Record], float | None] = overall, scale: float = 100):
    """The mean over seeds of a figure, as `by_seed` has it."""
    return intervals.mean(list(by_seed(runs, of, scale).values()))


def evaluated(key: str, when: str = "after") -> Callable[[Record], float | None]:
    """A figure of a run's evaluation on held-out documents, before or after it."""
    return lambda run: run.evaluation.get(when, {}).get(key)


def at(records: Iterable[Record], axis: str, value: Any, base: str = "decoder") -> list[Record]:
    """The runs at one point of an ablation; the main run stands at its own value of the axis."""
    arm = ABLATED.get(axis, "rlp")
    if value == MAIN.get(axis):
        return select(records, arm, base)
    return select(records, arm, base, "", axis, value)


def points(records: Iterable[Record], axis: str) -> list[Any]:
    """The values of an axis that have runs, in order, the main run's among them; [] with that one alone."""
    assert axis in AXES, axis
    arm = ABLATED.get(axis, "rlp")
    values = {r.value for r in records if r.axis == axis and r.arm == arm and not r.sweep and not r.stage}
    if values and axis in MAIN:
        values.add(MAIN[axis])
    return sorted(values)
