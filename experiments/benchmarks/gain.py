# SPDX-License-Identifier: Apache-2.0
"""Time to the same held-out information gain: our training against general GRPO trainers, same model, documents,
positions and evaluation.

    python experiments/benchmarks/gain.py [--quick] [--json] [--peers trl,tunix] [--steps 40] [--target 1.5]
        [--learning-rates 3e-5,1e-4,3e-4] [--directory DIR]

The quickstart's model, text and settings: 16 documents x 2 positions x 16 thoughts of at most 16 tokens a step,
float32, AdamW. Peers get the information gain as their reward function (peers/gain_trl.py, gain_tunix.py) and keep
their own way of weighing advantages; clip bounds, no KL term and one update a batch are the same for all. Each side is
a process of its own; they take turns of 5 steps and write their weights after each. Our evaluator then reads all of
them, with the same held-out documents, positions and keys.

`SIDE_seconds` is when the gain, interpolated between evaluations, first reaches `--target` (nats a token) at the side's
best learning rate, compilation included; null where it never does. `SIDE_step_seconds` is the median step after the
first turn. `vs_NAME` is the peer's seconds over ours.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile

import jax
import numpy as np
from peers.client import Peer
from peers.environments import Missing, chosen, interpreter, root
from timing import finish

import rlp_jax
from experiments.quickstart import config as quickstart
from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.config import Config, OptimizerConfig
from rlp_jax.data.pipeline import heldout_batches, load_documents, train_batches
from rlp_jax.data.positions import candidates, choose_positions
from rlp_jax.data.template import TemplateTokens, template_tokens
from rlp_jax.evals.likelihood import evaluate
from rlp_jax.state import Purpose, run_key, step_key

PEERS = {"trl": ("torch", "gain_trl.py"), "tunix": ("tunix", "gain_tunix.py")}
TURN = 5  # steps


def rows_of(config: Config, template: TemplateTokens, batch: dict, n: int) -> list[dict]:
    """Step n's thoughts to be: prompt, plain prefix and true token of each position, the same that our step chooses."""
    key = jax.random.fold_in(run_key(config.seed, n), Purpose.POSITIONS)
    allowed_BT = candidates(batch["length_B"], batch["span_BT"], template.first, 1, config.rlp.position_mode)
    position_BK, valid_BK = choose_positions(key, batch["document_B"], allowed_BT, None, config.rlp.positions)
    assert valid_BK.all(), "a document with too few positions"
    rows = []
    for tokens_T, position_K in zip(batch["tokens_BT"].tolist(), position_BK.tolist(), strict=True):
        for t in position_K:
            prompt = [*template.context, *tokens_T[:t], *template.open]
            rows.append({"prompt": prompt, "plain": tokens_T[:t], "target": tokens_T[t]})
    return rows


def make_job(config: Config, folder: pathlib.Path) -> tuple[dict, list[dict]]:
    """What all sides train on, and the held-out batches."""
    model, params, tokenizer = rlp_jax.load(config.model)
    save_hf(folder / "model", model, params, tokenizer)
    template = template_tokens(config.template, tokenizer)
    splits = load_documents(config.data, tokenizer, config.seed, config.rlp.position_mode)
    shape = (config.data.document_tokens, tokenizer.pad_id)
    batches = train_batches(splits.train, config.batch_documents, *shape, config.seed)
    taken = [next(batches) for _ in range(config.steps)]
    steps = [rows_of(config, template, batch, n) for n, batch in enumerate(taken)]
    job = {
        "directory": str(folder / "model"), "steps": steps,
        "batches": [{name: value.tolist() for name, value in batch.items()} for batch in taken],
        "template": template._asdict(), "group": config.rlp.group_size, "positions": config.rlp.positions,
        "new": config.rlp.thought_tokens, "temperature": config.rlp.temperature, "turn": TURN,
        "close": list(template.close), "threads": os.cpu_count(), "microbatches": config.rlp.microbatches,
    }  # fmt: skip
    heldout = heldout_batches(splits.heldout, config.eval.batch_documents, config.eval.documents, *shape)
    return job, heldout


def first_time(target: float, seconds: list[float], gains: list[float]) -> float | None:
    """When the gain reaches the target, on straight lines between the evaluations."""
    for i, gain in enumerate(gains):
        if gain >= target:
            if i == 0:
                return seconds[0]
            share = (target - gains[i - 1]) / (gain - gains[i - 1])
            return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])
    return None


def judged(entry: dict) -> tuple[float, float]:
    """Less is better: the time to the target, then the gain at the end."""
    return (np.inf if entry["seconds"] is None else entry["seconds"]), -entry["gains"][-1]


