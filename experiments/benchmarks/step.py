# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a whole RLP step (sampling, information gain, update) against general GRPO trainers.

    python experiments/benchmarks/step.py [--quick] [--json] [--peers trl,tunix] [--documents 4] [--group 4]
        [--prefix 128] [--tokens 32] [--rounds 3] [--directory DIR]

SmolLM2-135M-Instruct, float32, AdamW, one update a batch, one token scored after each thought, no thought ends early.
Every side accumulates its gradient a document at a time. The peaks of all sides add up to 26 GB at the default size:
with less memory than that, name one peer a run.
The documents' last token is what is to be predicted, the rest is the prefix. Peers get the information gain as a reward
function of theirs (peers/step_trl.py, peers/step_tunix.py), with the model itself as the scorer and its moving average
as the baseline. Each side, ours too, is a process of its own (`install_peers.py`), and they take turns. `vs_NAME` is
the peer's seconds over ours; `peak_MB` is the largest resident memory of each process (VmHWM). All sides must agree on
the baseline's log-probabilities.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile

import numpy as np
from peers.client import Peer
from peers.environments import Missing, chosen, interpreter, root
from timing import against_ours, finish, take_turns

import rlp_jax
from rlp_jax.checkpoints_io.load import save_hf

MODEL = "smollm2-135m-instruct"
OPEN, CLOSE = "<think>", "</think>"
PEERS = {"trl": ("torch", "step_trl.py"), "tunix": ("tunix", "step_tunix.py")}


def make_job(shape: dict[str, int], folder: pathlib.Path) -> dict:
    """A workload's job: `shape` has documents, group, prefix, tokens. The weights go into `folder`, where all sides
    read them."""
    model, params, tokenizer = rlp_jax.load(MODEL)
    if not (folder / "model").exists():
        save_hf(folder / "model", model, params, tokenizer)
    draw = np.random.default_rng(0).integers(100, 40_000, (shape["documents"], shape["prefix"] + 1))
    return {
        "directory": str(folder / "model"), "documents": draw.tolist(), "group": shape["group"], "new": shape["tokens"],
        "open": tokenizer.encode(OPEN), "close": tokenizer.encode(CLOSE), "temperature": 0.7, "learning_rate": 1e-6,
        "threads": os.cpu_count(), "microbatches": shape["documents"],
    }  # fmt: skip


def compare(args, names: list[str]) -> dict:
    result, answers = {}, {}

    def turn(name: str, peer: Peer):
        def call():
            answers[name] = peer.go()
            assert answers[name]["tokens"] == args.documents * args.group * args.tokens, (name, answers[name])

        return call

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        job = make_job(vars(args), pathlib.Path(folder))
        directory = root(args.directory)
        ours = stack.enter_context(Peer(pathlib.Path(sys.executable), "step_ours.py", job))
        candidates = {"ours": turn("ours", ours)}
        for name in names:
            environment, script = PEERS[name]
            try:
                peer = stack.enter_context(Peer(interpreter(directory, environment), script, job))
            except Missing as missing:
                result[f"{name}_missing"] = str(missing)
                continue
            np.testing.assert_allclose(peer.facts.pop("baseline"), ours.facts["baseline"], rtol=1e-3, err_msg=name)
            result[f"{name}_facts"] = peer.facts
            candidates[name] = turn(name, peer)
        seconds = take_turns(candidates, args.rounds, gone=result)
    for name, times in seconds.items():
        result[f"{name}_seconds"] = round(float(np.median(times)), 2)
        result[f"{name}_peak_MB"] = round(answers[name]["peak_bytes"] / 1e6)
    return result | against_ours(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of three")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of " + ", ".join(PEERS) + "; or none")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="thoughts a document")
    parser.add_argument("--prefix", type=int, default=128, help="tokens before a thought's opening tag")
    parser.add_argument("--tokens", type=int, default=32, help="of a thought")
    parser.add_argument("--directory", help="where install_peers.py put the environments")
    args = parser.parse_args()
    names = chosen(parser, args.peers, PEERS)
    args.rounds = args.rounds or (1 if args.quick else 3)
    shape = f"{args.documents} documents x {args.group} thoughts, prefix {args.prefix}, {args.tokens} tokens a thought"
    finish({"workload": shape, "rounds": args.rounds} | compare(args, names), args.json)


if __name__ == "__main__":
    main()
