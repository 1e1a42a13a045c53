# SPDX-License-Identifier: Apache-2.0
"""How the time of our RLP step grows with thoughts a document, tokens a thought and documents a batch.

    python experiments/benchmarks/scaling.py [--quick] [--json] [--axes group,tokens,documents]

SmolLM2-135M-Instruct, float32, prefix 64, no thought ends early. From 2 documents x G = 4 thoughts of 32 tokens, one
size grows at a time, the learner in microbatches of at most 8 documents. Each point is a process of its own (its time
is the median of its steps after compilation, its memory the process's peak). `AXIS_exponent` is the least-squares slope
of log seconds over log size: 1 is proportional, less means that growth is cheaper than that.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile

import numpy as np
from peers.client import Peer
from step import make_job
from timing import finish

START = {"documents": 2, "group": 4, "prefix": 64, "tokens": 32}
SIZES = {"group": (2, 4, 8, 16, 32), "tokens": (32, 64, 128, 256, 512), "documents": (1, 2, 4, 8, 16, 32, 64)}
QUICK = {"group": (2, 8, 32), "tokens": (32, 128), "documents": (1, 4, 16)}


def measure(shape: dict, folder: pathlib.Path, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and the process's peak in MB."""
    job = make_job(shape, folder) | {"microbatches": max(1, shape["documents"] // 8)}
    with Peer(pathlib.Path(sys.executable), "step_ours.py", job) as process:
        process.go()
        answers = [process.go() for _ in range(steps)]
    return statistics.median(answer["seconds"] for answer in answers), answers[-1]["peak_bytes"] / 1e6


def exponent(sizes, seconds) -> float:
    """Least-squares slope in log-log."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two or three sizes an axis, one step each")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--axes", default=",".join(SIZES), help="which of " + ", ".join(SIZES))
    args = parser.parse_args()
    axes = args.axes.split(",")
    if unknown := sorted(set(axes) - set(SIZES)):
        parser.error(f"unknown axes {', '.join(unknown)}: choose from {', '.join(SIZES)}")
    steps = 1 if args.quick else 3
    result = {"start": START, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        for axis in axes:
            sizes = (QUICK if args.quick else SIZES)[axis]
            points = []
            for size in sizes:
                points.append(measure(START | {axis: size}, pathlib.Path(folder), steps))
                print(f"{axis} {size}: {points[-1][0]:.2f} s, {points[-1][1]:.0f} MB", flush=True)
            result[f"{axis}_sizes"] = list(sizes)
            result[f"{axis}_seconds"] = [round(seconds, 3) for seconds, _ in points]
            result[f"{axis}_peak_MB"] = [round(peak) for _, peak in points]
            result[f"{axis}_exponent"] = round(exponent(sizes, [seconds for seconds, _ in points]), 2)
    finish(result, args.json)


if __name__ == "__main__":
    main()
