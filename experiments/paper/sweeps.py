# SPDX-License-Identifier: Apache-2.0
"""Every learning rate that was tried, on validation problems; the chosen one in bold."""

from experiments.paper.cells import AFTER, MISSING, NAMES, Section, figure, table
from experiments.paper.results import ARMS, BASES, STAGES, Record, overall


def text(records: list[Record]) -> str | None:
    tried = [run for run in records if run.sweep]
    if not tried:
        return None
    rates = sorted({run.settings["learning_rate"] for run in tried})
    rows = []
    for base in BASES:
        for stage in STAGES:
            for arm in ARMS:
                runs = [run for run in tried if (run.base, run.stage, run.arm) == (base, stage, arm)]
                by_rate = {run.settings["learning_rate"]: run for run in runs}
                if runs:
                    rows.append([base, AFTER[stage], NAMES[arm], *(_cell(by_rate.get(rate)) for rate in rates)])
    return table(["base", "trained last", "arm", *(f"{rate:g}" for rate in rates)], rows)


def _cell(run: Record | None) -> str:
    if run is None:
        return MISSING
    score = overall(run, split="validation")
    shown = figure(None if score is None else 100 * score)
    return f"**{shown}**" if run.chosen else shown


SWEEPS = Section("Learning rates, validation Overall of one seed", "sweep*", text)
