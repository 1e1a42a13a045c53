# SPDX-License-Identifier: Apache-2.0
"""XProf traces of a few steps, for TensorBoard's profile tab."""

import contextlib
from pathlib import Path

import jax

from rlp_jax.config import ConfigError

DIRECTORY = "profile"


def parse_steps(text: str) -> range:
    """ "5" or "5:8" (steps 5 to 8) as a range.

    Raises:
      ConfigError: something else.
    """
    first, colon, last = text.partition(":")
    if not first.isdigit() or (colon and not last.isdigit()):
        raise ConfigError(f"--profile is {text!r}: write a step or first:last, for instance 5:8")
    steps = range(int(first), int(last if colon else first) + 1)
    if not steps or steps.start < 1:
        raise ConfigError(f"--profile is {text!r}: steps count from 1, and the last is not before the first")
    return steps


class Profiler:
    """Traces whole steps into a run directory. Use it with `with`, so that a trace is written whatever happens.

    Args:
      run_dir: exists already.
      steps: which ones; None for none.
    """

    def __init__(self, run_dir: Path, steps: range | None):
        self.directory, self._steps = Path(run_dir) / DIRECTORY, steps or range(0)
        self._tracing, self._marks = False, contextlib.ExitStack()

    def before(self, step: int) -> None:
        """A step begins."""
        if step in self._steps:
            if not self._tracing:
                jax.profiler.start_trace(str(self.directory))
                self._tracing = True
            self._marks.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def after(self, step: int) -> bool:
        """A step is computed. Returns whether a trace has just been written."""
        self._marks.close()
        return step == self._steps.stop - 1 and self._stop()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._marks.close()
        self._stop()

    def _stop(self) -> bool:
        was, self._tracing = self._tracing, False
        if was:
            jax.profiler.stop_trace()
        return was
