# SPDX-License-Identifier: Apache-2.0
"""The curves of a run as pictures, figures/*.png: for documents and slides. The page draws the same ones itself."""

import math
import os
import statistics
from typing import Any

from rlp_jax.report.curves import COLORS, Curve, Figure, Panel, band_label, figures_of, interval
from rlp_jax.report.run import Row, Run, number

BLUE, GREY, INK, GRID = COLORS["blue"], "#7f8790", COLORS["ink"], "#e3e6ea"
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


def draw_figures(run: Run) -> list[str]:
    """Draws what the run has numbers for into RUN/figures/*.png and returns the names."""
    import matplotlib

    figures = figures_of(run)
    if figures:
        (run.directory / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for figure in figures:
            path = run.directory / "figures" / f"{figure.name}.png"
            temporary = path.with_name(f".{path.name}.tmp")
            draw(figure).savefig(temporary, format="png", dpi=180, facecolor="white")
            os.replace(temporary, path)
    return [figure.name for figure in figures]


def draw(figure: Figure) -> Any:
    """The figure as matplotlib's."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(figsize=(5.2, 3.7), layout="constrained")
    canvas.suptitle(figure.title, x=0.012, ha="left", fontsize=11, fontweight="bold")
    axes = canvas.subplots(len(figure.panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, figure.panels, strict=True):
        _plot(ax, figure.rows, panel)
        ax.set_ylabel(panel.ylabel)
        if figure.skipped:
            style = {"color": COLORS["red"], "transform": ax.get_xaxis_transform(), "label": "step skipped"}
            ax.plot(figure.skipped, [0.02] * len(figure.skipped), "|", **style)
        labels = ax.get_legend_handles_labels()[1]
        if len(labels) > 1:
            columns = 2 if sum(map(len, labels)) > 40 else len(labels)
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, ncols=columns, columnspacing=1.4)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return canvas


def _plot(ax: Any, rows: list[Row], panel: Panel) -> None:
    import numpy as np

    bands = set()
    for curve in panel.curves:
        points = [(row["step"], number(row, curve.key), row) for row in rows if math.isfinite(number(row, curve.key))]
        steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        style = _style(curve) | {"marker": "o" if len(points) <= MAX_MARKED else "", "markersize": 3.5}
        if len(points) >= SMOOTH_FROM:
            (line,) = ax.plot(steps, _running_mean(values), **style)
            ax.plot(steps, values, color=line.get_color(), linewidth=0.8, alpha=0.35)
        else:
            (line,) = ax.plot(steps, values, **style)
        low, high = np.array([interval(row, curve, value) for _, value, row in points]).T
        if curve.band and np.isfinite(low).any():
            label = {} if band_label(curve) in bands else {"label": band_label(curve)}
            bands.add(band_label(curve))
            ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.16, linewidth=0, **label)
    values = [v for row in rows for curve in panel.curves if math.isfinite(v := number(row, curve.key))]
    if panel.log and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    elif panel.ylim[0] == 0:
        top = panel.ylim[1] or 1.06 * max(values) or 1.0
        if panel.robust:
            curves = [[v for row in rows if math.isfinite(v := number(row, curve.key))] for curve in panel.curves]
            top = min(top, 3 * max(statistics.median(curve) for curve in curves) or top)
        ax.set_ylim(-0.03 * top, 1.03 * top)  # a curve along an edge stays whole
    if panel.zero:
        ax.axhline(0, color=GREY, linewidth=0.9, zorder=1)


def _style(curve: Curve) -> dict[str, Any]:
    dash = {"linestyle": (0, curve.dash)} if curve.dash else {}
    return {"color": COLORS[curve.color], "label": curve.label, **dash}


def _running_mean(values: Any) -> Any:
    """Mean over a centred window of about a fifteenth of the curve, narrower at its ends."""
    import numpy as np

    reach = max(1, len(values) // 30)
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])
