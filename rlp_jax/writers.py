# SPDX-License-Identifier: Apache-2.0
"""What a run writes as it goes: the console (with live.py), jsonl files, TensorBoard and perhaps W&B.

The jsonl files are appended line by line and only ever hold whole lines of strict JSON (a value that is not finite is
null). `RunLog.positions` says how far they have come, for the checkpoint. They have to be written: storage that keeps
failing ends the run. TensorBoard shows the same numbers and may miss some.
"""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rlp_jax.live import Live, tokens_per_s
from rlp_jax.storage import reason, retried
from rlp_jax.wandb_writer import Wandb

FILES = ("metrics.jsonl", "eval.jsonl", "thoughts.jsonl", "nonfinite.jsonl", "documents.jsonl")

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
    ("tok/s", "tokens_per_s", "7.0f"),
    ("s/step", "seconds", "7.2f"),
)
# Of a step without thoughts.
LOSS_COLUMNS = (
    ("step", "step", "6d"),
    ("loss", "loss", "8.4f"),
    ("tokens", "tokens", "8.0f"),
    ("grad", "grad_norm", "8.3f"),
    ("tok/s", "tokens_per_s", "7.0f"),
    ("s/step", "seconds", "7.2f"),
)
HEADING_EVERY = 20  # rows
FLUSH_EVERY_S = 10.0  # of TensorBoard


class Lines:
    """A file that grows by whole lines; not there before the first one.

    Args:
      path: the file, gone on with where it is there.
      say: told of every attempt to write that failed.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = Path(path), say
        self._descriptor: int | None = None
        self.size = self._path.stat().st_size if self._path.exists() else 0

    def append(self, line: str) -> None:
        """Writes one line, all of it or none.

        Raises:
          StorageError: it cannot be written.
        """
        data = (line + "\n").encode()
        retried(lambda: self._append(data), self._path, self._say)
        self.size += len(data)

    def sync(self) -> None:
        """Returns when every line is on disk. Raises StorageError."""
        retried(self._sync, self._path, self._say)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, data: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._check_place()
        if os.fstat(self._descriptor).st_size != self.size:  # what an attempt that failed left
            os.ftruncate(self._descriptor, self.size)
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _sync(self) -> None:
        if self._descriptor is not None:
            self._check_place()
            os.fsync(self._descriptor)

    def _check_place(self) -> None:
        """A file that is deleted or moved away can still be written to, and nobody would see it."""
        if not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
            raise OSError(errno.ENOENT, "another file has taken its place", str(self._path))


class TensorBoard:
    """Scalars in an event file. Writing them here and now instead of in tensorboardX's thread, whose queue stops the
    run for good when the thread has met an error.

    Args:
      directory: of the event files.
      purge: TensorBoard hides what another process logged from this step on.
      say: told of errors; the next scalars go into a new file.
    """

    def __init__(self, directory: Path, purge: int | None, say: Callable[[str], None]):
        self._directory, self._purge, self._say = Path(directory), purge, say
        self._writer, self._files, self._flushed = None, 0, time.monotonic()

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        now = time.time()
        try:
            writer = self._writer or self._open()
            for tag, value in scalars.items():
                writer.write_event(Event(wall_time=now, step=step, summary=scalar(tag, value)))
            if time.monotonic() - self._flushed > FLUSH_EVERY_S:
                writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _open(self):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._directory.mkdir(exist_ok=True)
        self._files += 1
        self._writer = EventsWriter(str(self._directory / "events"), f".{self._files}")
        if self._purge is not None:
            log = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=self._purge, session_log=log))
            self._purge = None
        return self._writer

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self._say(f"warning: {self._directory}: {reason(error)}; TensorBoard misses these numbers")


class RunLog:
    """The writers of one run directory; use it with `with`, so that every file is closed whatever happens.

    Args:
      run_dir: exists already.
      steps: of the whole run, for the progress bar.
      start: the step that the run resumes from; TensorBoard hides what a killed run logged beyond it.
      console: where to print; standard output by default.
      wandb: the project of a Weights & Biases run that gets the same numbers; None: none.
      config: the run's settings, for it.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        start: int = 0,
        console: Console | None = None,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.console = console or Console()
        self._rows, self._every, self._steps = 0, max(1, min(10, steps // 20)), steps
        self._files = {name: Lines(Path(run_dir) / name, self.message) for name in FILES}
        self._tensorboard = TensorBoard(Path(run_dir) / "tensorboard", start + 1 if start else None, self.message)
        self._live = Live(self.console, steps, start)
        self._wandb = Wandb(wandb, Path(run_dir), config or {}, self.message) if wandb else None
        self._start = start

    def message(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        printer(self.console)(text)

    def step(self, row: Mapping[str, Any]) -> None:
        """One training step: metrics.jsonl, TensorBoard, and a table row every few steps."""
        self._write("metrics.jsonl", row)
        self._scalars("train", row)
        self._live.step(row)
        if row["step"] % self._every == 0 or row["step"] in (self._start + 1, self._steps):
            columns = COLUMNS if "reward_mean" in row else LOSS_COLUMNS
            if self._rows % HEADING_EVERY == 0:
                self.message(" ".join(f"{title:>{_width(form)}}" for title, _, form in columns))
            shown = {"tokens_per_s": tokens_per_s(row), **row}
            line = " ".join(_cell(shown.get(key), form) for _, key, form in columns)
            self._rows += 1
            self.message(line if self._live.shown else line + self._live.left())

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

    def not_finite(self, rows: list[Mapping[str, Any]]) -> None:
        """The documents of a step that was skipped: nonfinite.jsonl."""
        for row in rows:
            self._write("nonfinite.jsonl", row)

    def documents(self, rows: list[Mapping[str, Any]]) -> None:
        """Held-out documents with the gain at every token: documents.jsonl."""
        for row in rows:
            self._write("documents.jsonl", row)

    def positions(self) -> dict[str, int]:
        """Bytes in each file, all of them on disk. Raises StorageError."""
        for file in self._files.values():
            file.sync()
        return {name: file.size for name, file in self._files.items()}

    def close(self) -> None:
        self._live.close()
        for file in self._files.values():
            file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self._files[name].append(json.dumps(strict(row), ensure_ascii=False, allow_nan=False))

    def _scalars(self, group: str, row: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        finite = {f"{group}/{key}": float(value) for key, value in numbers.items() if math.isfinite(value)}
        self._tensorboard.add(finite, row["step"])
        if self._wandb is not None:
            self._wandb.add(finite, row["step"])


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

    def not_finite(self, rows: list[Mapping[str, Any]]) -> None:
        pass

    def documents(self, rows: list[Mapping[str, Any]]) -> None:
        pass

    def positions(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def printer(console: Console) -> Callable[[str], None]:
    """Prints a line as it is; a console that is gone is no reason to stop."""

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return say


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
