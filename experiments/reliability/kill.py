# SPDX-License-Identifier: Apache-2.0
"""Runs killed at random moments and started again until they end, against one that was never killed.

    python experiments/reliability/kill.py --kills 30 --seed 0 --json

Every kill is a SIGKILL to `rlp train` in a process of its own, which the same command then continues. Some kills come
at a moment drawn from the run's whole time, others in a phase: while thoughts are sampled, in the learner, in an
evaluation, while a checkpoint is written, when it has its manifest and is about to be renamed, when it has just got
its name and an old one is deleted. The kills and the moments in them follow from the seed.

Nothing in the run knows of it. In the processes to be killed this file wraps a few functions of the loop, so that each
tells its name in shared memory. How far a checkpoint has come is seen in its directory.

Afterwards every run must be as if never killed: each row of metrics.jsonl (timings apart), eval.jsonl, thoughts.jsonl
and summary.json, every parameter, its average, the optimizer's state and the place in the data, bit by bit; and each
start must have gone on from the newest checkpoint. The last line is a JSON object; exit code 1 if anything differs.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import mmap
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rlp_jax import cli, manifest, rows
from rlp_jax.checkpoint import DIRECTORY, Checkpoints, steps
from rlp_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, OptimizerConfig, ReportConfig, RLPConfig
from rlp_jax.settings import load_experiment

train = import_module("rlp_jax.train")  # `rlp_jax.train` of the package is the function
STEPS = 10
KILLS_A_RUN = 10  # then a run is left to end, and another one begins
TIMINGS = ("seconds", "per_s", "goodput")
TARGETS = ("rollout", "writing", "learner", "renaming", "time", "evaluation", "deleting", "time")
PHASES = (
    "starting", "preparing", "restoring", "evaluation", "rollout", "learner", "logging", "saving", "reporting",
)  # fmt: skip
TMP = ".orbax-checkpoint-tmp"
POLL_S = 0.0005
OBSERVED = "--observed"  # how this file starts itself as the process to be killed
LONGEST_S = 600  # of one process


def config() -> Config:
    """The quickstart in the small, with a checkpoint after every step: `rlp train` is given this very file."""
    return dataclasses.replace(
        load_experiment("quickstart"),
        name="reliability",
        steps=STEPS,
        batch_documents=8,
        rlp=RLPConfig(group_size=4, position_mode="span", thought_tokens=12),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(sources=("compose:128",), document_tokens=32, heldout_fraction=0.125),
        eval=EvalConfig(every=4, documents=8, group_size=4, batch_documents=4),
        report=ReportConfig(documents=0),
        checkpoint=CheckpointConfig(every=1, keep=2, keep_every=5),
    )


class Kill(NamedTuple):
    """target: one of TARGETS. visit: at which visit to that phase. moment: where in it or in the whole time, 0 to 1."""

    target: str
    visit: int
    moment: float


class Times(NamedTuple):
    """Seconds of the run that nobody kills: the whole process, and of a step its two halves."""

    whole: float
    rollout: float
    learner: float


def plan(kills: int, seed: int) -> list[Kill]:
    draw = random.Random(seed)
    return [Kill(TARGETS[i % len(TARGETS)], draw.randint(1, 3), draw.random()) for i in range(kills)]


def run_observed(phase_file: Path, argv: list[str]) -> int:
    """The command line, telling in the file's one byte which phase it is in."""
    shared = mmap.mmap(os.open(phase_file, os.O_RDWR), 1)

    def during(phase, function):
        def observed(*args, **kwargs):
            before, shared[0] = shared[0], PHASES.index(phase)
            try:
                return function(*args, **kwargs)
            finally:
                shared[0] = before

        return observed

    def lap(clock, phase, arrays=None):
        """A phase of a step ends: which one begins."""
        ended(clock, phase, arrays)
        shared[0] = PHASES.index({"data": "rollout", "sample": "learner", "learn": "logging"}[phase])

    ended, rows.Clock.lap = rows.Clock.lap, lap
    train.prepare = during("preparing", train.prepare)
    train.start_or_resume = during("restoring", train.start_or_resume)
    train.evaluate = during("evaluation", train.evaluate)
    train.write_report = during("reporting", train.write_report)
    Checkpoints.save = during("saving", Checkpoints.save)
    return cli.main(argv)


