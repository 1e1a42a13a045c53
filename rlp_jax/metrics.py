# SPDX-License-Identifier: Apache-2.0
"""Pure functions over a run's numbers: confidence intervals and the signs of a run that is losing its thoughts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

START_STEPS = 5  # the starting averages are taken over this many steps


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
