#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Wheel and source distribution, built and used as a stranger would: each in an environment of its own that holds the
declared dependencies and nothing else, outside the checkout.

    python .ci/package.py

Needs the extra dev. Ends with exit code 1 at the first thing that fails. constraints.txt names the versions.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_WHEEL = (
    *("rlp_jax/py.typed", "rlp_jax/assets/quickstart/model.safetensors", "rlp_jax/assets/quickstart/tokenizer.json"),
    *("rlp_jax/experiments/quickstart.py", "rlp_jax/experiments/pod/qwen3_1_7b.py"),
)
IN_SOURCES = ("tests/conftest.py", "tests/goldens/dense.npz", "experiments/results", "constraints.txt", ".ci/run")
NOT_IN_WHEEL = ("rlp_jax/experiments/results/", "tests/", "experiments/", ".ci/")
USE = """
import pathlib, rlp_jax, rlp_jax.experiments.quickstart as quickstart
from rlp_jax.settings import PACKAGE, load_experiment
assert "site-packages" in rlp_jax.__file__, rlp_jax.__file__
assert load_experiment("quickstart") == quickstart.config()
assert list((PACKAGE / "report").rglob("*.html"))
assert rlp_jax.load("quickstart").tokenizer.vocab_size
"""


def run(*command: str | Path, cwd: Path) -> str:
    hidden = {"PYTHONPATH", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def check_contents(wheel: Path, sources: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in IN_WHEEL if name not in names]
    surplus = [name for name in names if name.startswith(NOT_IN_WHEEL) or "__pycache__" in name]
    with tarfile.open(sources) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    missing += [name for name in IN_SOURCES if not any(path.startswith(name) for path in inside)]
    if missing or surplus:
        sys.exit(f"missing: {missing}; should not be there: {surplus}")
    print(f"{wheel.name}: {len(names)} files; {sources.name}: {len(inside)}")


def check_install(archive: Path, scratch: Path, train: bool) -> None:
    bin_ = scratch / f"venv-{archive.suffix[1:]}" / "bin"
    uv = Path(sys.executable).with_name("uv")
    run(uv, "venv", "--quiet", "--python", sys.executable, bin_.parent, cwd=scratch)
    into = ("--quiet", "--python", bin_ / "python", "--constraint", ROOT / "constraints.txt")
    run(uv, "pip", "install", *into, archive, cwd=scratch)
    run(uv, "pip", "check", "--quiet", "--python", bin_ / "python", cwd=scratch)
    run(bin_ / "rlp", "--help", cwd=scratch)
    print(run(bin_ / "rlp", "--version", cwd=scratch))
    run(bin_ / "python", "-c", USE, cwd=scratch)
    if train:
        run(bin_ / "rlp", "train", "quickstart", "--steps", "2", "--set", "eval.documents=32", cwd=scratch)
        if not (scratch / "runs" / "quickstart" / "report.html").stat().st_size:
            sys.exit("quickstart wrote no report.html")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory(prefix="rlp-package-") as name:
        scratch = Path(name)
        run(sys.executable, "-m", "build", "--outdir", scratch, ROOT, cwd=scratch)
        (wheel,), (sources,) = scratch.glob("*.whl"), scratch.glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sources, cwd=scratch)
        check_contents(wheel, sources)
        check_install(wheel, scratch, train=True)
        check_install(sources, scratch, train=False)
    print("wheel and source distribution install and work")


if __name__ == "__main__":
    main()
