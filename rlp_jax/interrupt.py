# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: finish the step in progress, save, say so."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable


class Interrupted(Exception):
    """The run was asked to stop and its checkpoint is saved. `exit_code` is 128 + the signal, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request, seen by `check`; the second one ends the process at once.

    Signals reach the main thread only: elsewhere this does nothing.
    """

    def __init__(self):
        self._signum: int | None = None
        self._raise_now = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error):
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    @property
    def requested(self) -> bool:
        return self._signum is not None

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    @contextlib.contextmanager
    def at_once(self, before: Callable[[], None]):
        """Inside, a signal ends the work at once, `before` is called and Interrupted raised: for long work that
        changes no state."""
        try:
            self._raise_now = True
            self.check()
            yield
        except Interrupted:
            self._raise_now = False
            before()
            raise
        finally:
            self._raise_now = False

    def between(self, batches: Iterable) -> Iterable:
        """The batches of work inside `at_once`: where the signals of several processes are agreed on."""
        return batches

    def _handle(self, signum, frame):
        if self._signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._signum = signum
        if self._raise_now:
            raise Interrupted(signum)
        print("\nstopping: the step in progress is finished and saved first (again: stop at once)", file=sys.stderr)
