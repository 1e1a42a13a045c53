# SPDX-License-Identifier: Apache-2.0
"""What tests in any folder share; its place also lets them import `reference.py`."""

import gc
import os

import jax
import pytest
from eight_devices import COMPILER

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILER}".strip()  # read at jax's first use


def pytest_collection_modifyitems(items):
    """Files with slow tests first: begun last, one of them would keep a single process busy at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops a file's compiled programs after it. Each maps memory, and Linux gives a process 65,530 maps: the suite's
    programs together exceed them, and XLA then ends in a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def quick_compiles():
    """Programs without the costly optimisations: half the time of a test that compiles a lot and computes little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
