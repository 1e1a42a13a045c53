# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG that any machine can check: each ends with a stamp of its values and of its own text.

The same values and the same matplotlib give the same bytes. With another matplotlib the stamp alone tells whether a
figure is of these values and whether somebody changed it since.
"""

import hashlib
import io
import json
import re
from typing import Any, NamedTuple

from rlp_jax.report.figures import BLUE, INK, STYLE

STAMP = re.compile(r"<!-- matplotlib (\S+), values ([0-9a-f]{16}), drawing ([0-9a-f]{16}) -->\n\Z")


class Panel(NamedTuple):
    """title; xlabel; points: (x, y, half width of the interval or None)."""

    title: str
    xlabel: str
    points: tuple[tuple[float, float, float | None], ...]
    color: str = BLUE


class Drawing(NamedTuple):
    """name: of the file NAME.svg; rows: of panels, as they stand."""

    name: str
    title: str
    rows: tuple[tuple[Panel, ...], ...]

    @property
    def values(self) -> str:
        """A fingerprint of all that is drawn."""
        return _hash(json.dumps(self, sort_keys=True))


def render(drawing: Drawing) -> str:
    """The SVG with its stamp. x values stand at equal distances, as the paper's do: its axes are powers of two."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": drawing.name}):
        columns = max(map(len, drawing.rows))
        figure = Figure(figsize=(3.1 * columns, 0.5 + 2.4 * len(drawing.rows)), layout="constrained")
        figure.suptitle(drawing.title, x=0.012, ha="left", fontsize=11, fontweight="bold")
        axes = figure.subplots(len(drawing.rows), columns, squeeze=False)
        for row, panels in zip(axes, drawing.rows, strict=True):
            for ax, panel in zip(row, panels, strict=False):
                _plot(ax, panel)
            for ax in row[len(panels) :]:
                ax.set_axis_off()
            row[0].set_ylabel("Overall, %")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = "\n".join(line.rstrip() for line in svg.getvalue().splitlines()) + "\n"
    return f"{text}<!-- matplotlib {matplotlib.__version__}, values {drawing.values}, drawing {_hash(text)} -->\n"


def current(text: str, drawing: Drawing) -> bool:
    """Whether a file's text is this drawing, unchanged."""
    import matplotlib

    stamp = STAMP.search(text)
    if not stamp:
        return False
    version, values, own = stamp.groups()
    if version == matplotlib.__version__:
        return text == render(drawing)
    return values == drawing.values and own == _hash(text[: stamp.start()])


def _plot(ax: Any, panel: Panel) -> None:
    ax.set_title(panel.title, fontsize=10, color=INK)
    ax.set_xlabel(panel.xlabel)
    if not panel.points:
        ax.text(0.5, 0.5, "no runs yet", ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        return
    places, heights = range(len(panel.points)), [y for _, y, _ in panel.points]
    halves = [half or 0.0 for *_, half in panel.points]
    ax.errorbar(
        places,
        heights,
        yerr=halves if any(halves) else None,
        color=panel.color,
        marker="o",
        markersize=3.5,
        capsize=2.5,
        elinewidth=1,
    )
    ax.set_xticks(places, [f"{x:g}" for x, *_ in panel.points], fontsize=10 if len(places) < 6 else 8)
    ax.margins(x=0.1, y=0.12)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
