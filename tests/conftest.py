"""What tests in any folder share; its place also lets them import `reference.py`."""

import jax
import pytest


@pytest.fixture
def quick_compiles():
    """Programs without the costly optimisations: half the time of a test that compiles a lot and computes little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
