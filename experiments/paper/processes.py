# SPDX-License-Identifier: Apache-2.0
"""Jobs on a few cores: each a sequence of Python processes, one at a time, pinned to a core where that can be done."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.1
STOP_SECONDS = 20.0  # a run that is told to stop saves a checkpoint


class Failed(RuntimeError):
    """A job did not do what it was to do: one line."""


class Finished(NamedTuple):
    """Seconds that a process took, and of processors."""

    seconds: float
    processor_seconds: float


# Yields (arguments of python, name of the log) and is sent what the process took; returns a line for the console.
Job = Generator[tuple[list[str], str], Finished, str]


class Pool:
    """Jobs at a time, one in each place. Leaving it stops what still runs.

    Args:
      places: how many.
      work: where processes run; logs/NAME.log below it holds what they print.
      root: of the package.
    """

    def __init__(self, places: int, work: Path, root: Path):
        self._work, self._running = work, dict.fromkeys(range(places))
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        self._cores = [cores[place % len(cores)] for place in range(places)]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
        self._environment = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            **os.environ,
            "PYTHONPATH": path,
        }

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        processes = [running.process for running in self._running.values() if running]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def free(self) -> int:
        return sum(running is None for running in self._running.values())

    @property
    def busy(self) -> bool:
        return self.free < len(self._running)

    def begin(self, name: str, job: Job) -> None:
        """Starts a job in a free place. It must yield at least one process."""
        place = next(place for place, running in self._running.items() if running is None)
        self._running[place] = self._start(name, job, place, next(job))

    def turn(self) -> list[tuple[str, str, bool]]:
        """Waits a little and goes on with jobs whose process has ended.

        Returns:
          (name, what the job has to say, whether it failed) of each that is over.
        """
        time.sleep(POLL_SECONDS)
        over = []
        for place, running in self._running.items():
            if running is None:
                continue
            pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
            if not pid:
                continue
            code = running.process.returncode = os.waitstatus_to_exitcode(status)
            self._running[place] = None
            try:
                if code:
                    raise Failed(f"{running.what} ended with {code}: {last_line(running.log)}")
                took = Finished(time.monotonic() - running.begun, usage.ru_utime + usage.ru_stime)
                self._running[place] = self._start(running.name, running.job, place, running.job.send(took))
            except StopIteration as stop:
                over.append((running.name, stop.value, False))
            except Failed as error:
                running.job.close()
                over.append((running.name, str(error), True))
        return over

    def _start(self, name: str, job: Job, place: int, wanted: tuple[list[str], str]) -> "Running":
        arguments, log_name = wanted
        prefix = []
        if shutil.which("setpriv"):  # nothing goes on without the driver, however that ended
            prefix += ["setpriv", "--pdeathsig", "KILL"]
        if shutil.which("taskset"):
            prefix += ["taskset", "-c", str(self._cores[place])]
        path = self._work / "logs" / f"{log_name}.log"
        with path.open("ab") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                cwd=self._work, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        return Running(name, job, process, path, " ".join(arguments[:3]), time.monotonic())


class Running(NamedTuple):
    name: str
    job: Job
    process: subprocess.Popen
    log: Path
    what: str
    begun: float


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
