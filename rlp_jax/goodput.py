# SPDX-License-Identifier: Apache-2.0
"""Goodput: the share of a run's time, since it was first started, that went into steps which still count.

Everything else is lost: starting and loading, compiling, evaluating, saving, waiting to be started again, and steps
that a kill undid. The productive seconds are part of the checkpoint, so what came after it is forgotten with the steps,
while the first start is written down once for all.
"""

import time
from pathlib import Path

import jax

STARTED = "started"
COMPILING = "/jax/core/compile/"  # tracing, lowering and compiling


class Intervals:
    """Seconds covered by intervals that end one after the other, those inside each other counted once (a function that
    is traced inside another one's trace)."""

    def __init__(self):
        self._kept: list[tuple[float, float]] = []

    def add(self, start: float, end: float) -> None:
        while self._kept and self._kept[-1][1] >= start:
            start = min(start, self._kept.pop()[0])
        self._kept.append((start, end))

    def total(self) -> float:
        return sum(end - start for start, end in self._kept)


class CompileTime:
    """Seconds this process has spent compiling, from the events that JAX reports. Use it with `with`."""

    def __init__(self):
        self._intervals, self._before = Intervals(), 0.0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._before = self._before, self._intervals.total()
        return self._before - before

    def _listen(self, event: str, duration: float, **kwargs) -> None:
        if event.startswith(COMPILING):
            now = time.monotonic()
            self._intervals.add(now - duration, now)


def productive(seconds: float, compiling: float) -> float:
    """What a step of so many seconds adds, less those in which it was compiled."""
    return max(seconds - compiling, 0.0)


def goodput(productive_seconds: float, started: float, now: float) -> float:
    """Productive share of the wall time.

    Args:
      productive_seconds: of all steps that still count.
      started, now: Unix times of the first start and of now.
    """
    return min(productive_seconds / max(now - started, 1e-9), 1.0)


def first_start(run_dir: Path) -> float:
    """When the run was first started, Unix time; written down at its first start."""
    file = Path(run_dir) / STARTED
    try:
        return float(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a start that was cut off while writing counts from now
        file.write_text(f"{time.time():.3f}\n", encoding="utf-8")
        return float(file.read_text(encoding="utf-8"))
