"""Sampling speed: our rollout against `transformers` generate, same weights, same machine, in turns.

    python experiments/benchmarks/rollout.py [--quick] [--json] [--peers transformers]

Workload: SmolLM2-135M in float32, 4 documents with G = 8 thoughts each, 256-token prefix, 64 new tokens, temperature
0.7, nothing stops early. Both sides count the prefix's computation; `transformers` (torch on CPU, all cores) gets the
32 prompts as a batch, which is how its users sample G completions. `vs_transformers` is our tokens/s over theirs.
"""

import argparse
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from timing import finish, median_ratio, take_turns

import rlp_jax
from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.rollout.sampling import sample_thoughts

DOCUMENTS, GROUP, PREFIX, NEW, TEMPERATURE = 4, 8, 256, 64, 0.7
NEVER = (-1,)  # a closing tag that no token matches


def ours(model, params, tokens_BT):
    opening = (int(tokens_BT[0, -1]),)  # the last prefix token opens the thought: both sides decode after the same 256

    @jax.jit
    def rollout(params, tokens_BT, key):
        _, cache = model.hidden(params, tokens_BT)
        prefix_BR = jnp.full((DOCUMENTS, GROUP), PREFIX)
        keys_BR = jax.random.split(key, (DOCUMENTS, GROUP))
        return sample_thoughts(model, params, cache, prefix_BR - 1, opening, NEVER, keys_BR, NEW, TEMPERATURE)

    key = jax.random.key(0)
    return lambda: jax.block_until_ready(rollout(params, tokens_BT, key)).length_BR.sum()


def transformers_generate(model, params, tokenizer, tokens_BT):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/model"
        save_hf(path, model, params, tokenizer)
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = torch.from_numpy(np.repeat(tokens_BT, GROUP, 0).astype(np.int64))
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}

    @torch.inference_mode()
    def call():
        out = peer.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, min_new_tokens=NEW, **settings
        )
        assert out.shape[1] == PREFIX + NEW

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of five")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default="transformers", help="comma-separated: transformers, or none")
    args = parser.parse_args()
    peers = [name for name in args.peers.split(",") if name and name != "none"]
    if unknown := set(peers) - {"transformers"}:
        parser.error(f"unknown peers {', '.join(sorted(unknown))}: choose transformers or none")

    model, params, tokenizer = rlp_jax.load("smollm2-135m-instruct")
    params = jax.tree.map(jnp.asarray, params)
    tokens_BT = np.random.default_rng(0).integers(100, 40_000, (DOCUMENTS, PREFIX)).astype(np.int32)
    tokens_BT[:, -1] = tokens_BT[0, -1]
    candidates = {"ours": ours(model, params, tokens_BT)}
    if "transformers" in peers:
        candidates["transformers"] = transformers_generate(model, params, tokenizer, tokens_BT)
    rounds = 1 if args.quick else 5
    seconds = take_turns(candidates, rounds)
    tokens = DOCUMENTS * GROUP * NEW
    result = {
        "workload": f"{DOCUMENTS} documents x {GROUP} thoughts, prefix {PREFIX}, {NEW} new tokens",
        "rounds": rounds,
    }
    for name, times in seconds.items():
        result[f"{name}_tokens_per_s"] = round(tokens / float(np.median(times)), 1)
    for name in peers:
        ratio = median_ratio(seconds[name], seconds["ours"])
        result[f"vs_{name}"] = round(ratio["median"], 2)
        result[f"vs_{name}_range"] = [round(ratio["min"], 2), round(ratio["max"], 2)]
    finish(result, args.json)


if __name__ == "__main__":
    main()
