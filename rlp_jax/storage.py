# SPDX-License-Identifier: Apache-2.0
"""Storage that fails: tried again for a while, then a stop that names the path and says what to do.

A full disk is emptied, a network drive comes back: a run of days should outlive both. What does not come back ends
the run, whose last checkpoint stays as it is.
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

WAITS_S = (1.0, 4.0, 16.0, 60.0)  # before the second attempt, the third, ...
EXIT_CODE = 74  # EX_IOERR

# What to do about an error of the operating system. Libraries hide its number and keep its text.
ADVICE = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit on a file's size",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "bring the directory back",
    errno.ENOTDIR: "bring the directory back",
}


class StorageError(RuntimeError):
    """Storage that kept failing: one line naming the path, the reason and what to do."""


def retried(
    action: Callable[[], T],
    path: Path,
    say: Callable[[str], None],
    errors: tuple[type[Exception], ...] = (OSError,),
) -> T:
    """What the action returns, tried again a few times where it raises one of these errors.

    Args:
      action: reads or writes the path; safe to repeat.
      path: for messages.
      say: told of every attempt that failed but the last.
      errors: those of the storage; others pass through.

    Raises:
      StorageError: the last attempt failed, too.
    """
    for wait_s in WAITS_S:
        try:
            return action()
        except errors as error:
            say(f"warning: {path}: {reason(error)}; trying again in {wait_s:g} s")
            time.sleep(wait_s)
    try:
        return action()
    except errors as error:
        raise StorageError(
            f"{path}: {reason(error)}, {len(WAITS_S) + 1} times: {advice(error)}, then the same command goes on from "
            "the last checkpoint"
        ) from error


def reason(error: Exception) -> str:
    """An error in a few words: the operating system's own, where it is behind it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = next((os.strerror(code) for code in ADVICE if os.strerror(code) in str(error)), None)
    return known or " ".join(str(error).split())[:200] or type(error).__name__


def advice(error: Exception) -> str:
    """What to do about it."""
    number, text = getattr(error, "errno", None), str(error)
    return next(
        (do for code, do in ADVICE.items() if code == number or os.strerror(code) in text), "repair the storage"
    )
