# SPDX-License-Identifier: Apache-2.0
"""What this machine allows, and how near prefill, decoding and the learner's gradient come to it.

    python experiments/benchmarks/ceiling.py [--quick] [--json]

The machine, in float32, best of several: `peak_gflops` of a square matrix product of 2,048 in JAX, and
`bandwidth_gb_per_s` of summing 1 GB. At the row counts of decoding: SmolLM2-135M's own matrix products of one token
for 1 to 128 rows, all layers and the head after each other, and nothing else: `products_ROWS_gflops`.

The phases, SmolLM2-135M, 4 documents x G = 8, prefix 256, 64 thought tokens. Each phase's bound is the larger of its
operations over the peak and its bytes over the bandwidth; `PHASE_fraction` is that bound over the measured time.
Operations count a multiplication and an addition as two: matrix products and causal attention, the gradient as three
forwards. Bytes count each weight once a pass, of decoding also the keys and values that each thought reads and the
logits written and read. `decode_products_fraction` compares decoding with the products alone at its own row count.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import finish

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel, ModelConfig
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.scoring import Thoughts, score_branches

DOCUMENTS, GROUP, PREFIX, NEW, TEMPERATURE = 4, 8, 256, 64, 0.7
ROWS = (1, 8, 32, 64, 128)
TEMPLATE = TemplateTokens(plain=(), context=(), open=(1,), close=(-1,))


def best(call, times: int) -> float:
    """Least seconds of several calls, after one that does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def machine(times: int) -> dict[str, float]:
    square, block = jnp.ones((2_048, 2_048)), jnp.ones(1 << 28)
    product, total = jax.jit(lambda a: a @ a), jax.jit(jnp.sum)
    return {
        "peak_gflops": 2 * 2_048**3 / best(lambda: product(square), times) / 1e9,
        "bandwidth_gb_per_s": block.nbytes / best(lambda: total(block), times) / 1e9,
    }


def product_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of every matrix product that a token takes part in."""
    D, F, E = config.d_model, config.d_ff, config.head_dim
    layer = [(D, config.n_heads * E), *[(D, config.n_kv_heads * E)] * 2, (config.n_heads * E, D), *[(D, F)] * 2, (F, D)]
    return layer * config.n_layers + [(D, config.vocab_size)]


def weights(config: ModelConfig, head: bool = True) -> int:
    """Weights in those products."""
    return sum(rows * columns for rows, columns in product_shapes(config)[: None if head else -1])


def products_seconds(config: ModelConfig, times: int) -> dict[int, float]:
    """Seconds of one token's matrix products, by the number of rows."""
    kernels = [jnp.full(shape, 0.01) for shape in product_shapes(config)]

    @jax.jit
    def run(kernels, inputs):
        return [inputs[kernel.shape[0]] @ kernel for kernel in kernels]

    widths = {shape[0] for shape in product_shapes(config)}
    return {
        rows: best(lambda rows=rows: run(kernels, {width: jnp.ones((rows, width)) for width in widths}), times)
        for rows in ROWS
    }


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Scores and weighted sums over so many (query, key) pairs, in all layers."""
    return 4 * pairs * config.n_heads * config.head_dim * config.n_layers


def phases(config: ModelConfig, times: int) -> dict[str, tuple[float, float, float]]:
    """Seconds, operations and bytes of each phase."""
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    draw = np.random.default_rng(0).integers
    B, G, T, L = DOCUMENTS, GROUP, PREFIX, NEW
    tokens_BT = draw(3, config.vocab_size, (B, T)).astype(np.int32)
    thoughts = Thoughts(draw(3, config.vocab_size, (B, G, L)), jnp.full((B, G), L), jnp.zeros((B, G), bool))
    target_BGH = draw(3, config.vocab_size, (B, G, 1))
    prefix_BG, key_BG = jnp.full((B, G), T), jax.random.split(jax.random.key(0), (B, G))

    prefill = jax.jit(lambda params: model.hidden(params, tokens_BT)[1])
    cache = prefill(params)

    def rollout(length):
        run = jax.jit(
            lambda params, cache: sample_thoughts(
                model, params, cache, prefix_BG, TEMPLATE.open, TEMPLATE.close, key_BG, length, TEMPERATURE,
                group_size=G,
            )
        )  # fmt: skip
        return best(lambda: run(params, cache), times)

    def loss(params):
        _, cache = model.hidden(params, tokens_BT)
        template = TEMPLATE._replace(close=(2,))
        scores = score_branches(model, params, cache, prefix_BG, thoughts, target_BGH, template, TEMPERATURE)
        return scores.logprob_BRL.mean()

    gradient = jax.jit(jax.grad(loss))
    inner, every, bytes_of = weights(config, head=False), weights(config), 4
    of_prefix = 2 * inner * B * T + attention_flops(config, B * T * T / 2)
    S = len(TEMPLATE.open) + L + 1
    of_branches = 2 * inner * B * G * S + 2 * (every - inner) * B * G * (L + 1)
    of_branches += attention_flops(config, B * G * S * (T + S / 2))
    keys = 2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_of  # and values, bytes a token
    context = T + 1 + 3 * L / 4  # mean over the tokens between L / 2 and L
    return {
        "prefill": (best(lambda: prefill(params), times), of_prefix, bytes_of * inner + keys * B * T),
        "decode": (
            (rollout(L) - rollout(L // 2)) / (L - L // 2),
            2 * every * B * G + attention_flops(config, B * G * context),
            bytes_of * every + keys * B * (T + G * (context - T)) + 2 * bytes_of * B * G * config.vocab_size,
        ),
        "gradient": (best(lambda: gradient(params), times), 3 * (of_prefix + of_branches), 3 * bytes_of * every),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 of the 30 layers, best of two")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()
    config, times = CONFIGS["smollm2-135m"], 2 if args.quick else 5
    if args.quick:
        config = dataclasses.replace(config, n_layers=6)
    measured, by_rows = machine(times), products_seconds(config, times)
    result = {"layers": config.n_layers} | {name: round(value, 1) for name, value in measured.items()}
    for rows, seconds in by_rows.items():
        result[f"products_{rows}_gflops"] = round(2 * weights(config) * rows / seconds / 1e9, 1)
    for name, (seconds, flops, size) in phases(config, times).items():
        by_flops, by_bytes = flops / measured["peak_gflops"] / 1e9, size / measured["bandwidth_gb_per_s"] / 1e9
        result |= {
            f"{name}_seconds": round(seconds, 4),
            f"{name}_gflops": round(flops / seconds / 1e9, 1),
            f"{name}_gb_per_s": round(size / seconds / 1e9, 1),
            f"{name}_bound": "operations" if by_flops > by_bytes else "bytes",
            f"{name}_fraction": round(max(by_flops, by_bytes) / seconds, 2),
        }
    result["decode_products_fraction"] = round(by_rows[DOCUMENTS * GROUP] / (result["decode_seconds"]), 2)
    finish(result, args.json)


if __name__ == "__main__":
    main()
