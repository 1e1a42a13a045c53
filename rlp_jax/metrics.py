# SPDX-License-Identifier: Apache-2.0
"""Pure functions over a run's numbers: confidence intervals and the signs of a run that is losing its thoughts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

START_STEPS = 5  # the starting averages are taken over this many steps
LEAST_SPREAD = 0.05  # of rewards within a position, as a share of what thoughts cost


def mean_ci95(values: Sequence[float] | np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean and its normal 95% interval, mean -/+ 1.96 standard errors. One value has an interval of no width.

    Raises:
      ValueError: no values.
    """
    values = np.asarray(values, np.float64).ravel()
    if values.size == 0:
        raise ValueError("mean of no values")
    mean = float(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return mean, (mean - half, mean + half)


class ThoughtStart(NamedTuple):
    """Averages over a run's first steps, what later steps are compared with."""

    steps: int = 0
    thought_len: float = 0.0
    stop_rate: float = 0.0

    def add(self, thought_len: float, stop_rate: float) -> "ThoughtStart":
        """The averages with one more step, unchanged once START_STEPS have been seen or where a value is not finite."""
        if self.steps >= START_STEPS or not (math.isfinite(thought_len) and math.isfinite(stop_rate)):
            return self
        steps = self.steps + 1
        return ThoughtStart(
            steps,
            self.thought_len + (thought_len - self.thought_len) / steps,
            self.stop_rate + (stop_rate - self.stop_rate) / steps,
        )


def collapse_warnings(start: ThoughtStart, thought_len: float, stop_rate: float, close_tokens: int) -> dict[str, str]:
    """Signs that thoughts are dying out: likelihood rewards can shrink them until none are left.

    Args:
      start: averages of the run's first steps.
      thought_len: this step's mean thought length in tokens, a sampled closing tag included.
      stop_rate: this step's share of thoughts that ended with the closing tag.
      close_tokens: tokens of the closing tag.

    Returns:
      Kind of warning to its message, empty where all is well (and while the start is still being measured).
    """
    if start.steps < START_STEPS or not (math.isfinite(thought_len) and math.isfinite(stop_rate)):
        return {}
    warnings = {}
    if thought_len < 0.25 * start.thought_len:
        warnings["thought_length"] = (
            f"thoughts have shrunk to {thought_len:.1f} tokens from {start.thought_len:.1f} at the start"
        )
    if stop_rate > 0.98 and thought_len <= close_tokens + 0.5:
        warnings["empty_thoughts"] = f"thoughts are empty: {thought_len:.1f} tokens, the closing tag and nothing else"
    if start.stop_rate > 0.2 and stop_rate < 0.02:
        warnings["stop_rate"] = (
            f"thoughts no longer end: stop rate {stop_rate:.2f}, {start.stop_rate:.2f} at the start; all are cut"
        )
    return warnings


def spread_warnings(reward_mean: float, reward_std: float) -> dict[str, str]:
    """The sign of thoughts that have become one and the same, and a bad one: all advantages are 0 then, so that it
    stays. Where thoughts pay, a small spread is what success looks like, and no sign.

    Args:
      reward_mean: this step's mean reward, nats a scored token.
      reward_std: its mean standard deviation over the thoughts of a position.

    Returns:
      Kind of warning to its message, empty where all is well.
    """
    if not (math.isfinite(reward_std) and reward_mean < 0 and reward_std < LEAST_SPREAD * -reward_mean):
        return {}
    return {
        "no_spread": f"the thoughts of a position all cost the same, {-reward_mean:.2f} nats: nothing is left to learn "
        "from; try a lower learning rate"
    }


def row_warnings(start: ThoughtStart, row: Mapping[str, Any], close_tokens: int) -> tuple[ThoughtStart, dict[str, str]]:
    """Both kinds of warnings of a row of metrics.jsonl with thoughts, and the averages with it in them. A value that is
    None or missing is not known."""
    names = ("thought_len", "stop_rate", "reward_mean", "reward_std")
    thought_len, stop_rate, *rewards = (math.nan if row.get(name) is None else float(row[name]) for name in names)
    start = start.add(thought_len, stop_rate)
    return start, collapse_warnings(start, thought_len, stop_rate, close_tokens) | spread_warnings(*rewards)
