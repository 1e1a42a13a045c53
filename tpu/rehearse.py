# SPDX-License-Identifier: Apache-2.0
"""A pod run on this machine, before one is paid for: processes on CPU, each by worker.sh, one of them killed.

    python tpu/rehearse.py --processes 2

The run goes to its end in spite of that; its metrics are then compared with those of the same run left alone, in one
process. Prints one line a check and ends with 1 if one of them failed.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMINGS = ("seconds", "per_s", "goodput", "warnings", "logprob_gap")
DEVICES = 4  # in all
PATIENCE = 900  # seconds from the kill to the end, which takes one or two minutes
SMALL = (
    "batch_documents=8", "checkpoint.every=2", "rlp.group_size=4", "rlp.thought_tokens=6", "data.sources=compose:96",
    "eval.every=0", "eval.documents=8", "eval.batch_documents=8", "eval.positions=1", "eval.group_size=2",
    "mesh.data=2", "mesh.fsdp=2",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, choices=(2, 4))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--silent", type=float, default=10.0, help="seconds after which a process is taken for dead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        return rehearse(Path(directory), args.processes, args.steps, args.silent)


def rehearse(directory: Path, processes: int, steps: int, silent: float) -> int:
    whole, killed = directory / "whole", directory / "killed"
    print("one process, left alone")
    (alone,) = start(directory, whole, 1, steps, silent)
    good = check("it finished", alone.wait() == 0)

    print(f"{processes} processes, the last one killed after step 3")
    workers = start(directory, killed, processes, steps, silent)
    victim = wait_for_step(workers, killed, 3)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    codes = ended(workers)
    logs = [(directory / f"{killed.name}.{i}.log").read_text() for i in range(processes)]
    good &= check("a process was killed", victim is not None)
    good &= check("all finished in the end", codes == [0] * processes)
    # Missed for too long, or back before that: then JAX notices a second process of its number.
    missed = f"process {processes - 1} on {socket.gethostname()}: no sign of life"
    back = f"{processes - 1} unexpectedly tried to connect with a different incarnation"
    good &= check("process 0 named it", missed in logs[0] or back in logs[0])
    good &= check("all were started again", all("starting it again" in log for log in logs))
    good &= check("from a checkpoint", "resuming" in logs[0])
    good &= check("its metrics are those of the run left alone (relative 1e-4)", same(rows(killed), rows(whole)))
    if not good:
        for i, log in enumerate(logs):
            print(f"--- the end of process {i}'s log\n{log[-2000:]}")
    return 0 if good else 1


def start(directory: Path, run_dir: Path, processes: int, steps: int, silent: float) -> list[subprocess.Popen]:
    """worker.sh in so many processes with DEVICES simulated devices together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = [word for setting in SMALL for word in ("--set", setting)]
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(HERE.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
        "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "RLP_DISTRIBUTED": "",
        "RLP_SILENT_SECONDS": str(silent),
        "RLP_RESTART_DELAY": "1",
    }
    workers = []
    for i in range(processes):
        own = ["--processes", str(processes), "--process-id", str(i), "--coordinator", coordinator]
        command = [HERE / "worker.sh", "quickstart", "--run-dir", run_dir, "--steps", str(steps), *settings]
        with open(directory / f"{run_dir.name}.{i}.log", "w") as log:
            command += own if processes > 1 else []
            workers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return workers


def ended(workers: list[subprocess.Popen]) -> list[int | None]:
    """The exit codes; None for workers that wait for others to no end, which are stopped."""
    until = time.monotonic() + PATIENCE
    while any(worker.poll() is None for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
    codes = [worker.poll() for worker in workers]
    for worker, code in zip(workers, codes, strict=True):
        if code is None:
            worker.terminate()
            worker.wait()
    return codes


def wait_for_step(workers: list[subprocess.Popen], run_dir: Path, step: int) -> int | None:
    """The process of the last worker's `rlp train` once that step is logged; None if the workers end before."""
    while all(worker.poll() is None for worker in workers):
        if len(rows(run_dir)) >= step:
            children = Path(f"/proc/{workers[-1].pid}/task/{workers[-1].pid}/children").read_text().split()
            return int(children[0]) if children else None
        time.sleep(0.05)
    return None


def rows(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def same(ours: list[dict], theirs: list[dict]) -> bool:
    if len(ours) != len(theirs):
        return False
    pairs = [(key, a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in b]
    return all(
        abs(a - b) <= 1e-4 * abs(b) + 1e-6 for key, a, b in pairs if not any(timing in key for timing in TIMINGS)
    )


def check(what: str, holds: bool) -> bool:
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    return holds


if __name__ == "__main__":
    sys.exit(main())
