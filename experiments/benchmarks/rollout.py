# SPDX-License-Identifier: Apache-2.0
"""Sampling speed: our rollout against what else samples G thoughts a document, same weights, same machine, in turns.

    python experiments/benchmarks/rollout.py [--quick] [--json] [--peers transformers,llama_cpp,llama_cpp_f32,tunix]
        [--workload default] [--rounds 5] [--slots N] [--directory DIR]

SmolLM2-135M-Instruct at temperature 0.7. The workload `default` is 4 documents with G = 8 thoughts each, 256-token
prefix, 64 new tokens. `p1024-g16-l256` is 4 documents, prefix 1,024, G = 16, thoughts of 256 tokens; prefixes are 64,
256 and 1,024, G 8 and 16, thoughts 64 and 256. With `-spread` at the end, thoughts stop at lengths drawn beforehand
(log-normal, median a quarter of the cap, at most the cap), the same for all sides; only these tokens count.

Peers run in their own environments (`install_peers.py`) and idle while another has its turn. All count the prefix:
- transformers: generate, torch float32 on CPU, the B x G prompts as a batch.
- llama_cpp: the quantised file as it comes (Q4_1), prefix shared by the sequences, one batch of all live sequences.
- llama_cpp_f32: the same with the weights expanded to float32 and a float32 cache.
- tunix: Tunix's sampler, JAX float32 on CPU.
Ours is float32. `vs_NAME` is our tokens/s over the peer's. Every float32 side must agree on the likeliest next token.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peers.client import Peer
from peers.environments import Missing, chosen, interpreter, root
from peers.gguf_float32 import write_float32
from timing import against_ours, finish, take_turns

import rlp_jax
from rlp_jax.checkpoints_io.fetch import fetch
from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.models.presets import WEIGHTS
from rlp_jax.rollout.engine import sample_thoughts

MODEL, TEMPERATURE = "smollm2-135m-instruct", 0.7
NEVER = (-1,)  # a closing tag that no token matches


class Workload(NamedTuple):
    documents: int = 4
    prefix: int = 256
    group: int = 8
    new: int = 64
    spread: bool = False


WORKLOADS = {"default": Workload(), "default-spread": Workload(spread=True)} | {
    f"p{prefix}-g{group}-l{new}" + "-spread" * spread: Workload(4, prefix, group, new, spread)
    for prefix in (64, 256, 1_024)
    for group in (8, 16)
    for new in (64, 256)
    for spread in (False, True)
}
# The fastest of what was tried: no flash attention, and a buffer a sequence, into which seq_cp copies the prefix. In
# one buffer whose cells the sequences share, every query runs over every sequence's cells.
LLAMA_CPP = {"unified": False, "flash": "off", "ubatch": 512}
PEERS = {  # name: environment, script, what its job says besides the workload
    "transformers": ("torch", "rollout_transformers.py", {}),
    "llama_cpp": ("llama_cpp", "rollout_llama_cpp.py", LLAMA_CPP | {"cache": "f16"}),
    "llama_cpp_f32": ("llama_cpp", "rollout_llama_cpp.py", LLAMA_CPP | {"cache": "f32"}),
    "tunix": ("tunix", "rollout_tunix.py", {}),
}


def draw(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Documents [B, T], which end with the same token, and the lengths of their thoughts [B, G]."""
    random = np.random.default_rng(0)
    tokens_BT = random.integers(100, 40_000, (workload.documents, workload.prefix)).astype(np.int32)
    tokens_BT[:, -1] = tokens_BT[0, -1]
    shape = (workload.documents, workload.group)
    if not workload.spread:
        return tokens_BT, np.full(shape, workload.new)
    lengths_BG = np.exp(random.normal(np.log(workload.new / 4), 0.8, shape))
    return tokens_BT, np.clip(np.rint(lengths_BG), 1, workload.new).astype(np.int64)


