# SPDX-License-Identifier: Apache-2.0
"""Programs on eight simulated devices, in a process of their own: jax fixes the number when it starts."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent
FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


def on_eight_devices(program: str, *arguments: str) -> str:
    """What the program prints; it may import what tests share."""
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, env=os.environ | path | FLAGS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    return done.stdout
