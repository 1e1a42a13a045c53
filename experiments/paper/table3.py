# SPDX-License-Identifier: Apache-2.0
"""Table 3: RPT against RLP, once as many input tokens and once as many operations."""

from experiments.paper import reported
from experiments.paper.cells import AFTER, Section, bounds, by_seed, figure, interval, mean_of, seeds, table
from experiments.paper.intervals import paired
from experiments.paper.results import STAGES, Record, select

BUDGETS = {"tokens": "same tokens", "flops": "same FLOPs"}


def text(records: list[Record]) -> str | None:
    rows, any_run = [], False
    for stage in STAGES:
        rlp = select(records, "rlp", stage=stage)
        for budget, name in BUDGETS.items():
            rpt = select(records, f"rpt_{budget}", stage=stage)
            any_run = any_run or bool(rpt)
            difference = bounds(paired(by_seed(rlp), by_seed(rpt)))
            of_paper = reported.TABLE_3[budget] if not stage else (None, None)
            cells = [seeds(rpt), interval(mean_of(rpt)), seeds(rlp), interval(mean_of(rlp)), difference]
            rows.append([AFTER[stage], name, *cells, *(figure(value, 2) for value in of_paper)])
    head = ["after", "budget", "seeds", "RPT", "seeds", "RLP", "RLP − RPT", "the paper's RPT", "the paper's RLP"]
    return table(head, rows) if any_run else None


TABLE_3 = Section("Table 3: RPT against RLP, Overall", "rpt_*", text)
