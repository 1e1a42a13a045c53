# SPDX-License-Identifier: Apache-2.0
"""Notices that another process of a run is dead or hangs, and ends this one with its name.

Every process reports to the key-value store of JAX's coordinator (which lives in process 0) that it is alive and how
far its loop has come. Process 0 reads all reports and publishes a verdict, which the others read: the traffic grows
with the number of processes, not with its square. A process that fails says so itself before it ends.

JAX has a heartbeat of its own, but ends a process by aborting it and does not say which other one was lost.
"""

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LOST = 75  # exit code (EX_TEMPFAIL): a process of the run was lost; start all of them again and the run resumes
INTERVAL = 1.0  # seconds between reports
REPORTS, VERDICT = "rlp/report/", "rlp/verdict"
STATUS = re.compile(
    r"(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|"
    r"RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS|"
    r"UNAUTHENTICATED): "
)


def of_runtime(error: BaseException) -> bool:
    """Whether JAX's runtime failed: a device, the network, a process at the other end of a collective operation.

    By the status code that its message begins with: the type says little, since a program that fails is a
    JaxRuntimeError where its results are waited for, and a ValueError, like bad input, where it fails in a call (of
    the second and later ones, which jax 0.10 does not make from Python).
    """
    return STATUS.match(str(error)) is not None


class Verdict(NamedTuple):
    """Why every process has to end, and with which exit code."""

    code: int
    message: str


class Report(NamedTuple):
    """What a process says of itself. `beat` counts reports, `turn` the phases that its loop has finished, `last` names
    the last of them; `left` is a Verdict once the process has failed."""

    beat: int
    turn: int
    last: str
    left: list | None = None


class Judge:
    """Decides, from reports as they come in, whether a process has been lost. Only this process's clock is used.

    Args:
      names: of the processes, for messages.
      silent: seconds without a report after which a process is dead.
      stalled: seconds without a finished phase after which the process that is furthest behind hangs.
    """

    def __init__(self, names: list[str], silent: float, stalled: float):
        self._names, self._silent, self._stalled = names, silent, stalled
        self._seen: dict[int, tuple[Report, float, float]] = {}  # report, when it was new, when its turn was new

    def verdict(self, reports: dict[int, Report], now: float) -> Verdict | None:
        """None while all is well.

        Args:
          reports: the latest of each process, by process id.
          now: seconds of a clock that only moves on.
        """
        for process in range(len(self._names)):
            report = reports.get(process, Report(0, 0, "nothing"))
            before, beat_at, turn_at = self._seen.get(process, (None, now, now))
            if before is not None and report.beat != before.beat:
                beat_at = now
            if before is not None and report.turn != before.turn:
                turn_at = now
            self._seen[process] = report, beat_at, turn_at
        for process, (report, _, _) in self._seen.items():
            if report.left is not None:
                code, message = report.left
                return Verdict(code, f"{self._names[process]} failed: {message}")
        dead = [p for p, (_, beat_at, _) in self._seen.items() if now - beat_at > self._silent]
        if dead:
            return Verdict(LOST, f"{self._list(dead)}: no sign of life for {self._silent:.0f} seconds")
        behind = min(report.turn for report, _, _ in self._seen.values())
        late = [p for p, (report, _, _) in self._seen.items() if report.turn == behind]
        if all(now - self._seen[p][2] > self._stalled for p in late):
            last = self._seen[late[0]][0].last
            return Verdict(LOST, f"{self._list(late)}: nothing finished for {self._stalled:.0f} seconds after {last}")
        return None

    def _list(self, processes: list[int]) -> str:
        shown = ", ".join(self._names[p] for p in processes[:4])
        return shown + (f" and {len(processes) - 4} more" if len(processes) > 4 else "")