def ours(model, params, tokens_BT, lengths_BG, slots: int | None):
    """The last token of a document opens its thoughts: all sides decode after the same prefix."""
    (B, T), G, new = tokens_BT.shape, lengths_BG.shape[1], int(lengths_BG.max())
    opening = (int(tokens_BT[0, -1]),)

    @jax.jit
    def rollout(params, tokens_BT, key):
        _, cache = model.hidden(params, tokens_BT)
        keys_BG = jax.random.split(key, (B, G))
        return sample_thoughts(
            model, params, cache, jnp.full((B, G), T - 1), opening, NEVER, keys_BG, new, TEMPERATURE,
            group_size=G, slots=slots, limit_BR=jnp.asarray(lengths_BG),
        )  # fmt: skip

    def call():
        lengths = rollout(params, tokens_BT, jax.random.key(0)).length_BR
        np.testing.assert_array_equal(lengths, lengths_BG)

    return call


def next_tokens(model, params, tokens_BT) -> list[int]:
    """The likeliest token after each document."""
    return jax.jit(lambda params: model.apply(params, tokens_BT)[0][:, -1].argmax(-1))(params).tolist()


def write_weights(names, model, params, tokenizer, directory: pathlib.Path) -> dict[str, dict]:
    """Writes what these peers read; returns the part of each one's job that says where."""
    quantised, expanded = fetch(WEIGHTS[MODEL]), directory / "float32.gguf"
    if {"transformers", "tunix"} & set(names):
        save_hf(directory / "model", model, params, tokenizer)
    if "llama_cpp_f32" in names:
        write_float32(quantised, expanded)
    files = {"llama_cpp": {"gguf": str(quantised)}, "llama_cpp_f32": {"gguf": str(expanded)}}
    return {name: files.get(name, {"directory": str(directory / "model")}) for name in names}


def compare(workload: Workload, names: list[str], rounds: int, slots: int | None, directory: pathlib.Path) -> dict:
    """One table: tokens/s of each side, ratios round by round, and why a peer is missing."""
    model, params, tokenizer = rlp_jax.load(MODEL)
    params = jax.tree.map(jnp.asarray, params)
    tokens_BT, lengths_BG = draw(workload)
    expected = next_tokens(model, params, tokens_BT)
    job = {"documents": tokens_BT.tolist(), "lengths": lengths_BG.tolist(), "group": workload.group}
    job |= {"temperature": TEMPERATURE, "threads": os.cpu_count()}
    result, candidates = {}, {"ours": ours(model, params, tokens_BT, lengths_BG, slots)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        weights = write_weights(names, model, params, tokenizer, pathlib.Path(folder))
        for name in names:
            environment, script, more = PEERS[name]
            try:
                peer = stack.enter_context(
                    Peer(interpreter(directory, environment), script, job | weights[name] | more)
                )
            except Missing as missing:
                result[f"{name}_missing"] = str(missing)
                continue
            if peer.facts["next"] != expected and name != "llama_cpp":  # quantised arithmetic may tip the balance
                raise RuntimeError(f"{name} continues with {peer.facts['next']}, ours with {expected}")
            result[f"{name}_facts"] = {key: value for key, value in peer.facts.items() if key != "next"}
            candidates[name] = peer.go
        seconds = take_turns(candidates, rounds, gone=result)
    for name, times in seconds.items():
        result[f"{name}_tokens_per_s"] = round(int(lengths_BG.sum()) / float(np.median(times)), 1)
    return result | against_ours(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of " + ", ".join(PEERS) + "; or none")
    parser.add_argument("--workload", default="default", choices=WORKLOADS, metavar="NAME", help="see above")
    parser.add_argument("--slots", type=int, help="ours: thoughts of a document decoded at a time (all)")
    parser.add_argument("--directory", help="where install_peers.py put the environments")
    args = parser.parse_args()
    names = chosen(parser, args.peers, PEERS)
    rounds, workload = args.rounds or (1 if args.quick else 5), WORKLOADS[args.workload]
    result = {"workload": args.workload, **workload._asdict(), "slots": args.slots, "rounds": rounds}
    finish(result | compare(workload, names, rounds, args.slots, root(args.directory)), args.json)


if __name__ == "__main__":
    main()
