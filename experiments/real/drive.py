# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of `study.py`: `RLP_DATA=folder python -m experiments.real.drive [--only PATTERN] [--minutes M]`.

Each is one `rlp train`, then `rlp eval` task by task, and a result in RESULTS/NAME.json: of thoughts on held-out
documents (gain), of GSM8K, and of perplexity on the corpus that the run does not read. The same command goes on where
one stopped or was killed: training from its last checkpoint, evaluation from its records. A base is only evaluated. A
run that fails is reported, the others go on, and the exit code is 1 at the end.

    WORK/runs/NAME    run directories      WORK/logs/NAME.log    what the commands print
"""

import argparse
import fnmatch
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper.outcome import write
from experiments.real.study import ARMS, CORPORA, MODELS, RATES, Run, runs
from experiments.smollm2 import CORPORA as TEXTS
from rlp_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results" / "real"
WORK = ROOT / "runs" / "real"
STUDY = Path(__file__).with_name("study.py")
TASKS = ("gain", "gsm8k", "perplexity")
DOCUMENTS = 64  # held out, with a position each
PROBLEMS, PROBLEM_TOKENS, TOGETHER = 128, 128, 32  # of GSM8K, the cap on a response, and how many at a time
PIECES, POSITIONS = 32, 2  # of the text that perplexity is measured on
QUESTIONS = "eval/gsm8k_test.jsonl"  # below RLP_DATA


class Failed(RuntimeError):
    """A command did not end well: one line."""


def result_path(results: Path, run: Run) -> Path:
    return results / f"{run.name}.json"


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def keep(results: Path, run: Run, result: dict[str, Any]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    write(result_path(results, run), result)


def late_loss(rows: list[dict[str, Any]]) -> float:
    """Mean loss of the second half of a run's steps, nats a token: each is measured before the update, on documents
    that no step before has read."""
    rows = rows[len(rows) // 2 :]
    return sum(row["loss"] for row in rows) / len(rows)


def best_rate(run: Run, results: Path) -> float | None:
    """The rate of the best cpt_tokens run of a model and corpus, None while one is missing."""
    found = {}
    for rate in RATES:
        result = read(result_path(results, Run(run.model, run.corpus, "cpt_tokens", rate)))
        if result is None:
            return None
        found[rate] = result["late_loss"]
    return min(found, key=found.__getitem__)


def train_command(run: Run, run_dir: Path, rate: float | None) -> list[str]:
    command = ["train", str(STUDY), "--with", f"model={run.model}", "--with", f"corpus={run.corpus}"]
    if run.match:
        match_run = run_dir.with_name(run.rlp)
        command += ["--as", "cpt", "--match", run.match, "--match-run", str(match_run)]
        command += ["--set", f"optimizer.final_learning_rate={0.1 * rate}"]
        command += ["--set", "optimizer.weight_decay=0.1"]  # the paper's for continued pretraining
    if rate:
        command += ["--set", f"optimizer.learning_rate={rate}"]
    return [*command, "--run-dir", str(run_dir)]


def other(corpus: str) -> str:
    return next(name for name in CORPORA if name != corpus)


def eval_commands(run: Run, source: str, data: Path, out: Path) -> dict[str, list[str]]:
    """{task: command}, of the run's tasks."""
    shared = ["eval", source, "--json", "--out", str(out)]
    if run.arm == "base":  # a run has a template and held-out documents of its own
        shared += ["--experiment", str(STUDY.with_name(f"{run.corpus}.py"))]
    file, text, *_ = TEXTS[other(run.corpus)]
    options: dict[str, dict[str, Any]] = {
        "gain": {"limit": DOCUMENTS, "positions": 1},
        "gsm8k": {"data": data / QUESTIONS, "limit": PROBLEMS, "max-tokens": PROBLEM_TOKENS, "batch": TOGETHER},
        "perplexity": {"data": data / file, "text": text, "limit": PIECES, "positions": POSITIONS},
    }
    commands = {}
    for task in tasks(run):
        given = [part for name, value in options[task].items() for part in (f"--{name}", str(value))]
        commands[task] = [*shared, "--tasks", task, *given]
    return commands