class Watchdog:
    """Reports and listens in threads of its own, from `start` to `stop`.

    Args:
      client: of JAX's coordination service.
      process: this process's id.
      names: of all processes.
      silent, stalled: see `Judge`.
    """

    def __init__(self, client: Any, process: int, names: list[str], silent: float, stalled: float):
        self._client, self._process, self._names, self._silent = client, process, names, silent
        self._judge = Judge(names, silent, stalled) if process == 0 else None
        self._report = Report(0, 0, "the start")
        self._answered = time.monotonic()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._report_on, self._watch_over)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        # Also when a process that was killed is started again before anybody missed it, and wants to join.
        lost = f"{self._names[0]}, the coordinator, was lost, or another process" if self._process else "a process"
        on_abort(f"{lost} was started again: JAX says which above")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * INTERVAL)

    def tick(self, phase: str) -> None:
        """The loop has finished a phase."""
        with self._lock:
            self._report = self._report._replace(turn=self._report.turn + 1, last=phase)

    def leave(self, verdict: Verdict) -> None:
        """Says that this process failed, leaves the others the time to read it, and ends it."""
        with self._lock:
            self._report = self._report._replace(left=list(verdict))
        time.sleep(4 * INTERVAL)
        end(verdict.code)

    def wait_for_verdict(self) -> None:
        """Returns when a lost process would have been noticed: for errors that may be another process's fault."""
        time.sleep(self._silent + 4 * INTERVAL)

    def _report_on(self) -> None:
        while not self._stop.wait(INTERVAL):
            with self._lock:
                self._report = self._report._replace(beat=self._report.beat + 1)
                report = json.dumps(self._report)
            try:
                self._client.key_value_set(f"{REPORTS}{self._process}", report, allow_overwrite=True)
                verdict = self._read() if self._judge is None else self._decide()
            except Exception:  # no answer: `_watch_over` counts the seconds
                continue
            self._answered = time.monotonic()
            if verdict is not None:
                self._end_by(verdict)

    def _watch_over(self) -> None:
        """Process 0 may stop answering altogether, and leave the other thread waiting."""
        while not self._stop.wait(INTERVAL):
            if time.monotonic() - self._answered > self._silent + 2 * INTERVAL:
                self._end_by(Verdict(LOST, f"{self._names[0]}: no answer for {self._silent:.0f} seconds"))

    def _read(self) -> Verdict | None:
        found = dict(self._client.key_value_dir_get(VERDICT))
        return Verdict(*json.loads(next(iter(found.values())))) if found else None

    def _decide(self) -> Verdict | None:
        stored = self._client.key_value_dir_get(REPORTS)
        reports = {int(key.rpartition("/")[2]): Report(*json.loads(value)) for key, value in stored}
        verdict = self._judge.verdict(reports, time.monotonic())
        if verdict is not None:
            self._client.key_value_set(f"{VERDICT}/0", json.dumps(verdict), allow_overwrite=True)
            self._stop.wait(3 * INTERVAL)  # the others read it before their coordinator ends
        return verdict

    def _end_by(self, verdict: Verdict) -> None:
        if not self._stop.is_set():
            print(f"rlp: {self._names[self._process]} stops: {verdict.message}", file=sys.stderr)
            end(verdict.code)


def end(code: int) -> None:
    """Ends the process without waiting for others: a collective operation with a lost process never returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_abort(message: str) -> Callable:
    """Makes an abort end the process with this message and the exit code LOST.

    The loss of its coordinator makes JAX's client abort the process within milliseconds, from a thread of its own, so
    no other thread is in time to say what happened; a handler in Python would never run, and the callback that the
    client offers fails (std::bad_cast). abort() raises the signal in the thread that calls it, where the handler may
    do what it likes.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    text = f"rlp: {message}\n".encode()

    @kind
    def handler(signum):
        os.write(2, text)
        os._exit(LOST)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, kind), ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)
    KEPT.append(handler)
    return handler


KEPT: list[Callable] = []  # the C library holds no reference to its handlers
