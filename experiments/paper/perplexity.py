# SPDX-License-Identifier: Apache-2.0
"""Table S.8: perplexity of held-out documents with and without thoughts, and with the two controls in their place.

Over scored tokens of the study's mix alone: those of a document at which the evaluation thinks.
"""

import math
from collections.abc import Callable

from experiments.paper import reported
from experiments.paper.cells import NAMES, Section, interval, mean_of, seeds, table
from experiments.paper.results import ARMS, Record, select

COLUMNS = {
    "no thought": "ce_no_think_policy",
    "thought": "ce_think",
    "empty thought": "ce_empty",
    "another document's thought": "ce_shuffled",
}


def _perplexity(key: str, when: str) -> Callable[[Record], float | None]:
    def of(run: Record) -> float | None:
        value = run.evaluation.get(when, {}).get(key)
        return None if value is None else math.exp(value)

    return of


def text(records: list[Record]) -> str | None:
    rows = []
    for base in ("decoder", "hybrid"):
        before = [run for run in select(records, "rlp", base) if "before" in run.evaluation]
        for arm in ARMS:
            runs = before if arm == "base" else [r for r in select(records, arm, base) if "after" in r.evaluation]
            if runs or base == "decoder":
                when = "before" if arm == "base" else "after"
                cells = [interval(mean_of(runs, _perplexity(key, when), 1), 3) for key in COLUMNS.values()]
                rows.append([base, NAMES[arm], seeds(runs), *cells])
    if not any(run.evaluation for run in records):
        return None
    paper = ", ".join(f"{name} {first} → {second}" for name, (first, second) in reported.TABLE_S8.items())
    note = "The base is evaluated on the held-out documents of each seed's RLP run."
    return f"{table(['base', 'arm', 'seeds', *COLUMNS], rows)}\n\n{note} The paper: {paper}."


TABLE_S8 = Section("Table S.8: perplexity with and without thoughts", "*", text)
