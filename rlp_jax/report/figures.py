"""The curves of a run, drawn once each and saved twice: as PNG, and as SVG that takes the page's colours.

Colours are Okabe and Ito's, told apart by every common colour vision; line styles tell the curves apart without any.
"""

import io
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rlp_jax.report.run import Row, Run, number

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#7f8790"
INK, GRID = "#1f2933", "#e3e6ea"
# What stands in the page's SVG instead, so that one drawing suits light and dark.
PAGE_COLORS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    BLUE: "var(--blue)",
    GREEN: "var(--green)",
    RED: "var(--red)",
}
THINK = {"color": BLUE, "label": "thought"}
NO_THINK = {"color": INK, "label": "no thought", "linestyle": (0, (6, 2))}
EMPTY = {"color": ORANGE, "label": "empty thought", "linestyle": (0, (4, 1.5, 1, 1.5))}
SHUFFLED = {"color": GREEN, "label": "shuffled thought", "linestyle": (0, (1, 1.2))}
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.2,
    "svg.fonttype": "none",
}
MAX_MARKED = 30  # points; a curve of more has no markers
SMOOTH_FROM = 40  # points; a longer noisy curve is drawn faintly, with its running mean over it


class Curves(NamedTuple):
    name: str  # of the file figures/NAME.png
    title: str
    svg: str


class Panel(NamedTuple):
    """One set of axes: (key of the rows, style) of each curve."""

    ylabel: str
    curves: tuple[tuple[str, dict[str, Any]], ...]
    band: str = ""  # key of an interval [low, high], or of a half width, around the first curve
    ylim: tuple[float | None, float | None] = (None, None)
    zero: bool = False  # a line at zero, which is always in sight
    log: bool = False  # where the values are above zero and span more than a factor of ten
    robust: bool = False  # the axis may cut off rare high values, such as the seconds of a step that compiles


def draw_figures(run: Run) -> list[Curves]:
    """Draws what the run has numbers for into RUN/figures/*.png and returns the same figures as SVG."""
    import matplotlib

    directory = run.directory / "figures"
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, title, rows, panels in _figures(run):
            panels = [p._replace(curves=tuple(c for c in p.curves if _has(rows, c[0]))) for p in panels]
            panels = [p for p in panels if p.curves]
            if panels:
                directory.mkdir(exist_ok=True)
                drawn.append(
                    Curves(
                        name,
                        title,
                        _draw(directory, name, title, rows, panels, run.skipped if rows is run.metrics else []),
                    )
                )
    return drawn


def _figures(run: Run) -> list[tuple[str, str, list[Row], list[Panel]]]:
    evals, metrics = run.evals, run.metrics
    keys = list(dict.fromkeys(key for row in metrics for key in row))
    blue = {"color": BLUE}
    throughput = tuple((k, _phase(k)) for k in keys if "tokens_per_s" in k or k == "tokens/s")
    phases = tuple((k, _phase(k)) for k in keys if k.startswith("seconds"))
    gain = (("gain", THINK), ("gain_empty", EMPTY), ("gain_shuffled", SHUFFLED))
    ce = (("ce_think", THINK), ("ce_no_think", NO_THINK), ("ce_empty", EMPTY), ("ce_shuffled", SHUFFLED))
    if not _has(metrics, "reward_mean"):  # the policy learnt to predict without a thought
        ce += (("ce_no_think_policy", {"color": RED, "label": "no thought, policy"}),)
    accuracy = (("acc_think", THINK), ("acc_no_think", NO_THINK), ("acc_empty", EMPTY), ("acc_shuffled", SHUFFLED))
    return [
        ("gain", "Information gain, held-out text", evals, [Panel("nats a token", gain, "gain_ci95", zero=True)]),
        ("cross_entropy", "Cross-entropy, held-out text", evals, [Panel("nats a token", ce)]),
        ("accuracy", "Accuracy, held-out text", evals, [Panel("share right", accuracy, ylim=(0, 1))]),
        (
            "reward",
            "Reward in training",
            metrics,
            [Panel("nats a token", (("reward_mean", blue | {"label": "mean"}),), "reward_std", zero=True)],
        ),
        (
            "loss",
            "Next-token loss in training",
            [] if _has(metrics, "reward_mean") else metrics,  # with rewards it is a surrogate, whose value says nothing
            [Panel("nats a token", (("loss", blue),))],
        ),
        (
            "thoughts",
            "Length of thoughts and how often they end",
            metrics,
            [
                Panel("tokens", (("thought_len", blue),), ylim=(0, None)),
                Panel("stop rate", (("stop_rate", {"color": GREEN}),), ylim=(0, 1)),
            ],
        ),
        ("entropy", "Entropy of the thought policy", metrics, [Panel("nats", (("entropy", blue),), ylim=(0, None))]),
        (
            "ratio",
            "Clipped tokens, and sampler against trainer",
            metrics,
            [
                Panel("clip fraction", (("clip_fraction", blue),), ylim=(0, None)),
                Panel("log-prob. gap", (("logprob_gap", {"color": RED}),), log=True),
            ],
        ),
        (
            "grad_norm",
            "Gradient norm",
            metrics,
            [Panel("norm before clipping", (("grad_norm", blue),), ylim=(0, None))],
        ),
        (
            "kl",
            "KL to the reference",
            metrics if any(number(row, "kl") > 0 for row in metrics) else [],
            [Panel("nats a token", (("kl", blue),), ylim=(0, None))],
        ),
        (
            "speed",
            "Speed",
            metrics,
            [
                Panel("tokens/s", throughput, ylim=(0, None)),
                Panel("seconds a step", phases, ylim=(0, None), robust=True),
            ],
        ),
    ]


