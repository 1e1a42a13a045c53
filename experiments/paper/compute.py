# SPDX-License-Identifier: Apache-2.0
"""What each arm cost: tokens read and sampled, operations counted from the programs, seconds of one core."""

from collections.abc import Callable

from experiments.paper.cells import AFTER, NAMES, Section, figure, mean_of, seeds, table
from experiments.paper.results import ARMS, BASES, STAGES, Record, select

NOTE = (
    "The paper's FLOP matching counts a token sampled like a token read: its measure is their sum. FLOPs are counted "
    "from the programs, for RLP and the runs matched to it that sample nothing. Seconds are those of all steps, the "
    "first one's compilation included."
)


def text(records: list[Record]) -> str | None:
    rows = []
    columns = _columns(records)
    for base in BASES:
        for stage in STAGES:
            for arm in ARMS:
                runs = [run for run in select(records, arm, base, stage) if "seconds" in run.compute]
                if runs:
                    rate = f"{runs[0].settings['learning_rate']:g}"
                    cells = [_cell(runs, name, of) for name, of in columns.items()]
                    rows.append([base, NAMES[arm], AFTER[stage], seeds(runs), rate, *cells])
    head = ["base", "arm", "after", "seeds", "rate", *columns]
    return f"{table(head, rows)}\n\n{NOTE}" if rows else None


def _columns(records: list[Record]) -> dict[str, Callable[[Record], float | None]]:
    flops_of_matched = {
        run.settings["match_run"]: run.budget["rlp_flops"]
        for run in records
        if run.settings.get("match_run") and run.budget.get("rlp_flops")
    }
    return {
        "steps": lambda run: run.settings.get("steps"),
        "tokens read": lambda run: run.compute.get("input_tokens"),
        "tokens sampled": lambda run: run.compute.get("sampled_tokens", 0),
        "read + sampled": lambda run: run.compute["input_tokens"] + run.compute.get("sampled_tokens", 0),
        "FLOPs": lambda run: run.compute.get("flops") or flops_of_matched.get(run.name),
        "seconds": lambda run: run.compute["seconds"],
    }


def _cell(runs: list[Record], name: str, of: Callable[[Record], float | None]) -> str:
    mean = mean_of(runs, of, 1)
    if mean is None:
        return figure(None)
    return f"{mean.mean:.3g}" if name == "FLOPs" else figure(mean.mean, 0)


COMPUTE = Section("Compute: mean of a run", "*", text)
