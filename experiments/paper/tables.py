# SPDX-License-Identifier: Apache-2.0
"""Writes the study's report, experiments/paper/RESULTS.md and its figures, from the committed results alone.

    python -m experiments.paper.tables            # write them
    python -m experiments.paper.tables --check    # exit 1 and name what is not current; nothing is written

Every figure in the report comes from a result file or from `reported.py`; discussion.md is included as it stands. What
has no runs yet says which command makes them.
"""

import argparse
import sys
from pathlib import Path

from experiments.paper import (
    arms,
    axes,
    bases,
    before,
    compute,
    ordering,
    perplexity,
    places,
    split,
    sweeps,
    table3,
    table4,
)
from experiments.paper.cells import Section
from experiments.paper.drawing import Drawing, current, render
from experiments.paper.figure2 import FIGURES, drawings
from experiments.paper.results import FOLDER, Record, ResultError, load

HERE = Path(__file__).parent
SECTIONS: tuple[Section, ...] = (
    before.BEFORE,
    arms.TABLE_1,
    arms.TABLE_2,
    table3.TABLE_3,
    table4.TABLE_4,
    FIGURES,
    *axes.SECTIONS,
    bases.BASES_SECTION,
    perplexity.TABLE_S8,
    split.SPLIT,
    places.PLACES,
    places.QUOTES,
    places.ALARMS,
    sweeps.SWEEPS,
    compute.COMPUTE,
    ordering.ORDERING,
)
LEGEND = (
    "Scores are shares of problems answered right, in percent: Pass@1 over sampled answers with a thought, unless a "
    "column says greedy or without a thought. Math Avg and Reasoning Avg are means over their benchmarks, Overall is "
    "the mean of the two. Each figure is a mean over seeds ± half of its 95% interval (Student's t over the seeds); "
    "differences are paired by seed, with their interval in brackets. An interval is over training seeds alone: all "
    "runs start from the same base, which has one score, and answer the same problems. The column of seeds says how "
    "many runs a row has; a dash is a cell without runs, a score without ± is one run's. The paper's figures are its "
    "own, of other models and benchmarks: what can be compared is their order."
)


def report(records: list[Record], discussion: str) -> str:
    """RESULTS.md."""
    lines = ["# The paper's tables and figures, at laptop scale", discussion.strip(), "## How to read the tables"]
    lines.append(f"Written by `python -m experiments.paper.tables` from {len(records)} result files. {LEGEND}")
    for section in SECTIONS:
        lines += [f"## {section.title}", section.text(records) or _missing(section.only)]
    return "\n\n".join(lines) + "\n"


def _missing(only: str) -> str:
    if only == "*":
        return "No runs yet: `python -m experiments.paper.drive` makes all of them."
    command = f"`python -m experiments.paper.drive --only '{only}'`"
    return f"No runs yet: {command} makes them, after `--only 'sweep*'`, which decides their learning rates."


def stale(records: list[Record], out: Path) -> list[str]:
    """The files of the report that are missing, left over or not what the results give."""
    drawn = drawings(records)
    found = []
    if _text(out / "RESULTS.md") != report(records, (HERE / "discussion.md").read_text()):
        found.append("RESULTS.md")
    for drawing in drawn:
        text = _text(out / "figures" / f"{drawing.name}.svg")
        if text is None or not current(text, drawing):
            found.append(f"figures/{drawing.name}.svg")
    return found + [f"figures/{path.name}" for path in _left_over(out, drawn)]


def write(records: list[Record], out: Path) -> None:
    """Writes the report into a folder; figures without runs go."""
    drawn = drawings(records)
    out.mkdir(parents=True, exist_ok=True)
    (out / "RESULTS.md").write_text(report(records, (HERE / "discussion.md").read_text()))
    for drawing in drawn:
        (out / "figures").mkdir(exist_ok=True)
        (out / "figures" / f"{drawing.name}.svg").write_text(render(drawing))
    for path in _left_over(out, drawn):
        path.unlink()


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _left_over(out: Path, drawn: list[Drawing]) -> list[Path]:
    names = {f"{drawing.name}.svg" for drawing in drawn}
    return sorted(path for path in (out / "figures").glob("*.svg") if path.name not in names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.paper.tables", description="the study's report")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the report is not current")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of RESULTS.md and figures/")
    args = parser.parse_args(arguments)
    try:
        records = load(args.results)
    except ResultError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    if not args.check:
        write(records, args.out)
        print(f"{args.out / 'RESULTS.md'}: {len(records)} results")
        return 0
    found = stale(records, args.out)
    for name in found:
        print(f"{args.out / name} is not current: run python -m experiments.paper.tables", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
