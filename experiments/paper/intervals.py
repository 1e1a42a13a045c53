# SPDX-License-Identifier: Apache-2.0
"""Means over seeds with 95% intervals, and differences paired by seed. Student's t: the seeds are few."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 97.5% quantiles of Student's t by degrees of freedom; more than these have the last.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """mean of n values; half: half the width of the 95% interval, None for fewer than two values."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half


def mean(values: Sequence[float]) -> Interval | None:
    """The mean over seeds, or None without values."""
    if not values:
        return None
    half = None
    if len(values) > 1:
        half = T[min(len(values) - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), half, len(values))


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Interval | None:
    """Mean of left − right over the seeds that both have, or None where they share none."""
    return mean([left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())])