def train(sides: dict[str, tuple[pathlib.Path, str]], job: dict, turns: int, folder: pathlib.Path):
    """Seconds of each turn of each side, and why a side is missing. Their weights are then in folder / side / step."""
    seconds, missing = {}, {}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, (python, script) in sides.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            try:
                processes[name] = stack.enter_context(Peer(python, script, job | {"out": str(folder / name)}))
            except Missing as error:
                missing[name] = str(error)
        for _ in range(turns):
            for name, process in processes.items():
                seconds.setdefault(name, []).append(process.go()["seconds"])
    return seconds, missing


def gains_of(config: Config, heldout: list[dict], folder: pathlib.Path, turns: int, base: str) -> list[float]:
    """The held-out gain at the start and after each turn, against the model that training started from."""
    _, base_params, _ = rlp_jax.load(base)
    gains, key = [], step_key(config.seed, 0, Purpose.EVALUATION)
    for step in range(0, TURN * turns + 1, TURN):
        model, params, tokenizer = rlp_jax.load(str(folder / str(step)) if step else base)
        template = template_tokens(config.template, tokenizer)
        gains.append(evaluate(model, params, base_params, heldout, template, config, key)["gain"])
    return gains


def compare(args, names: list[str]) -> dict:
    turns = args.steps // TURN
    base = quickstart()
    config = dataclasses.replace(base, steps=args.steps, rlp=dataclasses.replace(base.rlp, microbatches=2))
    result: dict = {"steps": args.steps, "target": args.target, "learning_rates": args.learning_rates}
    best: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        sides = {"ours": (pathlib.Path(sys.executable), "gain_ours.py")}
        for name in names:
            environment, script = PEERS[name]
            try:
                sides[name] = (interpreter(root(args.directory), environment), script)
            except Missing as error:
                result[f"{name}_missing"] = str(error)
        for rate in args.learning_rates:
            tuned = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=rate))
            job, heldout = make_job(tuned, folder / str(rate))
            seconds, missing = train(sides, job | {"learning_rate": rate}, turns, folder / str(rate))
            result |= {f"{name}_missing": why for name, why in missing.items()}
            for name, of_turns in seconds.items():
                gains = gains_of(tuned, heldout, folder / str(rate) / name, turns, job["directory"])
                when = [0.0, *np.cumsum(of_turns).tolist()]
                reached = first_time(args.target, when, gains)
                entry = {"rate": rate, "seconds": reached, "gains": gains, "when": when, "turns": of_turns}
                print(
                    f"{name} at {rate:g}:", [round(gain, 3) for gain in gains], [round(s, 1) for s in when], flush=True
                )
                best[name] = min(best.get(name, entry), entry, key=judged)
    for name, entry in best.items():
        result |= {
            f"{name}_rate": entry["rate"],
            f"{name}_seconds": entry["seconds"] and round(entry["seconds"], 1),
            f"{name}_gain": round(entry["gains"][-1], 3),
            f"{name}_step_seconds": round(statistics.median(entry["turns"][1:] or entry["turns"]) / TURN, 3),
        }
        if name != "ours":
            result[f"vs_{name}_step"] = round(result[f"{name}_step_seconds"] / result["ours_step_seconds"], 2)
            both = entry["seconds"] and best["ours"]["seconds"]
            result[f"vs_{name}"] = round(entry["seconds"] / best["ours"]["seconds"], 2) if both else None
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 steps at one learning rate, to a gain of 0.6")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of " + ", ".join(PEERS) + "; or none")
    parser.add_argument("--steps", type=int, help=f"of training, a multiple of {TURN} (40)")
    parser.add_argument("--target", type=float, help="nats a token (1.5)")
    parser.add_argument("--learning-rates", help="each side is judged at its best (3e-5,1e-4,3e-4)")
    parser.add_argument("--directory", help="where install_peers.py put the environments")
    args = parser.parse_args()
    names = chosen(parser, args.peers, PEERS)
    args.steps = args.steps or (10 if args.quick else 40)
    if args.steps < TURN or args.steps % TURN:
        parser.error(f"--steps is {args.steps}: give a multiple of {TURN}")
    args.target = args.target or (0.6 if args.quick else 1.5)
    rates = args.learning_rates or ("1e-4" if args.quick else "3e-5,1e-4,3e-4")
    args.learning_rates = [float(rate) for rate in rates.split(",")]
    finish(compare(args, names), args.json)


if __name__ == "__main__":
    main()
