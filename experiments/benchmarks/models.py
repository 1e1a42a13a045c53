# SPDX-License-Identifier: Apache-2.0
"""Model speed: forward and backward against `transformers` on torch, same weights, same shapes, in turns.

    python experiments/benchmarks/models.py [--quick] [--json] [--peers transformers] [--models smollm2] [--rounds 1]

Batches of 8 x 512 tokens, float32, random weights: SmolLM2-135M, the first 4 layers of Qwen3-1.7B with its whole
vocabulary, and a small Nemotron-H (12 layers of width 768). `forward` gives all logits; `gradient` is forward and
backward of the mean next-token loss for every parameter. `vs_transformers` is our tokens/s over theirs, the geometric
mean over models and passes; `models` has each. `vs_sequential` is the scan of a Nemotron-H-8B mixer over 2,048 tokens:
seconds of a token-by-token scan over those of the chunked one. Printed beside them: what the machine reaches in matrix
products and in copying memory, which bounds both sides.
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import finish, median_ratio, take_turns

from rlp_jax.checkpoints_io.hf_config import config_from_json
from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.models.mamba2 import ssd, ssd_step
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.models.vocabulary import token_logprobs

MODELS = {
    "smollm2": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "max_position_embeddings": 8_192, "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 2_048, "intermediate_size": 6_144,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960, "tie_word_embeddings": True,
    },
    "nemotron_h": {
        "model_type": "nemotron_h", "vocab_size": 32_768, "hidden_size": 768, "intermediate_size": 3_072,
        "num_hidden_layers": 12, "hybrid_override_pattern": "M-M-M*-M-M*-", "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "mamba_num_heads": 24, "mamba_head_dim": 64, "ssm_state_size": 128,
        "n_groups": 8, "conv_kernel": 4, "chunk_size": 128, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 8_192, "tie_word_embeddings": False,
    },
}  # fmt: skip
PASSES = ("forward", "gradient")
PEERS = ("transformers", "sequential")


def ours(model: LanguageModel, params, tokens_BT):
    def loss(params):
        hidden_BTD, _ = model.hidden(params, tokens_BT)
        unembed = functools.partial(model.unembed, params)
        return -token_logprobs(unembed, hidden_BTD[:, :-1], tokens_BT[:, 1:]).logprob.mean()

    forward = jax.jit(lambda params: model.apply(params, tokens_BT)[0])
    gradient = jax.jit(jax.value_and_grad(loss))
    return {
        "forward": lambda: np.asarray(jax.block_until_ready(forward(params))[0, -1]),
        "gradient": lambda: float(jax.block_until_ready(gradient(params))[0]),
    }


def theirs(model: LanguageModel, params, tokens_BT):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "model"
        save_hf(path, model, params, None)
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.from_numpy(np.asarray(tokens_BT, np.int64))

    @torch.inference_mode()
    def forward():
        return peer(tokens, use_cache=False).logits[0, -1].numpy()

    def gradient():
        peer.zero_grad(set_to_none=True)
        loss = peer(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return float(loss)

    return {"forward": forward, "gradient": gradient}


def compare(name: str, batch: int, length: int, rounds: int, against_peer: bool) -> dict[str, dict[str, float]]:
    """Tokens/s of each pass, and the ratio of ours to theirs round by round. Both sides must agree on the numbers."""
    fields = dict(MODELS[name])
    model = LanguageModel(dataclasses.replace(config_from_json(fields, name), remat="elementwise"))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens_BT = np.random.default_rng(0).integers(3, fields["vocab_size"], (batch, length)).astype(np.int32)
    sides = {"ours": ours(model, params, tokens_BT)}
    if against_peer:
        sides["transformers"] = theirs(model, params, tokens_BT)
    result = {}
    for which in PASSES:
        candidates = {side: calls[which] for side, calls in sides.items()}
        if against_peer:
            np.testing.assert_allclose(candidates["ours"](), candidates["transformers"](), rtol=2e-3, atol=2e-3)
        seconds = take_turns(candidates, rounds)
        row = {f"{side}_tokens_per_s": round(batch * length / float(np.median(t)), 1) for side, t in seconds.items()}
        if against_peer:
            ratio = median_ratio(seconds["transformers"], seconds["ours"])
            row |= {
                key: round(value, 3) for key, value in zip(("ratio", "least", "greatest"), ratio.values(), strict=True)
            }
        result[which] = row
        print(f"{name} {which}: {row}", flush=True)
    return result


def scan_inputs(length: int):
    """What enters the recurrence of a Nemotron-H-8B mixer: 128 heads of width 64 in 8 groups, states of 128."""
    heads, groups, width, states = 128, 8, 64, 128
    keys = jax.random.split(jax.random.key(0), 4)
    x, b, c = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((1, length, heads, width), *[(1, length, groups, states)] * 2), strict=False)
    )
    dt = jax.nn.softplus(jax.random.normal(keys[3], (1, length, heads)) - 4)
    return x, dt, -jnp.linspace(1.0, 16.0, heads), b, c, jnp.zeros((1, heads, width, states))


def sequential(x_nSJP, dt_nSJ, a_J, b_nSUZ, c_nSUZ, start_nJPZ):
    """The recurrence as it is written, a token at a time."""

    def token(state, inputs):
        y, state = ssd_step(*inputs[:2], a_J, *inputs[2:], state)
        return state, y

    inputs = jax.tree.map(lambda array: array.swapaxes(0, 1), (x_nSJP, dt_nSJ, b_nSUZ, c_nSUZ))
    return jax.lax.scan(token, start_nJPZ, inputs)[1].swapaxes(0, 1)


def sequential_ratio(rounds: int, length: int = 2_048, chunk: int = 128) -> dict[str, float | list[float]]:
    """Seconds of the token-by-token scan over those of the chunked one, forward only, which agree."""
    inputs = scan_inputs(length)
    chunked, by_token = jax.jit(lambda *a: ssd(*a, chunk)[0]), jax.jit(sequential)
    np.testing.assert_allclose(chunked(*inputs), by_token(*inputs), rtol=1e-3, atol=1e-3)
    candidates = {
        "chunked": lambda: jax.block_until_ready(chunked(*inputs)),
        "sequential": lambda: jax.block_until_ready(by_token(*inputs)),
    }
    seconds = take_turns(candidates, 3 * rounds)
    ratio = median_ratio(seconds["sequential"], seconds["chunked"])
    return {
        "vs_sequential": round(ratio["median"], 1),
        "vs_sequential_range": [round(ratio["min"], 1), round(ratio["max"], 1)],
    }


def machine() -> dict[str, float]:
    """Best of ten: float32 matrix products of 2,048 in jax, and copying 256 MB (read and written, counted twice)."""
    a = jnp.ones((2_048, 2_048), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    block = np.ones(1 << 26, np.float32)
    target = np.empty_like(block)

    def best(call):
        call()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "matmul_gflops": round(2 * 2_048**3 / best(lambda: jax.block_until_ready(product(a))) / 1e9, 1),
        "copy_gb_per_s": round(2 * block.nbytes / best(lambda: np.copyto(target, block)) / 1e9, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batches of 2 x 128 and one round")
    parser.add_argument("--rounds", type=int, help="how often the sides take turns (3)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of transformers, sequential; or none")
    parser.add_argument("--models", default=",".join(MODELS), help="which of " + ", ".join(MODELS))
    args = parser.parse_args()
    peers = [] if args.peers == "none" else args.peers.split(",")
    names = args.models.split(",")
    if unknown := sorted(set(peers) - set(PEERS)):
        parser.error(f"unknown peers {', '.join(unknown)}: choose from {', '.join(PEERS)}, or none")
    if unknown := sorted(set(names) - set(MODELS)):
        parser.error(f"unknown models {', '.join(unknown)}: choose from {', '.join(MODELS)}")
    batch, length, rounds = (2, 128, 1) if args.quick else (8, 512, 3)
    rounds = args.rounds or rounds

    result = {"workload": f"{batch} x {length} tokens, float32", "rounds": rounds, **machine()}
    result["models"] = {name: compare(name, batch, length, rounds, "transformers" in peers) for name in names}
    if "transformers" in peers:
        ratios = [row["ratio"] for passes in result["models"].values() for row in passes.values()]
        result["vs_transformers"] = round(math.exp(np.mean(np.log(ratios))), 3)
    if "sequential" in peers:
        result |= sequential_ratio(rounds)
    finish(result, args.json)


if __name__ == "__main__":
    main()
