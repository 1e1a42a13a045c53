# SPDX-License-Identifier: Apache-2.0
"""The virtual environments of the peers: what goes into each, and whether one is there.

They lie below `--directory`, or where RLP_JAX_PEERS says, by default ~/.cache/rlp_jax_peers; `install_peers.py` makes
them. A failed installation leaves a note there, so that a benchmark's table can say why a peer is missing.
"""

import argparse
import os
import pathlib
from collections.abc import Iterable

ENVIRONMENTS = {  # pinned: a figure is a figure of these versions
    "torch": ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0"),
    "llama_cpp": ("llama-cpp-python==0.3.36",),
    "tunix": ("google-tunix==0.1.7",),
}
# GCC 12 takes most of an AMX tile configuration for dead stores, and llama.cpp's AMX kernels then end the process.
BUILD_FLAGS = {"llama_cpp": {"CXXFLAGS": "-fno-dse"}}


class Missing(RuntimeError):
    """A peer cannot run; the message says why."""


def root(directory: str | None) -> pathlib.Path:
    chosen = directory or os.environ.get("RLP_JAX_PEERS") or pathlib.Path.home() / ".cache" / "rlp_jax_peers"
    return pathlib.Path(chosen).expanduser().absolute()


def note(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Where a failed installation says why."""
    return directory / f"{name}.failed"


def interpreter(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The Python of a peer's environment.

    Raises:
      Missing: it was never installed, or could not be.
    """
    if (failed := note(directory, name)).exists():
        raise Missing(f"could not be installed: {failed.read_text().strip()}")
    python = directory / name / "bin" / "python"
    if not python.exists():
        raise Missing(f"not installed: python experiments/benchmarks/install_peers.py --peers {name}")
    return python


def chosen(parser: argparse.ArgumentParser, text: str, known: Iterable[str]) -> list[str]:
    """The peers that --peers names, none for "none"; ends the program where it names others."""
    names = [] if text == "none" else text.split(",")
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown peers {', '.join(unknown)}: choose from {', '.join(known)}, or none")
    return names
