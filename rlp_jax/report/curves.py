# SPDX-License-Identifier: Apache-2.0
"""Which curves a run has: the same for the pictures (figures.py) and for the page, which draws them itself.

Colours are Okabe and Ito's, told apart by every common colour vision; line styles tell the curves apart without any.
"""

import math
import re
from typing import Any, NamedTuple

from rlp_jax.report.run import Row, Run, number

COLORS = {
    "blue": "#0072b2", "orange": "#e69f00", "green": "#009e73", "red": "#d55e00", "purple": "#cc79a7", "ink": "#1f2933",
}  # fmt: skip
MOST_POINTS = 600  # of a curve on the page; a longer one is drawn by means of neighbouring points
INTERVAL, SPREAD = "95% interval", "spread in a group"


class Curve(NamedTuple):
    """One key of the rows. color: a name of COLORS. dash: lengths on and off, in line widths. band: key of an interval
    [low, high], or of a half width, around it."""

    key: str
    label: str
    color: str = "blue"
    dash: tuple[float, ...] = ()
    band: str = ""


class Panel(NamedTuple):
    """One set of axes."""

    ylabel: str
    curves: tuple[Curve, ...]
    ylim: tuple[float | None, float | None] = (None, None)
    zero: bool = False  # a line at zero, which is always in sight
    log: bool = False  # where the values are above zero and span more than a factor of ten
    robust: bool = False  # the axis may cut off rare high values, such as the seconds of a step that compiles


class Figure(NamedTuple):
    """name: of the file figures/NAME.png. skipped: steps to mark."""

    name: str
    title: str
    rows: list[Row]
    panels: tuple[Panel, ...]
    skipped: list[int]


def _held_out(name: str, band: bool = False) -> tuple[Curve, ...]:
    """A measure after thoughts, and after those of both controls."""
    first = name if band else f"{name}_think"
    curves = (
        Curve(first, "thought", "blue"),
        Curve(f"{name}_empty", "empty thought", "orange", (4, 1.5, 1, 1.5)),
        Curve(f"{name}_shuffled", "shuffled thought", "green", (1, 1.2)),
    )
    return tuple(curve._replace(band=f"{curve.key}_ci95") for curve in curves) if band else curves


def figures_of(run: Run) -> list[Figure]:
    """What the run has numbers for, in the order of the page."""
    evals, metrics = run.evals, run.metrics
    keys = list(dict.fromkeys(key for row in metrics for key in row))
    throughput = tuple(_phase(key) for key in keys if "tokens_per_s" in key or key == "tokens/s")
    phases = tuple(_phase(key) for key in keys if key.startswith("seconds"))
    rewarded = has(metrics, "reward_mean")
    ce = (*_held_out("ce"), Curve("ce_no_think", "no thought", "ink", (6, 2)))
    if not rewarded:  # the policy learnt to predict without a thought
        ce += (Curve("ce_no_think_policy", "no thought, policy", "red"),)
    accuracy = (*_held_out("acc"), Curve("acc_no_think", "no thought", "ink", (6, 2)))
    gain = Panel("nats a token", _held_out("gain", band=True), zero=True)
    every = [
        ("gain", "Information gain, held-out text", evals, gain),
        ("cross_entropy", "Cross-entropy, held-out text", evals, Panel("nats a token", ce)),
        ("accuracy", "Accuracy, held-out text", evals, Panel("share right", accuracy, (0, 1))),
        ("reward", "Reward in training", metrics, Panel(
            "nats a token", (Curve("reward_mean", "mean", band="reward_std"),), zero=True)),
        # with rewards it is a surrogate, whose value says nothing
        ("loss", "Next-token loss in training", [] if rewarded else metrics, Panel(
            "nats a token", (Curve("loss", "loss"),))),
        ("thoughts", "Length of thoughts and how often they end", metrics,
         Panel("tokens", (Curve("thought_len", "length"),), (0, None)),
         Panel("stop rate", (Curve("stop_rate", "stop rate", "green"),), (0, 1))),
        ("entropy", "Entropy of the thought policy", metrics, Panel("nats", (Curve("entropy", "entropy"),), (0, None))),
        ("ratio", "Clipped tokens, and sampler against trainer", metrics,
         Panel("clip fraction", (Curve("clip_fraction", "clip fraction"),), (0, None)),
         Panel("log-prob. gap", (Curve("logprob_gap", "log-prob. gap", "red"),), log=True)),
        ("grad_norm", "Gradient norm", metrics, Panel(
            "norm before clipping", (Curve("grad_norm", "norm"),), (0, None))),
        ("kl", "KL to the reference", metrics if any(number(row, "kl") > 0 for row in metrics) else [], Panel(
            "nats a token", (Curve("kl", "KL"),), (0, None))),
        ("speed", "Speed", metrics,
         Panel("tokens/s", throughput, (0, None)), Panel("seconds a step", phases, (0, None), robust=True)),
    ]  # fmt: skip
    figures = []
    for name, title, rows, *panels in every:
        panels = [p._replace(curves=tuple(c for c in p.curves if has(rows, c.key))) for p in panels]
        panels = tuple(p for p in panels if p.curves)
        if panels:
            figures.append(Figure(name, title, rows, panels, run.skipped if rows is metrics else []))
    return figures


