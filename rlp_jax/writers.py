"""What a run writes as it goes: the console, three jsonl files and TensorBoard.

The jsonl files are appended line by line and only ever hold whole lines of strict JSON (a value that is not finite is
null). `RunLog.positions` says how far they have come, for the checkpoint.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FILES = ("metrics.jsonl", "eval.jsonl", "thoughts.jsonl")

# Column heading, key of the row, format.
COLUMNS = (
    ("step", "step", "6d"),
    ("gain", "reward_mean", "+8.3f"),
    ("spread", "reward_std", "7.3f"),
    ("entropy", "entropy", "8.3f"),
    ("length", "thought_len", "7.1f"),
    ("stop", "stop_rate", "5.2f"),
    ("clip", "clip_fraction", "6.3f"),
    ("gap", "logprob_gap", "8.1e"),
    ("grad", "grad_norm", "8.3f"),
    ("tok/s", "sampled_tokens_per_s", "7.0f"),
    ("s/step", "seconds", "7.2f"),
)
HEADING_EVERY = 20  # rows


class RunLog:
    """The writers of one run directory; use it with `with`, so that every file is closed whatever happens.

    Args:
      run_dir: exists already.
      steps: of the whole run, for the progress bar.
      start: the step that the run resumes from; TensorBoard hides what a killed run logged beyond it.
      console: where to print; standard output by default.
    """

    def __init__(self, run_dir: Path, steps: int, start: int = 0, console: Console | None = None):
        from tensorboardX import SummaryWriter

        self.console = console or Console()
        self._rows, self._every, self._steps = 0, max(1, min(10, steps // 20)), steps
        self._files = {name: open(Path(run_dir) / name, "a", encoding="utf-8") for name in FILES}  # noqa: SIM115
        self._tensorboard = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=start + 1 if start else None)
        self._progress = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("training", total=steps, completed=start)
            self._progress.start()
        self._first: tuple[int, float] | None = None  # step and time of the first row: compilation lies before it
        self._start = start

    def message(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, row: Mapping[str, Any]) -> None:
        """One training step: metrics.jsonl, TensorBoard, and a table row every few steps."""
        self._write("metrics.jsonl", row)
        self._scalars("train", row)
        if self._progress:
            self._progress.update(self._task, completed=row["step"])
        if row["step"] % self._every == 0 or row["step"] in (self._start + 1, self._steps):
            if self._rows % HEADING_EVERY == 0:
                self.message(" ".join(f"{title:>{_width(form)}}" for title, _, form in COLUMNS))
            line = " ".join(_cell(row.get(key), form) for _, key, form in COLUMNS)
            self._rows += 1
            self.message(line if self._progress else line + self._left(row["step"]))

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """One held-out evaluation: eval.jsonl, TensorBoard and a line on the console."""
        self._write("eval.jsonl", row)
        self._scalars("eval", row)
        interval = "" if row["gain_ci95"] is None else " [{:+.3f}, {:+.3f}]".format(*row["gain_ci95"])
        self.message(
            f"held-out after step {row['step']}: gain {row['gain']:+.3f}{interval}, "
            f"empty thought {row['gain_empty']:+.3f}, shuffled {row['gain_shuffled']:+.3f} nats a token; "
            f"cross-entropy {row['ce_think']:.3f} thinking, {row['ce_no_think']:.3f} not; "
            f"accuracy {row['acc_think']:.1%}, {row['acc_no_think']:.1%}"
        )

    def thoughts(self, rows: list[Mapping[str, Any]]) -> None:
        """A few thoughts of a step: thoughts.jsonl."""
        for row in rows:
            self._write("thoughts.jsonl", row)

    def positions(self) -> dict[str, int]:
        """Bytes in each file, all of them on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        for file in self._files.values():
            file.close()
        self._tensorboard.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._files[name].flush()

    def _scalars(self, group: str, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step" and math.isfinite(value):
                self._tensorboard.add_scalar(f"{group}/{key}", value, row["step"])

    def _left(self, step: int) -> str:
        if self._first is None:
            self._first = (step, time.monotonic())
            return ""
        first, began = self._first
        seconds = (time.monotonic() - began) / (step - first) * (self._steps - step)
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"


class NoLog(RunLog):
    """What every process of a run but the first uses: writes nothing."""

    def __init__(self):
        self.console = Console(quiet=True)

    def step(self, row: Mapping[str, Any]) -> None:
        pass

    def evaluation(self, row: Mapping[str, Any]) -> None:
        pass

    def thoughts(self, rows: list[Mapping[str, Any]]) -> None:
        pass

    def positions(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def strict(value: Any) -> Any:
    """The value with every number that JSON cannot hold replaced by None."""
    if isinstance(value, Mapping):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it: written beside its place, then renamed into it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _width(form: str) -> int:
    return int(form.lstrip("+").split(".")[0].rstrip("defg"))


def _cell(value: Any, form: str) -> str:
    if value is None or not isinstance(value, int | float):
        return f"{'-':>{_width(form)}}"
    return f"{value:{form}}"
