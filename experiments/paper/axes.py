# SPDX-License-Identifier: Apache-2.0
"""Ablations, one axis a table: Figure 2's three, the average's tau, the horizon, positions a document, and what RLP and
RPT do differently."""

from typing import Any

from experiments.paper import reported
from experiments.paper.cells import Section, at, evaluated, figure, interval, mean_of, points, seeds, table
from experiments.paper.domains import MATH, REASONING
from experiments.paper.results import Record, average

WHY = (
    "S_ema is the same for all thoughts of a position and cancels in the advantage (equation 7), so that tau cannot "
    "change the policy; it changes the reported reward and the baseline that the gain is measured against."
)


def axis_table(records: list[Record], axis: str, name: str, paper: dict[Any, float] | None = None) -> str | None:
    """One row a value, the highest mean Overall in bold; the paper's figures where it has the same values or below."""
    values = points(records, axis)
    if not values:
        return None
    runs = {value: at(records, axis, value) for value in values}
    scores = {value: mean_of(found) for value, found in runs.items()}
    best = max((score.mean for score in scores.values() if score), default=None)
    same = bool(paper) and any(value in paper for value in values)
    rows = []
    for value in values:
        found, score = runs[value], scores[value]
        shown = interval(score)
        if score and score.mean == best:
            shown = f"**{shown}**"
        averages = [mean_of(found, lambda run, names=names: average(run, names)) for names in (MATH, REASONING)]
        row = [value if isinstance(value, str) else f"{value:g}", seeds(found), *map(interval, averages), shown]
        row.append(interval(mean_of(found, evaluated("gain"), 1), 3, sign=True))
        row.append(interval(mean_of(found, evaluated("thought_len"), 1)))
        rows.append(row + ([figure(paper.get(value), 2)] if same else []))
    head = [name, "seeds", "Math Avg", "Reasoning Avg", "Overall", "gain, nats", "tokens a thought"]
    text = table(head + (["the paper's Overall"] if same else []), rows)
    if paper and not all(value in values for value in paper):
        quoted = ", ".join(f"{value:g}: {score:.2f}" for value, score in paper.items())
        text += f"\n\nThe paper, Overall: {quoted}."
    return text


def equal_across_tau(records: list[Record]) -> str:
    """Whether a seed's examination gives the same scores at every tau, to the last digit."""
    rows = []
    values = points(records, "tau")
    by_tau = {value: {run.seed: run.scores for run in at(records, "tau", value) if run.scores} for value in values}
    for seed in sorted({seed for runs in by_tau.values() for seed in runs}):
        there = [value for value in values if seed in by_tau[value]]
        equal = all(by_tau[value][seed] == by_tau[there[0]][seed] for value in there)
        verdict = ("yes" if equal else "no") if len(there) > 1 else "one tau alone"
        rows.append([str(seed), ", ".join(f"{value:g}" for value in there), verdict])
    return table(["seed", "tau", "all scores equal"], rows)


def tau_text(records: list[Record]) -> str | None:
    text = axis_table(records, "tau", "tau", reported.TABLE_S6)
    return text and f"{text}\n\n{WHY}\n\n{equal_across_tau(records)}"


def axis_section(title: str, axis: str, name: str, paper: dict[Any, float] | None = None) -> Section:
    return Section(title, axis, lambda records: axis_table(records, axis, name, paper))


SECTIONS = (
    axis_section("Figure 2a: rollouts", "rollouts", "G", reported.FIGURE_2A),
    axis_section("Figure 2b: thought length", "thought_tokens", "cap L", reported.FIGURE_2B),
    axis_section("Figure 2c: KL", "kl", "β", reported.FIGURE_2C),
    Section("Table S.6: the moving average", "tau", tau_text),
    axis_section("Horizon: scored tokens after a thought", "horizon", "H"),
    axis_section("Positions a document, at equal generated tokens", "positions", "K"),
    axis_section("Where thoughts are asked for in general text", "place", "place"),
    axis_section("Advantages divided by their spread, as RPT's are", "advantage", "advantages"),
    axis_section("Temperature of thoughts, RPT's is 0.8", "temperature", "T"),
    axis_section("RPT without what RLP has not: further rounds, the choice of positions", "rpt", "RPT"),
)
