# SPDX-License-Identifier: Apache-2.0
"""The table of held-out figures: before and after one run, or several runs side by side."""

import math
from typing import Any

from rlp_jax.report.numbers import form
from rlp_jax.report.run import Row, Run, number

# Label, key (its interval is under KEY_ci95), format, which change is an improvement (+1, -1; 0: neither).
TABLE = (
    ("Information gain", "gain", "+.3f", +1),
    ("Control: empty thought", "gain_empty", "+.3f", 0),
    ("Control: shuffled thought", "gain_shuffled", "+.3f", 0),
    ("Gain over the empty thought", "gain_over_empty", "+.3f", +1),
    ("Gain over the shuffled thought", "gain_over_shuffled", "+.3f", +1),
    ("Cross-entropy after a thought", "ce_think", ".3f", -1),
    ("Cross-entropy without (moving average)", "ce_no_think", ".3f", 0),
    ("Cross-entropy without (policy)", "ce_no_think_policy", ".3f", 0),
    ("Cross-entropy after an empty thought", "ce_empty", ".3f", 0),
    ("Cross-entropy after a shuffled thought", "ce_shuffled", ".3f", 0),
    ("Accuracy after a thought", "acc_think", ".1%", +1),
    ("Accuracy without", "acc_no_think", ".1%", 0),
    ("Thought length, tokens", "thought_len", ".1f", 0),
    ("Thoughts that end by themselves", "stop_rate", ".1%", 0),
)


def table(before: Row, after: Row) -> list[dict[str, str]]:
    rows = []
    for label, key, spec, better in TABLE:
        old, new = number(before, key), number(after, key)
        if math.isfinite(old) or math.isfinite(new):
            change = new - old
            good = "good" if change * better > 0 else "bad" if change * better < 0 else ""
            rows.append(
                {
                    "label": label,
                    "before": form(old, spec),
                    "before_interval": _interval(before, key, spec),
                    "after": form(new, spec),
                    "after_interval": _interval(after, key, spec),
                    "change": form(100 * change, "+.1f") + " points"
                    if "%" in spec
                    else form(change, "+" + spec.lstrip("+")),
                    "good": good,
                }
            )
    return rows


def _interval(row: Row, key: str, spec: str) -> str:
    low, high = (number(row, f"{key}_ci95", i) for i in (0, 1))
    return f"{form(low, spec)} to {form(high, spec)}" if math.isfinite(low) and math.isfinite(high) else ""


def side_by_side(runs: list[Run]) -> list[dict[str, Any]]:
    """A row a measure: its label, and of each run the latest value, its interval and the value before training."""
    rows = []
    for label, key, spec, _ in TABLE:
        latest = [run.after or run.before for run in runs]
        if any(math.isfinite(number(row, key)) for row in latest):
            cells = [
                {
                    "value": form(number(row, key), spec),
                    "interval": _interval(row, key, spec),
                    "before": form(number(run.before, key), spec) if run.after else "",
                }
                for run, row in zip(runs, latest, strict=True)
            ]
            rows.append({"label": label, "cells": cells})
    return rows


def differences(runs: list[Run]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs: name and a cell a run."""
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for config in flat for name in config)
    return [
        {"name": name, "cells": [str(config.get(name, "–")) for config in flat]}
        for name in names
        if len({repr(config.get(name)) for config in flat}) > 1
    ]


def _flat(tree: Row, prefix: str = "") -> Row:
    flat: Row = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
