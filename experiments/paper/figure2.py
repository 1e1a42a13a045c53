# SPDX-License-Identifier: Apache-2.0
"""Figure 2 in the paper's form, its three panels above ours; and the other ablations the same way."""

from collections.abc import Mapping
from typing import Any

from experiments.paper import reported
from experiments.paper.cells import Section, at, mean_of, points
from experiments.paper.drawing import Drawing, Panel
from experiments.paper.results import Record
from rlp_jax.report.figures import GREY

FIGURE_2 = (
    ("(a) rollouts", "G", "rollouts", reported.FIGURE_2A),
    ("(b) thought length", "L, tokens", "thought_tokens", reported.FIGURE_2B),
    ("(c) KL", "β", "kl", reported.FIGURE_2C),
)
OTHERS = (("τ of the average", "τ", "tau"), ("horizon", "H, tokens", "horizon"), ("positions", "K", "positions"))


def drawings(records: list[Record]) -> list[Drawing]:
    """The figures that have runs."""
    found = []
    ours = tuple(_panel(f"ours {title}", xlabel, records, axis) for title, xlabel, axis, _ in FIGURE_2)
    if any(panel.points for panel in ours):
        theirs = tuple(_quoted(f"paper {title}", xlabel, paper) for title, xlabel, _, paper in FIGURE_2)
        found.append(Drawing("figure2", "Overall by rollouts, thought length and KL", (theirs, ours)))
    others = tuple(_panel(title, xlabel, records, axis) for title, xlabel, axis in OTHERS)
    if any(panel.points for panel in others):
        found.append(Drawing("ablations", "Overall by τ, horizon and positions", (others,)))
    return found


def text(records: list[Record]) -> str | None:
    links = [f"![{drawing.title}](figures/{drawing.name}.svg)" for drawing in drawings(records)]
    return "\n\n".join(links) or None


def _panel(title: str, xlabel: str, records: list[Record], axis: str) -> Panel:
    scores = [(value, mean_of(at(records, axis, value))) for value in points(records, axis)]
    return Panel(title, xlabel, tuple((value, score.mean, score.half) for value, score in scores if score))


def _quoted(title: str, xlabel: str, paper: Mapping[Any, float]) -> Panel:
    return Panel(title, xlabel, tuple((value, score, None) for value, score in paper.items()), GREY)


FIGURES = Section("Figure 2 and the other ablations, drawn", "*", text)