def _draw(directory: Path, name: str, title: str, rows: list[Row], panels: list[Panel], skipped: list[int]) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _plot(ax, rows, panel)
        ax.set_ylabel(panel.ylabel)
        if skipped:
            style = {"color": RED, "transform": ax.get_xaxis_transform(), "label": "step skipped"}
            ax.plot(skipped, [0.02] * len(skipped), "|", **style)
        labels = ax.get_legend_handles_labels()[1]
        if labels:
            columns = 2 if sum(map(len, labels)) > 40 else len(labels)
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, ncols=columns, columnspacing=1.4)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))

    temporary = directory / f".{name}.png.tmp"
    figure.savefig(temporary, format="png", dpi=180, facecolor="white")
    os.replace(temporary, directory / f"{name}.png")
    svg = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that differ between the figures of one page
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline_svg(svg.getvalue(), title)


def _plot(ax: Any, rows: list[Row], panel: Panel) -> None:
    import numpy as np

    for index, (key, style) in enumerate(panel.curves):
        points = [(row["step"], number(row, key), row) for row in rows if math.isfinite(number(row, key))]
        steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        style = style | {"marker": "o" if len(points) <= MAX_MARKED else "", "markersize": 3.5}
        if len(points) >= SMOOTH_FROM:
            (line,) = ax.plot(steps, _running_mean(values), **style)
            ax.plot(steps, values, color=line.get_color(), linewidth=0.8, alpha=0.35)
        else:
            (line,) = ax.plot(steps, values, **style)
        if index == 0 and panel.band and _has(rows, panel.band):
            half = np.array([number(row, panel.band) for *_, row in points])
            low = np.where(np.isfinite(half), values - half, [number(row, panel.band, 0) for *_, row in points])
            high = np.where(np.isfinite(half), values + half, [number(row, panel.band, 1) for *_, row in points])
            label = "95% interval" if panel.band.endswith("ci95") else "spread in a group"
            ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.18, linewidth=0, label=label)
    values = [v for row in rows for key, _ in panel.curves if math.isfinite(v := number(row, key))]
    if panel.log and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    elif panel.ylim[0] == 0:
        top = panel.ylim[1] or 1.06 * max(values) or 1.0
        if panel.robust:
            curves = [[v for row in rows if math.isfinite(v := number(row, key))] for key, _ in panel.curves]
            top = min(top, 3 * max(statistics.median(curve) for curve in curves) or top)
        ax.set_ylim(-0.03 * top, 1.03 * top)  # a curve along an edge stays whole
    if panel.zero:
        ax.axhline(0, color=GREY, linewidth=0.9, zorder=1)


def _running_mean(values: Any) -> Any:
    """Mean over a centred window of about a fifteenth of the curve, narrower at its ends."""
    import numpy as np

    reach = max(1, len(values) // 30)
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def _has(rows: list[Row], key: str) -> bool:
    return any(math.isfinite(number(row, key)) or math.isfinite(number(row, key, 0)) for row in rows)


def _phase(key: str) -> dict[str, Any]:
    """The curve of one phase: sampled_tokens_per_s is labelled sampled, seconds_learn learn, seconds all."""
    words = re.sub(r"_?(tokens_per_s|tokens/s|seconds)_?", "", key).replace("_", " ")
    colors = {"": BLUE, "data": ORANGE, "sample": GREEN, "sampled": GREEN, "learn": RED, "learner": RED}
    return {"label": words or "all", "color": colors.get(words, PURPLE)}


def _inline_svg(svg: str, title: str) -> str:
    """An svg element for a page: the page's colours, font and width, a name for screen readers, no repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    for color, name in PAGE_COLORS.items():
        svg = svg.replace(color, name)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
