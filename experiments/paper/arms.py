# SPDX-License-Identifier: Apache-2.0
"""Tables 1 and 2: what each arm is worth, by itself and after the same post-training, benchmark by benchmark."""

from experiments.paper import reported
from experiments.paper.cells import AFTER, NAMES, Section, figure, interval, mean_of, seeds, table
from experiments.paper.domains import BENCHMARKS, MATH, REASONING
from experiments.paper.results import ARMS, STAGES, Record, average, overall, select, standard_error


def arms_table(records: list[Record], base: str, paper: dict[str, tuple[float, float]]) -> str | None:
    """One row an arm and stage. paper: {arm: Overall (after the arm, after post-training)}."""
    head = ["after", "arm", "seeds", *BENCHMARKS, "Math Avg", "Reasoning Avg", "Overall", "Overall, greedy"]
    head += ["Overall, no thought", "SE over problems", "the paper's Overall"]
    rows, any_run = [], False
    for stage in STAGES:
        for arm in ARMS:
            runs = select(records, arm, base, stage)
            any_run = any_run or bool(runs)
            if not runs and base != "decoder" and arm not in paper:
                continue  # the other bases have fewer arms
            reported_here = dict(zip(("", "rlvr"), paper.get(arm, ()), strict=False)).get(stage)
            rows.append([AFTER[stage], NAMES[arm], seeds(runs), *_shares(runs), figure(reported_here, 2)])
    return table(head, rows) if any_run else None


def _shares(runs: list[Record]) -> list[str]:
    groups = [(name,) for name in BENCHMARKS] + [MATH, REASONING]
    cells = [interval(mean_of(runs, lambda run, names=names: average(run, names))) for names in groups]
    cells += [interval(mean_of(runs, lambda run, m=m: overall(run, m))) for m in ("pass1", "greedy", "plain")]
    return [*cells, figure(_mean_error(runs))]


def _mean_error(runs: list[Record]) -> float | None:
    errors = mean_of(runs, standard_error)
    return errors and errors.mean


def _section(title: str, only: str, base: str, paper: dict[str, tuple[float, float]]) -> Section:
    return Section(title, only, lambda records: arms_table(records, base, paper))


TABLE_1 = _section("Table 1: arms before and after post-training", "*", "decoder", reported.TABLE_1)
TABLE_2 = _section("Table 2: the hybrid", "hybrid", "hybrid", reported.TABLE_2)
