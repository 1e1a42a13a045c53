#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A short core of the tests with the lowest and the newest dependencies, on every supported Python that is here.

    python .ci/versions.py                          # all of them, 3.11 to 3.13
    python .ci/versions.py --python 3.12 --set lowest
    python .ci/versions.py --lock                   # resolve the lowest versions again, into constraints-lowest.txt

"lowest" are the lower bounds of pyproject.toml with what else they need (constraints-lowest.txt), "newest" is whatever
resolves today. The wheel is installed, not the checkout. Needs `uv` (extra dev) and network; it ends with a table and
exit code 1 if anything failed. A Python that is not here is skipped and said so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST = ROOT / "constraints-lowest.txt"
PYTHONS = ("3.11", "3.12", "3.13")
SETS = ("lowest", "newest")
# One test a promise: the equations, the sampler against its naive loop, state and data position on disk, a run that
# goes on from its checkpoint, the command line, Hugging Face files out and in again.
CORE = (
    "tests/test_objective.py::test_information_gain_by_hand",
    "tests/test_objective.py::test_group_relative_advantage_by_hand",
    "tests/test_objective.py::test_clipped_surrogate_by_hand",
    "tests/test_objective_properties.py::test_gradient_at_ratio_one_is_reinforce_with_length_normalisation",
    "tests/rollout/test_sampling.py::test_keys_belong_to_document_position_and_thought",
    "tests/rollout/test_engine.py::test_the_loop_is_the_naive_loop[llama]",
    "tests/test_checkpoint.py::test_round_trip_is_bitwise_and_keeps_the_newest",
    "tests/test_train.py::test_what_a_run_writes",
    "tests/test_train.py::test_a_finished_run_with_a_constant_rate_can_be_extended",
    "tests/test_cli.py::test_bad_experiments",
    "tests/test_cli.py::test_module_and_version",
    "tests/checkpoints_io/test_huggingface.py::test_round_trip_is_bitwise",
)
QUICKSTART = ("train", "quickstart", "--steps", "2", "--set", "eval.documents=32", "--run-dir")
HEADER = f"""\
# The lowest versions that pyproject.toml allows, and what else they need. Written by .ci/versions.py --lock:
#     pip install -c {LOWEST.name} -e '.[test]'
"""


def interpreter(version: str) -> Path | None:
    """The path of a CPython of this version: on PATH, else one that pyenv has installed."""
    found = shutil.which(f"python{version}")
    if found and _answers(found, version):  # pyenv puts a stand-in on PATH that fails where the version is not chosen
        return Path(found)
    if pyenv := shutil.which("pyenv"):
        latest = _output(pyenv, "latest", version)
        prefix = _output(pyenv, "prefix", latest) if latest else ""
        if prefix and _answers(python := f"{prefix}/bin/python", version):
            return Path(python)
    return None


def _answers(python: str, version: str) -> bool:
    return _output(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])") == version


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def lock() -> None:
    """Writes constraints-lowest.txt: one line a package, with a marker where Pythons differ."""
    pins: dict[str, dict[str, str]] = {}
    for version in PYTHONS:
        command = [_uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--resolution", "lowest-direct"]
        command += ["--only-binary", ":all:", "--no-binary", "promise"]  # wheels; promise, pure Python, has none
        command += ["--python-version", version, "--extra", "test", str(ROOT / "pyproject.toml")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if "==" in line and not line.startswith("#"):
                name, _, pinned = line.partition("==")
                pins.setdefault(name.strip(), {})[version] = pinned.strip()
    lines = [line for name, by_python in sorted(pins.items()) for line in _marked(name, by_python)]
    LOWEST.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    print(f"{LOWEST.name}: {len(pins)} packages")


def _marked(name: str, by_python: dict[str, str]) -> Iterator[str]:
    versions = set(by_python.values())
    if len(versions) == 1 and set(by_python) == set(PYTHONS):
        yield f"{name}=={versions.pop()}"
        return
    for python, pinned in by_python.items():
        yield f'{name}=={pinned}; python_version == "{python}"'


def check(python: Path, which: str, wheel: Path, scratch: Path) -> str:
    """Installs the wheel into a fresh environment and tests it there. Returns what failed, "" if nothing."""
    venv = scratch / f"{python.name}-{which}"
    bin_ = venv / "bin"
    constraint = ["--constraint", str(LOWEST)] if which == "lowest" else ["--upgrade"]
    into = ["--python", str(bin_ / "python")]
    commands = {
        "environment": [_uv(), "venv", "--quiet", "--python", str(python), str(venv)],
        "install": [_uv(), "pip", "install", "--quiet", *into, *constraint, f"{wheel}[test]"],
        "versions": [str(bin_ / "python"), "-c", VERSIONS],
        "tests": [str(bin_ / "pytest"), "-p", "no:cacheprovider", "-n0", *CORE],
        "quickstart": [str(bin_ / "rlp"), *QUICKSTART, str(scratch / f"run-{venv.name}")],
    }
    for name, command in commands.items():
        # The wheel alone: neither the checkout nor what a caller pinned may answer for it.
        hidden = ("PYTHONPATH", "PIP_CONSTRAINT", "UV_CONSTRAINT", "VIRTUAL_ENV")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PATH": f"{bin_}:{os.environ['PATH']}",
        }
        cwd = ROOT if name == "tests" else scratch
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=name != "versions", text=True)
        if done.returncode:
            print(f"{' '.join(command)}\n{(done.stdout or '')[-6000:]}{(done.stderr or '')[-6000:]}", file=sys.stderr)
            return name
    shutil.rmtree(venv)
    return ""


VERSIONS = """
import sys
from importlib.metadata import version
names = "jax flax numpy optax orbax-checkpoint grain tokenizers".split()
print("  python", sys.version.split()[0], *(f"{name} {version(name)}" for name in names), flush=True)
"""


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        sys.exit("versions.py needs uv: pip install -e '.[dev]'")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lock", action="store_true", help="write constraints-lowest.txt and stop")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this one; may be repeated")
    parser.add_argument("--set", action="append", choices=SETS, help="only these dependencies; may be repeated")
    args = parser.parse_args()
    if args.lock:
        lock()
        return 0
    rows, failed = [], False
    with tempfile.TemporaryDirectory(prefix="rlp-versions-") as name:
        scratch = Path(name)
        subprocess.run([_uv(), "build", "--quiet", "--wheel", "--out-dir", name, str(ROOT)], check=True)
        (wheel,) = scratch.glob("*.whl")
        for version in args.python or PYTHONS:
            python = interpreter(version)
            for which in args.set or SETS:
                if python is None:
                    rows.append(f"python {version} {which:7} skipped: no python{version} on PATH or in pyenv")
                    continue
                print(f"python {version}, {which} dependencies", flush=True)
                began = time.monotonic()
                broken = check(python, which, wheel, scratch)
                failed |= bool(broken)
                outcome = f"FAILED at {broken}" if broken else "passed"
                rows.append(f"python {version} {which:7} {outcome} ({time.monotonic() - began:.0f} s)")
    print("\n".join(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
