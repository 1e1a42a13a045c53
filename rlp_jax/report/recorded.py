# SPDX-License-Identifier: Apache-2.0
"""What a row of documents.jsonl has to hold for the page to show it: the file may be damaged, or another program's."""

import math
from typing import Any

NUMBERS = ("position", "s_ema", "gain", "gain_empty")  # one for each position
OF_THOUGHT = ("reward", "advantage")
OF_TOKENS = ("logprob", "ratio_ema", "ratio_sampler")  # one for each token of a thought


def is_document(row: dict[str, Any]) -> bool:
    """Whether a row is one that `evals/every_token.py` wrote: the page relies on it."""

    def numbers(value: Any, count: int) -> bool:
        return isinstance(value, list) and len(value) == count and all(map(_finite, value))

    tokens, position = row.get("tokens"), row.get("position")
    if not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        return False
    if not (isinstance(position, list) and all(isinstance(t, int) and 0 <= t < len(tokens) for t in position)):
        return False
    if not (position and all(numbers(row.get(name), len(position)) for name in NUMBERS)):
        return False
    thoughts = row.get("thoughts")
    if not (isinstance(thoughts, list) and len(thoughts) == len(position)):
        return False
    return all(isinstance(group, list) and all(map(_is_thought, group)) for group in thoughts)


def _is_thought(thought: Any) -> bool:
    if not isinstance(thought, dict) or not isinstance(thought.get("tokens"), list):
        return False
    tokens, columns = thought["tokens"], [thought.get(name) for name in OF_TOKENS]
    if not (all(isinstance(token, str) for token in tokens) and all(_finite(thought.get(name)) for name in OF_THOUGHT)):
        return False
    return all(
        isinstance(column, list) and len(column) == len(tokens) and all(v is None or _finite(v) for v in column)
        for column in columns
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
