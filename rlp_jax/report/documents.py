# SPDX-License-Identifier: Apache-2.0
"""What the viewer shows: held-out documents with the gain at every token, from the documents.jsonl of one or more runs.

A recording is one run at one step. The same text in several recordings is one document, so that they can stand side by
side. The page gets a short index, which it reads at once, and a line of JSON a document, which it reads when it is
opened.
"""

from typing import Any, NamedTuple

from rlp_jax.report.recorded import NUMBERS, OF_TOKENS
from rlp_jax.report.run import Row, Run
from rlp_jax.report.text import script_json, visible

PREVIEW = 90  # characters of a document in the list
LEAST_SCALE = 0.05  # nats; differences below this stay pale, or rounding would look like something


class Documents(NamedTuple):
    """index: JSON for the page. lines: a document each, JSON."""

    index: dict[str, Any]
    lines: list[str]


def gather(runs: list[Run], labels: list[str]) -> Documents | None:
    """The documents of all runs, those of the most recordings first, else as they were recorded; None where there is
    none."""
    recordings, found = [], {}
    gains, ratios = [], {name: [] for name in OF_TOKENS}
    for run, label in zip(runs, labels, strict=True):
        for step in sorted({row["step"] for row in run.documents}):
            when = _when(step, run)
            recordings.append({"run": label, "when": when, "label": f"{label}, {when}" if len(runs) > 1 else when})
            for row in (row for row in run.documents if row["step"] == step):
                key = (str(row.get("document")), tuple(row["tokens"]))
                found.setdefault(key, {})[len(recordings) - 1] = row
                gains += [abs(gain) for gain in where_trained(row)]
                _gather_ratios(ratios, row)
    if not found:
        return None
    entries, lines = [], []
    for (document, tokens), shown in sorted(found.items(), key=lambda item: -len(item[1])):
        text = visible("".join(tokens)[: 4 * PREVIEW])
        entries.append(
            {
                "id": visible(document),
                "text": " ".join(text.split())[:PREVIEW],
                "tokens": len(tokens),
                "gain": {number: _mean(where_trained(row)) for number, row in shown.items()},
            }
        )
        line = {"tokens": [visible(token) for token in tokens], "shown": {n: _shown(row) for n, row in shown.items()}}
        lines.append(script_json(line))
    scale = {"gain": _scale(gains), **{name: _scale(values) for name, values in ratios.items()}}
    some = any(not all(trained(row)) for shown in found.values() for row in shown.values())
    return Documents({"recordings": recordings, "documents": entries, "scale": scale, "some": some}, lines)


def trained(row: Row) -> list[bool]:
    """Of each position, whether the run's own rule may draw it; all of them where none of those is recorded."""
    flags = row.get("trained")
    flags = [flag is True for flag in flags] if isinstance(flags, list) and len(flags) == len(row["position"]) else []
    return flags if any(flags) else [True] * len(row["position"])


def where_trained(row: Row) -> list[float]:
    """The gains that count for the run: those where it thinks."""
    return [gain for gain, counts in zip(row["gain"], trained(row), strict=True) if counts]


def _shown(row: Row) -> dict[str, Any]:
    groups = [[_thought(thought) for thought in group] for group in row["thoughts"]]
    horizon = row.get("horizon")
    return {
        "horizon": horizon if isinstance(horizon, int) else 1,
        "thoughts": groups,
        "trained": trained(row),
        **{name: row[name] for name in NUMBERS},
    }


def _thought(thought: dict[str, Any]) -> dict[str, Any]:
    close, length = thought.get("close"), thought.get("length")
    return {
        "tokens": [visible(token) for token in thought["tokens"]],
        "rest": visible(thought.get("rest")),
        "length": length if isinstance(length, int) else len(thought["tokens"]),
        "stopped": thought.get("stopped") is not False,
        "close": close if isinstance(close, int) else 0,
        **{name: thought[name] for name in ("reward", "advantage", *OF_TOKENS)},
    }


def _when(step: int, run: Run) -> str:
    if step == 0:
        return "before training"
    return "after training" if run.finished and step == run.config.get("steps") else f"step {step}"


def _gather_ratios(ratios: dict[str, list[float]], row: Row) -> None:
    for group in row["thoughts"]:
        for thought in group:
            for name, values in ratios.items():
                values += [abs(value) for value in thought[name] if value is not None]


def _scale(values: list[float]) -> float:
    """The value at full tint: nearly the largest, so that a single one does not make all others pale."""
    values = sorted(values)
    return max(float(f"{values[int(0.97 * (len(values) - 1))]:.2g}"), LEAST_SCALE) if values else LEAST_SCALE


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)
