# SPDX-License-Identifier: Apache-2.0
"""How jax is started in tests: what it compiles with, and programs on several simulated devices."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jaxlib.version

TESTS = Path(__file__).parent
# Compiling takes most of the suite's time, and three times as long by fusion emitters as by those before them. Versions
# that have the flag no longer would end at it.
COMPILER = "--xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else ""


def simulated(devices: int = 8) -> dict[str, str]:
    """Environment variables under which a process has that many devices: jax fixes the number when it starts."""
    flags = f"{COMPILER} --xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}


def on_eight_devices(program: str, *arguments: str) -> str:
    """What the program prints, in a process of its own; it may import what tests share."""
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, env=os.environ | path | simulated(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    return done.stdout
