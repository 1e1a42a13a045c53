"""Which machine a program is made for: the one it runs on, or, while it is compiled ahead of time, another.

Some implementations are chosen by platform and number of devices. Whatever chooses asks here, so that a program
compiled for a pod on a machine without one is the program that the pod would run.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Target(NamedTuple):
    platform: str
    devices: int


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """ "cpu", "gpu" or "tpu"."""
    target = _target.get()
    return jax.default_backend() if target is None else target.platform


def device_count() -> int:
    """How many devices the program is spread over at most."""
    target = _target.get()
    return jax.device_count() if target is None else target.devices


@contextlib.contextmanager
def compiling_for(platform: str, devices: int) -> Iterator[None]:
    """What is traced inside is made for `devices` devices of another platform."""
    token = _target.set(Target(platform, devices))
    try:
        yield
    finally:
        _target.reset(token)
