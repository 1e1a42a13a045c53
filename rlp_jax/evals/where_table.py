# SPDX-License-Identifier: Apache-2.0
"""The result of `rlp eval --tasks gain` in lines for a reader."""

from collections.abc import Sequence
from typing import Any

TITLES = {
    "class": "token class",
    "span": "data.span",
    "entropy": "entropy of the plain prediction, nats",
    "place": "tokens before it",
}
QUOTES = {
    "target": "the first scored token",
    "target_known": "  where the prefix holds it",
    "target_new": "  where it is new",
    "whole": "all scored tokens",
    "ahead": "the 3 tokens after them",
    "behind": "the last 3 of the prefix",
    "bare": "nothing but scored tokens",
}
WORTH = {
    "known": "share whose quote the prefix holds",
    "gain": "gain of thoughts that quote",
    "gain_of_others": "gain of those that do not",
    "difference": "difference at one position",
    "gain_without": "gain with the quote taken out",
    "carried": "what the quote carries",
    "carried_other": "what as many other tokens carry",
    "carried_beyond_other": "the quote beyond that",
}
WIDTH = 38


def lines(result: dict[str, Any]) -> list[str]:
    """Split, tables, quotes and alarms.

    Args:
      result: of `where.run_gain`, of a run with its `warnings`.
    """
    found = [
        f"gain of {result['documents']} documents, {result['positions']} positions, {result['scored_tokens']} scored "
        f"tokens, in nats a scored token [95%]; thoughts of {result['thought_len']:.1f} tokens, "
        f"{result['stop_rate']:.0%} stopped",
        _line("gain", result, "gain"),
        _line("  format: empty thought", result, "format"),
        _line("  generic: another document's thought", result, "generic"),
        _line("  content: the own thought", result, "content"),
    ]
    if result["drift"]:
        found.append(_line("(of format: policy against baseline)", result, "drift"))
    for name, title in TITLES.items():
        rows = result["where"][name]
        if name == "span" and len(rows) < 2:
            continue
        found.append("")
        found.append(f"{title:{WIDTH}} {'tokens':>7} {'gain':>26} {'content':>26}")
        found += [
            f"  {row['label']:{WIDTH - 2}} {row['count']:7d} {_value(row, 'gain')} {_value(row, 'content')}"
            for row in rows
        ]
    quotes, quoting = result["probes"]["quotes"], result["probes"]["quoting"]
    found += ["", f"{'share of thoughts that quote':{WIDTH}} {'own':>26} {'of another document':>26} {'excess':>26}"]
    found += [
        f"  {title:{WIDTH - 2}} " + " ".join(_value(quotes[name], column) for column in ("own", "shuffled", "excess"))
        for name, title in QUOTES.items()
        if quotes[name] is not None
    ]
    found += ["", f"{quoting['thoughts']} thoughts quote the first scored token"]
    found += [_line(f"  {title}", quoting, name) for name, title in WORTH.items() if quoting[name] is not None]
    if quoting["thoughts"]:
        found.append(_line("gain of all, quotes taken out", result["probes"], "gain_without"))
    return [*found, *_alarms(result)]


def _alarms(result: dict[str, Any]) -> Sequence[str]:
    found = [f"alarm: {message}" for message in result["alarms"].values()]
    for spell in result.get("warnings", ()):
        steps = f"step {spell['first']}" if spell["steps"] == 1 else f"steps {spell['first']} to {spell['last']}"
        found.append(f"alarm of the run, {steps}: {spell['message']}")
    if "warnings" in result and not result["warnings"]:
        found.append("the run raised no collapse warning")
    return ["", *found] if found else []


def _line(title: str, values: dict[str, Any], name: str) -> str:
    return f"{title:{WIDTH}} {_value(values, name).lstrip()}"


def _value(values: dict[str, Any], name: str) -> str:
    interval = values[f"{name}_ci95"]
    between = "" if interval is None else " [{:+.3f}, {:+.3f}]".format(*interval)
    return f"{f'{values[name]:+.3f}{between}':>26}"