def on_page(runs: list[Run], labels: list[str]) -> list[dict[str, Any]]:
    """The figures of one run, or of several over each other, as the page's script reads them."""
    merged: dict[str, dict[str, Any]] = {}
    for index, run in enumerate(runs):
        for figure in figures_of(run):
            shown = merged.setdefault(figure.name, {"name": figure.name, "title": figure.title, "panels": {}})
            for panel in figure.panels:
                axes = shown["panels"].setdefault(
                    panel.ylabel,
                    {
                        "label": panel.ylabel, "low": panel.ylim[0], "high": panel.ylim[1], "zero": panel.zero,
                        "log": panel.log, "robust": panel.robust, "curves": [], "skipped": [],
                    },
                )  # fmt: skip
                axes["curves"] += [_series(figure.rows, curve, index, labels[index]) for curve in panel.curves]
                axes["skipped"] += figure.skipped
    order = [figure.name for run in runs for figure in figures_of(run)]
    return [merged[name] | {"panels": list(merged[name]["panels"].values())} for name in dict.fromkeys(order)]


def interval(row: Row, curve: Curve, value: float) -> tuple[float, float]:
    """The band around a value, nan where the row has none."""
    half = number(row, curve.band)
    if math.isfinite(half):
        return value - half, value + half
    return number(row, curve.band, 0), number(row, curve.band, 1)


def has(rows: list[Row], key: str) -> bool:
    return any(math.isfinite(number(row, key)) or math.isfinite(number(row, key, 0)) for row in rows)


def band_label(curve: Curve) -> str:
    return INTERVAL if curve.band.endswith("ci95") else SPREAD


def _series(rows: list[Row], curve: Curve, index: int, label: str) -> dict[str, Any]:
    points = [(row["step"], value, *interval(row, curve, value)) for row in rows
              if math.isfinite(value := number(row, curve.key))]  # fmt: skip
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    x, y, low, high = ([_mean([point[i] for point in group]) for group in groups] for i in range(4))
    banded = any(value is not None for value in low)
    return {
        "label": curve.label, "color": curve.color, "dash": curve.dash, "run": index, "of": label, "x": x, "y": y,
        "low": low if banded else None, "high": high if banded else None, "band": band_label(curve) if banded else "",
        "mean_of": size,
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return float(f"{mean:.6g}") if math.isfinite(mean) else None


def _phase(key: str) -> Curve:
    """The curve of one phase: sampled_tokens_per_s is labelled sampled, seconds_learn learn, seconds all."""
    words = re.sub(r"_?(tokens_per_s|tokens/s|seconds)_?", "", key).replace("_", " ")
    colors = {"": "blue", "data": "orange", "sample": "green", "sampled": "green", "learn": "red", "learner": "red"}
    return Curve(key, words or "all", colors.get(words, "purple"))
