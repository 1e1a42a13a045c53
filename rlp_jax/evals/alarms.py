# SPDX-License-Identifier: Apache-2.0
"""Alarms: thoughts that die out over a run, and thoughts that are none. Few and clear-cut; the rest is for a reader."""

from collections.abc import Sequence
from typing import Any

from rlp_jax.metrics import START_STEPS, ThoughtStart, collapse_warnings, row_warnings

BARE_SHARE = 0.1  # of thoughts


def of_run(rows: Sequence[dict[str, Any]], close_tokens: int) -> list[dict[str, Any]]:
    """When the collapse warnings of a run rose, by the rule that warned while it ran (`metrics.row_warnings`).

    Args:
      rows: of metrics.jsonl, in order of steps; those without thoughts raise nothing.
      close_tokens: of the closing tag.

    Returns:
      In order of `first`: kind, first and last step of an unbroken spell, steps (rows in it), message of the first.
    """
    start, spells, open_ = ThoughtStart(), [], {}
    for row in rows:
        if "thought_len" not in row:
            continue
        start, warnings = row_warnings(start, row, close_tokens)
        open_ = {kind: spell for kind, spell in open_.items() if kind in warnings}
        for kind, message in warnings.items():
            if kind not in open_:
                open_[kind] = {"kind": kind, "first": row["step"], "last": None, "steps": 0, "message": message}
                spells.append(open_[kind])
            open_[kind]["last"] = row["step"]
            open_[kind]["steps"] += 1
    return spells


def of_evaluation(probes: dict[str, Any], thought_len: float, stop_rate: float, close_tokens: int) -> dict[str, str]:
    """Kind to message.

    - empty_thoughts: as in a run.
    - bare_target: more than BARE_SHARE of thoughts are nothing but the tokens they are scored by, and that is beyond
      what another document's thought does at the same place: the interval of the difference lies above 0.

    Args:
      probes: of `breakdown.of_quotes`.
      thought_len, stop_rate: means, a sampled closing tag counted.
    """
    no_start = ThoughtStart(START_STEPS, 0.0, 0.0)  # nothing to compare with: only the absolute rule can warn
    warnings = collapse_warnings(no_start, thought_len, stop_rate, close_tokens)
    bare = probes["quotes"]["bare"]
    surely = bare["excess_ci95"] is not None and bare["excess_ci95"][0] > 0
    if bare["own"] > BARE_SHARE and surely:
        warnings["bare_target"] = (
            f"{bare['own']:.0%} of thoughts are nothing but the tokens they are scored by, {bare['shuffled']:.0%} of "
            "another document's are: an answer is copied or guessed, not worked out"
        )
    return warnings
