# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of `study.py`: `RLP_DATA=folder python -m experiments.real.drive [--only PATTERN] [--minutes M]`.

Each is one `rlp train`, then one `rlp eval` of GSM8K and of perplexity, and a result in RESULTS/NAME.json. The same
command goes on where one stopped or was killed: training from its last checkpoint, evaluation from its records. A base
is only evaluated. A run that fails is reported, the others go on, and the exit code is 1 at the end.

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

from experiments.paper.outcome import write
from experiments.real.study import ARMS, MODELS, RATES, Run, runs
from rlp_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results" / "real"
WORK = ROOT / "runs" / "real"
STUDY = Path(__file__).with_name("study.py")
PROBLEMS, PROBLEM_TOKENS, TOGETHER = 128, 128, 32  # of GSM8K, the cap on a response, and how many at a time
PIECES, POSITIONS = 32, 2  # of the text that perplexity is measured on
GENERAL = "text/wikitext2_valid.jsonl"  # below RLP_DATA
QUESTIONS = "eval/gsm8k_test.jsonl"


class Failed(RuntimeError):
    """A command did not end well: one line."""


def result_path(results: Path, run: Run) -> Path:
    return results / f"{run.name}.json"


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def plain_loss(result: dict[str, Any]) -> float:
    """What continued pretraining is chosen by: its cross-entropy without a thought on held-out documents, nats."""
    return result["training"]["after"]["ce_no_think_policy"]


def best_rate(run: Run, results: Path) -> float | None:
    """The rate of the best cpt_tokens run of a model and corpus, None while one is missing."""
    found = {}
    for rate in RATES:
        result = read(result_path(results, Run(run.model, run.corpus, "cpt_tokens", rate)))
        if result is None:
            return None
        found[rate] = plain_loss(result)
    return min(found, key=found.__getitem__)


def train_command(run: Run, run_dir: Path, rate: float | None) -> list[str]:
    command = ["train", str(STUDY), "--with", f"model={run.model}", "--with", f"corpus={run.corpus}"]
    if run.match:
        match_run = run_dir.with_name(run.rlp)
        command += ["--as", "cpt", "--match", run.match, "--match-run", str(match_run)]
        command += ["--set", f"optimizer.learning_rate={rate}", "--set", f"optimizer.final_learning_rate={0.1 * rate}"]
        command += ["--set", "optimizer.weight_decay=0.1"]  # the paper's for continued pretraining
    return [*command, "--run-dir", str(run_dir)]


def eval_commands(run: Run, source: str, data: Path, out: Path) -> dict[str, list[str]]:
    """{task: command}."""
    shared, answers = ["eval", source, "--json"], out
    if run.arm == "base":  # a run has a template of its own; answers without a thought are the same with any
        shared += ["--experiment", str(STUDY.with_name(f"{run.corpus}.py"))]
        answers = out.with_name(f"{run.model}--{run.arm}")
    gsm8k = [*shared, "--tasks", "gsm8k", "--data", str(data / QUESTIONS), "--limit", str(PROBLEMS)]
    gsm8k += ["--max-tokens", str(PROBLEM_TOKENS), "--batch", str(TOGETHER), "--out", str(answers)]
    perplexity = [*shared, "--tasks", "perplexity", "--data", str(data / GENERAL), "--limit", str(PIECES)]
    perplexity += ["--thought-tokens", "48", "--positions", str(POSITIONS), "--text", "{text}", "--out", str(out)]
    return {"gsm8k": gsm8k, "perplexity": perplexity}


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


def evaluate(run: Run, source: str, data: Path, work: Path) -> dict[str, Any]:
    """{task: its result}."""
    log, out = work / "logs" / f"{run.name}.log", work / "evals" / run.name
    commands = eval_commands(run, source, data, out)
    return {task: json.loads(call(command, log))["tasks"][task] for task, command in commands.items()}


def make(run: Run, data: Path, work: Path, results: Path) -> str | None:
    """Makes one run and writes its result. Returns what to say, None where it still waits for another.

    Raises:
      Failed: one of its commands did.
    """
    run_dir, log, rate = work / "runs" / run.name, work / "logs" / f"{run.name}.log", run.rate
    result: dict[str, Any] = {"name": run.name, "model": run.model, "corpus": run.corpus, "arm": run.arm}
    if run.arm == "cpt_flops" and (rate := best_rate(run, results)) is None:
        return None
    if run.match and not (run_dir.with_name(run.rlp) / "summary.json").is_file():
        return None
    source = MODELS[run.model]
    if run.arm != "base":
        begun = time.monotonic()
        call(train_command(run, run_dir, rate), log)
        config = json.loads((run_dir / "config.json").read_text())
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        source = str(run_dir)
        result |= {
            "training": json.loads((run_dir / "summary.json").read_text()),
            "learning_rate": config["optimizer"]["learning_rate"],
            "steps": config["steps"],
            "seed": config["seed"],
            "budget": config["budget"],
            "input_tokens": sum(row["input_tokens"] for row in rows),
            "sampled_tokens": sum(row.get("sampled_tokens", 0) for row in rows),
            "seconds": sum(row["seconds"] for row in rows),
            "wall_seconds": time.monotonic() - begun,
        }
    if run.rate is None:  # of the rates that were tried, only the best is evaluated, see `evaluate_best`
        result |= evaluate(run, source, data, work)
    results.mkdir(parents=True, exist_ok=True)
    write(result_path(results, run), result)
    return "made"


def evaluate_best(run: Run, data: Path, work: Path, results: Path) -> bool:
    """Evaluates the best of the rates that were tried. Returns whether that was to be done now."""
    rate = best_rate(run, results)
    best = Run(run.model, run.corpus, "cpt_tokens", rate) if rate else None
    result = best and read(result_path(results, best))
    if not result or "gsm8k" in result:
        return False
    result |= evaluate(best, str(work / "runs" / best.name), data, work)
    write(result_path(results, best), result)
    return True


def drive(selected: list[Run], data: Path, work: Path, results: Path, deadline: float) -> int:
    """Makes what is missing, in order. Returns the exit code."""
    failed = []
    for run in selected:
        if time.monotonic() > deadline:
            break
        try:
            if not result_path(results, run).is_file():
                say(f"{run.name}: {make(run, data, work, results) or 'waits for the runs it is matched to'}")
            if run.arm == "cpt_tokens" and evaluate_best(run, data, work, results):
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
        for file in (QUESTIONS, GENERAL):
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