class Child:
    """`rlp train` on this file in a process of its own."""

    def __init__(self, run_dir: Path, cache: Path):
        phase_file, self.output = run_dir.with_suffix(".phase"), run_dir.with_suffix(".log")
        phase_file.write_bytes(b"\0")
        with open(phase_file, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 1)
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of the compiler: they are most of a short run's time
            "PYTHONPATH": os.pathsep.join([str(Path(manifest.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
        }
        this = str(Path(__file__).resolve())
        command = [sys.executable, this, OBSERVED, str(phase_file), "train", this, "--run-dir", str(run_dir)]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        self.began = time.monotonic()

    @property
    def running(self) -> bool:
        if time.monotonic() - self.began > LONGEST_S:
            self.process.kill()
            raise RuntimeError(f"{self.output}: not ended after {LONGEST_S} s")
        return self.process.poll() is None

    @property
    def phase(self) -> str:
        """What the main thread is doing now."""
        return PHASES[self._shared[0]]


def wait_for(child: Child, kill: Kill, run_dir: Path, times: Times) -> bool:
    """Returns when the moment of the kill has come; False where the process ended first."""
    directory, visits, inside, before = run_dir / DIRECTORY, 0, False, steps(run_dir / DIRECTORY)
    if kill.target == "time":
        while child.running and time.monotonic() - child.began < kill.moment * times.whole:
            time.sleep(POLL_S)
        return child.running
    while child.running:
        if kill.target in ("writing", "renaming", "deleting"):
            names = [path.name for path in directory.glob("*")] if directory.is_dir() else []
            writing = [name for name in names if TMP in name]
            sealed = any((directory / name / manifest.FILE).exists() for name in writing)
            renamed = any(name.isdigit() and int(name) not in before for name in names)
            now = {"writing": bool(writing) and not sealed, "renaming": sealed, "deleting": renamed}[kill.target]
            if now and kill.target == "deleting":
                before = steps(directory)
                inside = False
        else:
            now = child.phase == kill.target
        time.sleep(POLL_S)
        visits += now and not inside
        inside = now
        if now and visits >= (1 if kill.target == "evaluation" else kill.visit):
            longest = {"rollout": times.rollout, "learner": times.learner, "renaming": 0.0}
            time.sleep(kill.moment * longest.get(kill.target, 0.02))
            return child.running
    return False


def run_once(run_dir: Path, cache: Path, kill: Kill | None, times: Times | None) -> dict[str, Any]:
    """One start of the run, and what became of it."""
    directory = run_dir / DIRECTORY
    expected = next((step for step in steps(directory) if manifest.fault(directory / str(step)) is None), 0)
    child = Child(run_dir, cache)
    killed = kill is not None and wait_for(child, kill, run_dir, times)
    phase = child.phase if killed else "ended"
    if killed:
        child.process.kill()
    code = child.process.wait(LONGEST_S)
    seconds = time.monotonic() - child.began
    output = child.output.read_text(errors="replace")
    said = re.search(r"resuming .* after step (\d+)", output)
    record = {"code": code, "phase": phase, "seconds": round(seconds, 3), "resumed": expected if said else None}
    if said and int(said[1]) != expected:
        record["wrong"] = f"went on after step {said[1]}, the newest checkpoint is that of step {expected}"
    if code not in (0, -signal.SIGKILL):
        record["wrong"] = f"exit code {code}: {output[-500:]}"
    if "damaged" in output:
        record["wrong"] = f"a kill damaged a checkpoint: {output[-500:]}"
    return record | (kill._asdict() | {"checkpoint": checkpoint_state(run_dir)} if code == -signal.SIGKILL else {})


def checkpoint_state(run_dir: Path) -> str:
    """What the kill left of the checkpoint in progress."""
    directory = run_dir / DIRECTORY
    unfinished = [path for path in directory.glob("*") if TMP in path.name]
    if unfinished:
        return (
            "complete, not renamed" if any((path / manifest.FILE).exists() for path in unfinished) else "half written"
        )
    if any(manifest.fault(directory / str(step)) for step in steps(directory)):
        return "an old one half deleted"
    return "none in progress"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def differences(run_dir: Path, reference: Path) -> list[str]:
    """What tells a run from the one never killed."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    def untimed(directory):
        return [
            {name: value for name, value in row.items() if not any(timing in name for timing in TIMINGS)}
            for row in read(directory / "metrics.jsonl")
        ]

    def arrays(directory):
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore((directory / DIRECTORY / str(STEPS) / "state").resolve())
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(stored)}

    def position(directory):
        value = json.loads((directory / DIRECTORY / str(STEPS) / "position" / "metadata").read_text())
        value["progress"].pop("productive")
        value["logs"].pop("metrics.jsonl")
        return value

    found = []
    if untimed(run_dir) != untimed(reference):
        found.append("metrics.jsonl")
    found += [
        name
        for name in ("eval.jsonl", "thoughts.jsonl", "summary.json", "config.json")
        if (run_dir / name).read_bytes() != (reference / name).read_bytes()
    ]
    ours, theirs = arrays(run_dir), arrays(reference)
    if ours.keys() != theirs.keys():
        found.append("the tree of the state")
    else:
        found += [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    if position(run_dir) != position(reference):
        found.append("the place in data and logs")
    if names(run_dir / DIRECTORY) != names(reference / DIRECTORY):
        found.append(f"checkpoints: {names(run_dir / DIRECTORY)}")
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def chain(directory: Path, cache: Path, kills: list[Kill], times: Times, say) -> tuple[list[dict], list[Path]]:
    """Runs below the directory, one after the other, until all kills are done and the last run has ended."""
    records, run_dirs, left = [], [], list(kills)
    while left:
        run_dir = directory / str(len(run_dirs))
        run_dirs.append(run_dir)
        done, ended = 0, False
        while not ended:
            record = run_once(run_dir, cache, left[0] if left and done < KILLS_A_RUN else None, times)
            records.append(record)
            ended = record["code"] != -signal.SIGKILL
            if not ended:
                left.pop(0)
                done += 1
            say(f"{run_dir.relative_to(directory.parent)}: {json.dumps(record)}")
    return records, run_dirs


def measure(directory: Path, cache: Path) -> tuple[Path, Times]:
    """The run never killed, and how long one takes once everything is compiled."""
    for name in ("reference", "warm"):
        run_dir = directory / name
        record = run_once(run_dir, cache, None, None)
        if record["code"]:
            raise SystemExit(f"the run that nobody kills failed: {record['wrong']}")
    metrics = read(run_dir / "metrics.jsonl")[1:]
    halves = (statistics.median(row[f"seconds_{half}"] for row in metrics) for half in ("sample", "learn"))
    return directory / "reference", Times(whole_seconds(run_dir), *halves)


def whole_seconds(run_dir: Path) -> float:
    """From the run's first file to its last."""
    return (run_dir / "report.html").stat().st_mtime - float((run_dir / "started").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    parser.add_argument("--record", type=Path, help="a directory for kills.jsonl, a line a start, and summary.json")
    args = parser.parse_args()

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    began, kills = time.monotonic(), plan(args.kills, args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        directory, cache = Path(scratch), Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(scratch) / "cache")
        reference, times = measure(directory, cache)
        say(f"never killed: {times.whole:.1f} s, rollout {times.rollout:.3f} s, learner {times.learner:.3f} s")
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            shares = [kills[i :: args.jobs] for i in range(args.jobs)]
            homes = [directory / f"chain{i}" for i in range(args.jobs)]
            for home in homes:
                home.mkdir()
            done = list(pool.map(lambda home, share: chain(home, cache, share, times, say), homes, shares))
        records = [record for chained, _ in done for record in chained]
        run_dirs = [run_dir for _, chained in done for run_dir in chained]
        wrong = [record["wrong"] for record in records if "wrong" in record]
        if not wrong:
            wrong = [f"{run_dir.name}: {what}" for run_dir in run_dirs for what in differences(run_dir, reference)]
    killed = [record for record in records if record["code"] == -signal.SIGKILL]
    summary = {
        "kills": len(killed),
        "seed": args.seed,
        "bitwise_equal": not wrong and len(killed) == args.kills,
        "runs": len(run_dirs),
        "steps": STEPS,
        "resumed_steps": count(str(record["resumed"]) for record in records if record["resumed"] is not None),
        "kills_by_phase": count(record["phase"] for record in killed),
        "kills_by_checkpoint": count(record["checkpoint"] for record in killed),
        "seconds": round(time.monotonic() - began, 1),
    } | ({"wrong": wrong[:10]} if wrong else {})
    if args.record:
        args.record.mkdir(parents=True, exist_ok=True)
        (args.record / "kills.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (args.record / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))
    return 0 if summary["bitwise_equal"] else 1


def count(names) -> dict[str, int]:
    return dict(sorted(collections.Counter(names).items()))


if __name__ == "__main__":
    observed = sys.argv[1:2] == [OBSERVED]
    sys.exit(run_observed(Path(sys.argv[2]), sys.argv[3:]) if observed else main())
