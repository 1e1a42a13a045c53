# SPDX-License-Identifier: Apache-2.0
"""Learner speed: the gradient of the thoughts' log-probabilities, the prefix shared by its G thoughts, and repeated.

    python experiments/benchmarks/learner.py [--quick] [--json] [--peers repeated] [--workload short]

The same packed code runs both: repeated means a copy of the document for each thought, which is what a trainer without
sharing computes. Both give the same loss (checked here to 1e-4). SmolLM2-135M's shape with random weights, float32,
layers rematerialised. Workloads: `short`, 2 documents, G = 8, prefix 256, thoughts of 64; `long`, 1 document, G = 16,
prefix 1,660, thoughts of 512. `vs_repeated` is their seconds over ours. Two predictions stand beside it: `by_tokens`,
the ratio of tokens that the layers read; `by_flops` counts layers, attention over what each token sees, and the head,
which both sides compute for the thoughts alone.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from timing import finish, median_ratio, take_turns

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel, ModelConfig
from rlp_jax.rollout.packing import bin_size, branch_tokens, pack, score_bins
from rlp_jax.rollout.scoring import Thoughts

TEMPLATE = TemplateTokens(plain=(), context=(), open=(1,), close=(2,))


@dataclasses.dataclass(frozen=True)
class Workload:
    documents: int
    group: int
    prefix: int
    thought: int


WORKLOADS = {"short": Workload(2, 8, 256, 64), "long": Workload(1, 16, 1_660, 512)}


def gradient(model, params, tokens_dT, thought_dRL, target_dRH):
    """Loss and gradient of d documents with R branches each, packed into one bin."""
    documents, R, L = thought_dRL.shape
    T = tokens_dT.shape[1]
    thoughts = Thoughts(thought_dRL, jnp.full((documents, R), L), jnp.zeros((documents, R), bool))
    size = documents * T + int(branch_tokens(thoughts, TEMPLATE, 1).sum())
    capacity = bin_size(size)
    inputs = tokens_dT, jnp.full((documents, R), T), jnp.ones((documents, R), bool), thoughts, target_dRH

    def loss(params):
        one_bin = jax.tree.map(lambda x: x[None], pack(*inputs, TEMPLATE, capacity))
        return score_bins(model, params, one_bin, thought_dRL[None], target_dRH[None], 0.7).logprob_BRL.mean()

    step = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(step(params))


def predictions(config: ModelConfig, work: Workload) -> dict[str, float]:
    """Repeated over shared, by tokens and by operations (a multiplication and an addition are two)."""
    branch = work.thought + 2
    prefixes = {"shared": 1, "repeated": work.group}
    tokens = {name: copies * work.prefix + work.group * branch for name, copies in prefixes.items()}
    width = config.d_model * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    weights = config.n_layers * (width + 3 * config.d_model * config.d_ff)
    flops = {}
    for name, copies in prefixes.items():
        pairs = copies * work.prefix**2 / 2 + work.group * branch * (work.prefix + branch / 2)
        attention = 4 * pairs * config.n_heads * config.head_dim * config.n_layers
        head = 2 * work.group * (work.thought + 1) * config.d_model * config.vocab_size
        # Layers and head are run once more for the backward pass, and attention's scores with them.
        flops[name] = 4 * (2 * weights * tokens[name] + attention + head)
    return {
        "by_tokens": round(tokens["repeated"] / tokens["shared"], 2),
        "by_flops": round(flops["repeated"] / flops["shared"], 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 of the 30 layers, one round instead of three")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default="repeated", help="repeated, or none")
    parser.add_argument("--workload", default="short", choices=WORKLOADS)
    args = parser.parse_args()
    if args.peers not in ("repeated", "none"):
        parser.error(f"unknown peers {args.peers}: choose repeated or none")

    config = dataclasses.replace(CONFIGS["smollm2-135m"], remat="layer")
    if args.quick:
        config = dataclasses.replace(config, n_layers=6)
    work = WORKLOADS[args.workload]
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    draw = np.random.default_rng(0).integers
    tokens_BT = draw(3, config.vocab_size, (work.documents, work.prefix)).astype(np.int32)
    thought_BRL = draw(3, config.vocab_size, (work.documents, work.group, work.thought)).astype(np.int32)
    target_BRH = draw(3, config.vocab_size, (work.documents, work.group, 1)).astype(np.int32)
    candidates = {"shared": gradient(model, params, tokens_BT, thought_BRL, target_BRH)}
    if args.peers == "repeated":
        candidates["repeated"] = gradient(
            model, params, np.repeat(tokens_BT, work.group, 0),
            thought_BRL.reshape(-1, 1, work.thought), target_BRH.reshape(-1, 1, 1),
        )  # fmt: skip
        losses = [float(call()[0]) for call in candidates.values()]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    rounds = 1 if args.quick else 3
    seconds = take_turns(candidates, rounds)
    result = {"workload": dataclasses.asdict(work), "layers": config.n_layers, "rounds": rounds}
    for name, times in seconds.items():
        result[f"{name}_seconds"] = round(float(np.median(times)), 3)
    if "repeated" in seconds:
        ratio = median_ratio(seconds["repeated"], seconds["shared"])
        result["vs_repeated"] = round(ratio["median"], 2)
        result["vs_repeated_range"] = [round(ratio["min"], 2), round(ratio["max"], 2)]
        result |= predictions(config, work)
    finish(result, args.json)


if __name__ == "__main__":
    main()
