# SPDX-License-Identifier: Apache-2.0
"""Which machine a program is made for: the one it runs on, or, while it is compiled ahead of time, another.

Some implementations are chosen by platform. Whatever chooses asks here, so that a program compiled for a pod on a
machine without one is the program that the pod would run.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """The platform's name: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is traced inside is made for another platform."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)
