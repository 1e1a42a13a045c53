# SPDX-License-Identifier: Apache-2.0
"""The line at the bottom of a terminal while a run goes on: how far, how long still, how fast, how the gain moves.

Away from a terminal nothing is drawn, and the same time left is put behind the rows of the table.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN = 24  # steps of the sparkline
RECENT = 20  # steps that the time left is judged by
BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = "_.-=+*#@"


class Live:
    """Progress of a run. Call `close` when it ends, whatever happens.

    Args:
      console: draws on it only where it is a terminal.
      steps: of the whole run.
      start: the step that the run goes on from.
    """

    def __init__(self, console: Console, steps: int, start: int = 0):
        self._steps, self._gains = steps, deque(maxlen=SHOWN)
        self._times = deque(maxlen=RECENT + 1)  # (step, seconds): compilation lies before the first one
        self._bars = BARS if console.encoding.lower().startswith("utf") else PLAIN_BARS
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]training"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[said]}", markup=False),
                console=console,
            )
            self._task = self._progress.add_task("training", total=steps, completed=start, said="compiling")
            self._progress.start()

    @property
    def shown(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._progress is not None

    def step(self, row: Mapping[str, Any]) -> None:
        """One training step has been done: its row of metrics.jsonl."""
        self._times.append((row["step"], time.monotonic()))
        value = row.get("reward_mean")
        if isinstance(value, int | float) and math.isfinite(value):
            self._gains.append(float(value))
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], said=self._said(row))

    def left(self) -> str:
        """The time left, to be put behind a line; "" while nothing can be said."""
        seconds = self._seconds_left()
        return "" if seconds is None else f"  {duration(seconds)} left"

    def close(self) -> None:
        """Leaves the line as it is."""
        if self._progress is not None:
            self._progress.stop()

    def _said(self, row: Mapping[str, Any]) -> str:
        parts = []
        seconds, rate = self._seconds_left(), tokens_per_s(row)
        if seconds is not None:
            parts.append(f"{duration(seconds)} left")
        if rate is not None:
            parts.append(f"{rate:,.0f} tok/s")
        if self._gains:
            parts.append(f"gain {self._gains[-1]:+.3f} {sparkline(self._gains, self._bars)}")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if len(self._times) < 2:
            return None
        (first, began), (last, now) = self._times[0], self._times[-1]
        return (now - began) / (last - first) * (self._steps - last)


def tokens_per_s(row: Mapping[str, Any]) -> float | None:
    """Tokens read and sampled a second over a whole step; None where the row does not tell."""
    if not row.get("seconds") or "input_tokens" not in row:
        return None
    return (row["input_tokens"] + row.get("sampled_tokens", 0)) / row["seconds"]


def sparkline(values: Sequence[float], bars: str = BARS) -> str:
    """A character a value, from the smallest to the largest of them."""
    low, high = min(values), max(values)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """As 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
