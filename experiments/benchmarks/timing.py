# SPDX-License-Identifier: Apache-2.0
"""Paired timing: the candidates take turns in one process, so that a ratio holds when the machine's speed drifts."""

import json
import statistics
import time
from collections.abc import Callable

from peers.environments import Missing


def take_turns(
    candidates: dict[str, Callable[[], object]], rounds: int, gone: dict[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one call of each that does not count (compilation).

    With `gone`, a peer that ends takes no further turns, is not in the result, and `gone` says why.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name in list(seconds):
            start = time.perf_counter()
            try:
                candidates[name]()
            except Missing as missing:
                if gone is None or name == "ours":
                    raise
                gone[f"{name}_missing"] = str(missing)
                del seconds[name]
                continue
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """Ratio of seconds round by round: median, least and greatest."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def against_ours(seconds: dict[str, list[float]]) -> dict[str, float | list[float]]:
    """`vs_NAME`: each other side's seconds over those of "ours", with the range over rounds."""
    result = {}
    for name in [name for name in seconds if name != "ours"]:
        ratio = median_ratio(seconds[name], seconds["ours"])
        result[f"vs_{name}"] = round(ratio["median"], 2)
        result[f"vs_{name}_range"] = [round(ratio["min"], 2), round(ratio["max"], 2)]
    return result


def finish(result: dict, as_json: bool) -> None:
    """The figures for a reader; with `as_json` a last line for a program."""
    for name, value in result.items():
        print(f"{name}: {value}")
    if as_json:
        print(json.dumps(result))
