# SPDX-License-Identifier: Apache-2.0
"""Installs the peers that the benchmarks compare against, each into a virtual environment of its own.

    python experiments/benchmarks/install_peers.py [--directory DIR] [--peers torch,llama_cpp,tunix]

`torch` (transformers and TRL) is several GB where pip brings the CUDA build, `tunix` about 1 GB; `llama_cpp` is built
from source for this machine's processor: cmake and a C++ compiler, about five minutes on two cores. The benchmarks look
into the same directory (also RLP_JAX_PEERS; by default ~/.cache/rlp_jax_peers). One that fails is noted and the rest
goes on. Run again, it retries what failed and leaves the rest alone.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

from peers.environments import BUILD_FLAGS, ENVIRONMENTS, note, root


def install(directory: pathlib.Path, name: str) -> str | None:
    """Makes one environment. Returns None, or the last line of what went wrong."""
    target, failed = directory / name, note(directory, name)
    if (target / "complete").exists():
        return None
    shutil.rmtree(target, ignore_errors=True)
    failed.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | BUILD_FLAGS.get(name, {})
    for command in (
        [sys.executable, "-m", "venv", target],
        [target / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", *ENVIRONMENTS[name]],
    ):
        print("+", *command, flush=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["no output"])[-1])
            failed.write_text(reason + "\n")
            return reason
    (target / "complete").touch()
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where the environments go")
    parser.add_argument("--peers", default=",".join(ENVIRONMENTS), help="comma-separated")
    args = parser.parse_args()
    names = args.peers.split(",")
    if unknown := sorted(set(names) - set(ENVIRONMENTS)):
        parser.error(f"unknown peers {', '.join(unknown)}: choose from {', '.join(ENVIRONMENTS)}")
    directory = root(args.directory)
    directory.mkdir(parents=True, exist_ok=True)
    reasons = {name: install(directory, name) for name in names}
    for name, reason in reasons.items():
        print(f"{name}: {f'failed: {reason}' if reason else directory / name}")
    sys.exit(any(reasons.values()))


if __name__ == "__main__":
    main()
