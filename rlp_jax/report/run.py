# SPDX-License-Identifier: Apache-2.0
"""A run directory as plain data: what is there is read, what is missing is empty.

A run may be young, killed or resumed: files may be absent, the last line may be torn, and a step may stand twice
(a resumed run repeats what came after its checkpoint), in which case the last one counts.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rlp_jax.report.recorded import is_document

Row = dict[str, Any]


class ReportError(ValueError):
    """A directory that no report can be made from: one line naming it and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of one run directory. Rows are in order of their steps."""

    directory: Path
    config: Row
    metrics: list[Row]
    evals: list[Row]
    thoughts: list[Row]
    documents: list[Row]
    summary: dict[str, Row]
    unreadable: dict[str, int]  # file name -> lines that hold no JSON object with a step, or not what they should

    @property
    def before(self) -> Row:
        """The held-out figures before training: of the summary, else of the first evaluation."""
        return self.summary.get("before") or (self.evals[0] if self.evals else {})

    @property
    def after(self) -> Row:
        """The held-out figures after training, or the latest so far; empty where there is none but the first."""
        return self.summary.get("after") or (self.evals[-1] if len(self.evals) > 1 else {})

    @property
    def finished(self) -> bool:
        return "after" in self.summary

    @property
    def skipped(self) -> list[int]:
        """Steps whose update was skipped because rewards or gradients were not finite."""
        return [row["step"] for row in self.metrics if row.get("finite") in (False, 0)]


def read_run(directory: Path) -> Run:
    """Reads config.json, metrics.jsonl, eval.jsonl, thoughts.jsonl, documents.jsonl and summary.json.

    Raises:
      ReportError: there is no config.json, or it or summary.json holds something else than a JSON object.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ReportError(f"{directory} is not a run directory: it has no config.json")
    unreadable: dict[str, int] = {}

    def rows(name: str) -> list[Row]:
        found, bad = _read_rows(directory / name)
        if bad:
            unreadable[name] = bad
        return found

    recorded = rows("documents.jsonl")
    documents = [row for row in recorded if is_document(row)]
    if len(documents) < len(recorded):
        unreadable["documents.jsonl"] = unreadable.get("documents.jsonl", 0) + len(recorded) - len(documents)
    return Run(
        directory=directory,
        config=_read_object(directory / "config.json"),
        metrics=_last_of_each_step(rows("metrics.jsonl")),
        evals=_last_of_each_step(rows("eval.jsonl")),
        thoughts=_last_of_each_thought(rows("thoughts.jsonl")),
        documents=_last_of_each_document(documents),
        summary={k: v for k, v in _read_object(directory / "summary.json").items() if isinstance(v, dict)},
        unreadable=unreadable,
    )


def number(row: Row, *path: str | int) -> float:
    """The number under a path of keys and indices, nan where there is none."""
    value: Any = row
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _read_object(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """The objects of a jsonl file that carry a step, and the number of other lines."""
    if not path.is_file():
        return [], 0
    rows, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def _last_of_each_step(rows: list[Row]) -> list[Row]:
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _last_of_each_thought(rows: list[Row]) -> list[Row]:
    """Rows with thoughts, one for each (step, document, prefix), by step and within it as written."""
    latest = {}
    for row in rows:
        thoughts = row.get("thoughts")
        thoughts = [t for t in thoughts if isinstance(t, dict)] if isinstance(thoughts, list) else []
        if thoughts:
            latest[row["step"], str(row.get("document")), str(row.get("prefix"))] = row | {"thoughts": thoughts}
    return sorted(latest.values(), key=lambda row: row["step"])


def _last_of_each_document(rows: list[Row]) -> list[Row]:
    latest = {(row["step"], str(row.get("document")), tuple(row["tokens"])): row for row in rows}
    return sorted(latest.values(), key=lambda row: row["step"])