def call(arguments: list[str], log: Path) -> str:
    """Runs `rlp` and returns the last line that it printed.

    Raises:
      Failed: it did not end with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ rlp {' '.join(arguments)}\n")
        file.flush()
        done = subprocess.run(
            [sys.executable, "-m", "rlp_jax", *arguments], stdout=subprocess.PIPE, stderr=file, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        file.write(done.stdout)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
        raise Failed(f"rlp {arguments[0]} ended with {done.returncode}: {last.strip()}")
    return lines[-1] if lines else ""


def tasks(run: Run) -> tuple[str, ...]:
    """What a run is evaluated on. RLP at a further rate is asked about held-out pieces alone."""
    return TASKS[:1] if run.arm == "rlp" and run.rate else TASKS


def complete(run: Run, result: dict[str, Any] | None) -> bool:
    """Whether every task has its figures."""
    return result is not None and all(task in result for task in tasks(run))


def held_out(records: Path) -> dict[str, list[float]]:
    """The policy's cross-entropy on each held-out document, nats a scored token, with and without a thought: what one
    run is compared with another by."""
    rows = [json.loads(line) for line in records.read_text().splitlines()][1:]  # the first line: settings
    return {
        "document": [row["document"] for row in rows],
        "think": [round(float(np.mean(row["ce_think"])), 5) for row in rows],
        "no_think": [round(float(np.mean(row["ce_no_think_policy"])), 5) for row in rows],
    }


def evaluate(run: Run, result: dict[str, Any], source: str, data: Path, work: Path, results: Path) -> None:
    """Evaluates on the tasks that the result does not have yet, and writes it after each.

    Raises:
      Failed: one of the commands did.
    """
    log, out = work / "logs" / f"{run.name}.log", work / "evals" / run.name
    if run.arm == "base":  # answers without a thought are the same whatever the text
        twin = read(result_path(results, run._replace(corpus=other(run.corpus)))) or {}
        if "gsm8k" in twin:
            result["gsm8k"] = twin["gsm8k"]
    for task, command in eval_commands(run, source, data, out).items():
        if task not in result:
            result[task] = json.loads(call(command, log))["tasks"][task]
            if task == "gain":
                result["held_out"] = held_out(out / "gain.jsonl")
            keep(results, run, result)


def make(run: Run, data: Path, work: Path, results: Path) -> str | None:
    """Makes one run, or goes on with it, and writes its result. Returns what to say, None where it still waits for
    another. Of the rates that are tried only the best is evaluated, see `evaluate_best`.

    Raises:
      Failed: one of its commands did.
    """
    run_dir, rate = work / "runs" / run.name, run.rate
    result = read(result_path(results, run)) or dict(zip(("name", *Run._fields[:3]), (run.name, *run[:3]), strict=True))
    if run.arm == "cpt_flops" and (rate := best_rate(run, results)) is None:
        return None
    if run.match and not (run_dir.with_name(run.rlp) / "summary.json").is_file():
        return None
    if run.arm != "base" and "steps" not in result:
        result |= train(run, run_dir, rate, work / "logs" / f"{run.name}.log")
        keep(results, run, result)
    if not run.swept:
        evaluate(run, result, MODELS[run.model] if run.arm == "base" else str(run_dir), data, work, results)
    return "made"


def train(run: Run, run_dir: Path, rate: float | None, log: Path) -> dict[str, Any]:
    """Trains one run and says what it took.

    Raises:
      Failed: the command did.
    """
    begun = time.monotonic()
    call(train_command(run, run_dir, rate), log)
    config = json.loads((run_dir / "config.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # The matched run by its name, where a path stood.
    rival = {"late_loss": late_loss(rows), "budget": config["budget"] | {"run": run.rlp}} if run.match else {}
    return rival | {
        "learning_rate": config["optimizer"]["learning_rate"],
        "steps": config["steps"],
        "seed": config["seed"],
        "input_tokens": sum(row["input_tokens"] for row in rows),
        "sampled_tokens": sum(row.get("sampled_tokens", 0) for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "wall_seconds": time.monotonic() - begun,
    }


def evaluate_best(run: Run, data: Path, work: Path, results: Path) -> bool:
    """Evaluates the best of the rates that were tried. Returns whether that was to be done now."""
    rate = best_rate(run, results)
    best = Run(run.model, run.corpus, "cpt_tokens", rate) if rate else None
    result = best and read(result_path(results, best))
    if not result or complete(best, result):
        return False
    evaluate(best, result, str(work / "runs" / best.name), data, work, results)
    return True


def drive(selected: list[Run], data: Path, work: Path, results: Path, deadline: float) -> int:
    """Makes what is missing, in order. Returns the exit code."""
    failed = []
    for run in selected:
        if time.monotonic() > deadline:
            break
        try:
            result = read(result_path(results, run))
            if result is None or (not run.swept and not complete(run, result)):
                say(f"{run.name}: {make(run, data, work, results) or 'waits for the runs it is matched to'}")
            if run.swept and evaluate_best(run, data, work, results):
                say(f"{run.name}: the best of its sweep was evaluated")
        except Failed as error:
            failed.append(run.name)
            say(f"{run.name}: failed: {error}")
    there = sum(result_path(results, run).is_file() for run in selected)
    say(f"{there} of {len(selected)} runs have results in {results}")
    return 1 if failed else 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help=f"runs whose name matches; arms: {ARMS}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    data = Path(os.environ.get("RLP_DATA", "data"))
    try:
        selected = [run for run in runs() if fnmatch.fnmatchcase(run.name, args.only)]
        if not selected:
            raise ConfigError(f"--only {args.only}: no run matches, they are {', '.join(run.name for run in runs())}")
        for file in (QUESTIONS, *(TEXTS[corpus][0] for corpus in CORPORA)):
            if not (data / file).is_file():
                raise ConfigError(f"no file {data / file}: RLP_DATA names the folder that has it")
        return drive(selected, data.resolve(), args.work.resolve(), args.results, time.monotonic() + 60 * args.minutes)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"drive: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
