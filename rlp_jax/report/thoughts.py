# SPDX-License-Identifier: Apache-2.0
"""Thoughts of a run as the page's template wants them: the best and the worst, and some early and late ones."""

import math
from typing import Any

from rlp_jax.report.documents import trained
from rlp_jax.report.numbers import form
from rlp_jax.report.run import Row, Run, number
from rlp_jax.report.text import visible

SAMPLES = 3  # documents shown early, and again late
EXTREMES = 5  # best thoughts, and worst ones
TEXT_LIMIT = 4000  # characters of a thought
PREFIX_LIMIT = 400  # characters of a prefix, its end


def sample_thoughts(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the first and of the last step that hold thoughts, the same documents in both where there are any."""
    if not rows:
        return [], []
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    last = [row for row in rows if row["step"] == rows[-1]["step"]] if rows[-1]["step"] > rows[0]["step"] else []
    shared = {row.get("document") for row in first} & {row.get("document") for row in last}
    return tuple(sorted(group, key=lambda row: row.get("document") not in shared)[:SAMPLES] for group in (first, last))


def groups(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, rows of `place`) of early and late samples."""
    early, late = sample_thoughts(run.thoughts)
    return [(label, [place(row) for row in rows]) for label, rows in (("Early", early), ("Late", late)) if rows]


def extremes(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, rows) of the thoughts that gained and lost the most of all that were kept of the run, in training and
    on held-out text; one a place in a document, so that they differ."""
    best: dict[Any, tuple[float, Row, Row]] = {}
    worst: dict[Any, tuple[float, Row, Row]] = {}
    for row in [*run.thoughts, *(one for document in run.documents for one in _places(document))]:
        for one in row["thoughts"]:
            reward = number(one, "reward")
            if not math.isfinite(reward):
                continue
            where = str(row.get("document")), str(row.get("prefix"))
            if where not in best or reward > best[where][0]:
                best[where] = reward, row, one
            if where not in worst or reward < worst[where][0]:
                worst[where] = reward, row, one
    top = sorted((entry for entry in best.values() if entry[0] > 0), key=lambda entry: -entry[0])[:EXTREMES]
    bottom = sorted((entry for entry in worst.values() if entry[0] < 0), key=lambda entry: entry[0])[:EXTREMES]
    return [
        (label, [_head(row) | {"thought": _thought(one)} for _, row, one in entries])
        for label, entries in (("Best", top), ("Worst", bottom))
        if entries
    ]


def place(row: Row) -> dict[str, Any]:
    """One place in a document and its thoughts, best reward first."""

    def reward(thought):
        value = number(thought, "reward")
        return value if math.isfinite(value) else -math.inf

    thoughts = [_thought(t) for t in sorted(row["thoughts"], key=reward, reverse=True)]
    ends = [("best", thoughts[0]), ("worst", thoughts[-1])] if len(thoughts) > 1 else [("only", thoughts[0])]
    return _head(row) | {"ends": ends, "rest": thoughts[1:-1]}


def _head(row: Row) -> dict[str, Any]:
    prefix = str(row.get("prefix") or "")
    return {
        "step": row["step"],
        "heldout": row.get("heldout", False),
        "prefix": ("… " if len(prefix) > PREFIX_LIMIT else "") + visible(prefix[-PREFIX_LIMIT:]),
        "target": visible(row.get("target")),
        "s_ema": form(number(row, "s_ema"), ".3f"),
    }


def _thought(thought: Row) -> dict[str, Any]:
    text = str(thought.get("text") or "")
    return {
        "text": visible(text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …"),
        "reward": form(number(thought, "reward"), "+.3f"),
        "sign": "up" if number(thought, "reward") > 0 else "down",
        "advantage": form(number(thought, "advantage"), "+.3f"),
        "length": form(number(thought, "length"), ".0f"),
        "stopped": thought.get("stopped") is not False,
    }


def _places(document: Row) -> list[Row]:
    """A row of documents.jsonl as rows of thoughts.jsonl, for the positions where the run thinks."""
    tokens, horizon = document["tokens"], document.get("horizon")
    horizon = horizon if isinstance(horizon, int) else 1
    return [
        {
            "step": document["step"],
            "heldout": True,
            "document": document.get("document"),
            "prefix": "".join(tokens[:t]),
            "target": "".join(tokens[t : t + horizon]),
            "s_ema": s_ema,
            "thoughts": [one | {"text": _without_close(one)} for one in thoughts],
        }
        for t, s_ema, thoughts, counts in zip(
            *(document[name] for name in ("position", "s_ema", "thoughts")), trained(document), strict=True
        )
        if counts
    ]


def _without_close(thought: Row) -> str:
    """A thought's text without its closing tag, whose tokens are the last of all and may be beyond those kept."""
    beyond = number(thought, "length") - len(thought["tokens"])
    close = number(thought, "close")
    tag = int(close - beyond) if beyond < close else 0
    return "".join(thought["tokens"][: len(thought["tokens"]) - tag]) + str(thought.get("rest") or "")
