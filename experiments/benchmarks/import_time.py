# SPDX-License-Identifier: Apache-2.0
"""Seconds that `import rlp_jax`, `rlp --help` and the parts behind them take in a fresh process.

    python experiments/benchmarks/import_time.py --repeats 5 --json

The median of several processes, the interpreter's own start included and also given alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "python alone": "pass",
    "import rlp_jax": "import rlp_jax",
    "rlp --help": "from rlp_jax.cli import parser; parser().format_help()",
    "from rlp_jax import objective": "from rlp_jax import objective",
    "rlp_jax.load": "import rlp_jax; rlp_jax.load",
}


def seconds(program: str, repeats: int) -> float:
    """The median over fresh processes, after one that fills the disk cache."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes a program")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    found = {name: round(seconds(program, args.repeats), 3) for name, program in PROGRAMS.items()}
    for name, value in found.items():
        print(f"{name:32} {value:6.3f} s")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
