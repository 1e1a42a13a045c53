# SPDX-License-Identifier: Apache-2.0
"""What the bases can do before any run: one step of a thought, answers with and without one, thoughts of their own.

From bases/abilities.json, which `python -m experiments.paper.pretrain NAMES --check --out experiments/paper/bases
--record FILE` writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from experiments.paper.bases import NAMES
from experiments.paper.cells import Section, figure, table
from experiments.paper.domains import BENCHMARKS
from experiments.paper.results import Record

FILE = Path(__file__).parent / "bases" / "abilities.json"
COLUMNS = {
    "one step": "one step of a thought, accuracy",
    "no thought": "answer without a thought, accuracy",
    "right thought": "answer after a thought: right, accuracy",
    "wrong thought": "answer after a thought: wrong, accuracy",
    "empty thought": "answer after a thought: empty, accuracy",
    "samples right": "thoughts, temperature 0.7: right",
    "samples wrong": "thoughts, temperature 0.7: wrong",
}
NOTE = (
    "Shares in percent: steps of thoughts that are right given what is before them; answers that are right without a "
    "thought and after a thought of a kind; thoughts sampled at temperature 0.7 that follow the right procedure to its "
    "end, and the wrong one."
)


def abilities_table(abilities: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One row a base and benchmark.

    Args:
      abilities: {base: {benchmark: {what: share}}}.
    """
    rows = [
        [NAMES[base], benchmark, *(figure(100 * abilities[base][benchmark][what]) for what in COLUMNS.values())]
        for base in NAMES
        if base in abilities
        for benchmark in BENCHMARKS
    ]
    return f"{table(['base', 'benchmark', *COLUMNS], rows)}\n\n{NOTE}"


def text(records: list[Record]) -> str | None:
    del records
    return abilities_table(json.loads(FILE.read_text())) if FILE.is_file() else None


BEFORE = Section("What the bases can do", "*", text)
