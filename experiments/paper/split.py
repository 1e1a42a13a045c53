# SPDX-License-Identifier: Apache-2.0
"""Where a run's gain comes from: format, generic and content, which add up to the gain.

- format: what an empty thought gains.
- generic: what another document's thought gains beyond the empty one.
- content: what the document's own thought gains beyond another's.

Fine-tuning (SFT) is left out: its documents hold a thought already.
"""

from experiments.paper.cells import AFTER, NAMES, Section, interval, mean_of, seeds, table
from experiments.paper.results import ARMS, AXES, BASES, STAGES, Record, select


def parts(evaluation: dict) -> dict[str, float]:
    """gain, format, generic and content of one evaluation, nats a scored token; {} where it has no gain."""
    if not {"gain", "gain_empty", "gain_shuffled"} <= evaluation.keys():
        return {}
    gain, empty, shuffled = (evaluation[key] for key in ("gain", "gain_empty", "gain_shuffled"))
    return {"gain": gain, "format": empty, "generic": shuffled - empty, "content": gain - shuffled}


def _order(run: Record) -> tuple:
    value = run.value if isinstance(run.value, int | float) else 0
    place = (BASES.index(run.base), STAGES.index(run.stage), ("", *AXES).index(run.axis))
    return (*place, ARMS.index(run.arm), value, str(run.value))


def _cells(runs: list[Record], when: str) -> list[str]:
    names = ("gain", "format", "generic", "content")
    of = {name: mean_of(runs, lambda run, name=name: parts(run.evaluation[when])[name], 1) for name in names}
    return [interval(value, 3, sign=True) for value in of.values()]


def text(records: list[Record]) -> str | None:
    rows = []
    for base in BASES:
        before = [run for run in select(records, "rlp", base) if parts(run.evaluation.get("before", {}))]
        if before:
            rows.append([base, NAMES["base"], AFTER[""], "main", seeds(before), *_cells(before, "before")])
    counted = [run for run in records if not run.sweep and run.stage != "sft"]
    groups: dict[tuple, list[Record]] = {}
    for run in sorted((run for run in counted if parts(run.evaluation.get("after", {}))), key=_order):
        groups.setdefault(_order(run), []).append(run)
    for runs in groups.values():
        first = runs[0]
        what = f"{first.axis} {first.value}" if first.axis else "main"
        rows.append([first.base, NAMES[first.arm], AFTER[first.stage], what, seeds(runs), *_cells(runs, "after")])
    head = ["base", "arm", "after", "run", "seeds", "gain", "format", "generic", "content"]
    note = (
        "On held-out documents of what each run read: after RLVR, problems of arithmetic. A base is evaluated on those "
        "of its main RLP runs. SFT is left out, as its documents hold a thought already."
    )
    return f"{table(head, rows)}\n\n{note}" if rows else None


SPLIT = Section("What the gain is made of, nats a scored token, at every run's end", "*", text)
