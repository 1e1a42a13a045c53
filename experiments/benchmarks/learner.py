"""Learner speed: the gradient of the RLP loss with the prefix shared by its G thoughts, against the prefix repeated.

    python experiments/benchmarks/learner.py [--quick] [--json] [--peers repeated]

The same code runs both: repeated means G copies of the document with one branch each, which is what a trainer without
a fork computes. Both give the same loss (checked here to 1e-4). SmolLM2-135M's shape with random weights, float32,
2 documents, G = 8, 256-token prefix, 64 thought tokens. `vs_repeated` is their seconds over ours.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import finish, median_ratio, take_turns

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.rollout.scoring import Thoughts, score_branches

DOCUMENTS, GROUP, PREFIX, THOUGHT = 2, 8, 256, 64
TEMPLATE = TemplateTokens(plain=(), context=(), open=(1,), close=(2,))


def gradient(model, params, tokens_BT, thought_BRL, target_BRH):
    def loss(params):
        B, R, L = thought_BRL.shape
        _, cache = model.hidden(params, tokens_BT)
        thoughts = Thoughts(thought_BRL, jnp.full((B, R), L), jnp.zeros((B, R), bool))
        prefix_BR = jnp.full((B, R), PREFIX)
        scores = score_branches(model, params, cache, prefix_BR, thoughts, target_BRH, TEMPLATE, 0.7)
        return scores.logprob_BRL.mean()

    step = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(step(params))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 of the 30 layers, one round instead of five")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--peers", default="repeated", help="repeated, or none")
    args = parser.parse_args()
    if args.peers not in ("repeated", "none"):
        parser.error(f"unknown peers {args.peers}: choose repeated or none")

    config = CONFIGS["smollm2-135m"]
    if args.quick:
        import dataclasses

        config = dataclasses.replace(config, n_layers=6)
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    draw = np.random.default_rng(0).integers
    tokens_BT = draw(3, config.vocab_size, (DOCUMENTS, PREFIX)).astype(np.int32)
    thought_BRL = draw(3, config.vocab_size, (DOCUMENTS, GROUP, THOUGHT)).astype(np.int32)
    target_BRH = draw(3, config.vocab_size, (DOCUMENTS, GROUP, 1)).astype(np.int32)
    candidates = {"shared": gradient(model, params, tokens_BT, thought_BRL, target_BRH)}
    if args.peers == "repeated":
        candidates["repeated"] = gradient(
            model, params, np.repeat(tokens_BT, GROUP, 0),
            thought_BRL.reshape(-1, 1, THOUGHT), target_BRH.reshape(-1, 1, 1),
        )  # fmt: skip
        losses = [float(call()[0]) for call in candidates.values()]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    rounds = 1 if args.quick else 5
    seconds = take_turns(candidates, rounds)
    result = {
        "workload": f"{DOCUMENTS} documents x {GROUP} thoughts, prefix {PREFIX}, thought {THOUGHT}",
        "layers": config.n_layers,
        "rounds": rounds,
    }
    for name, times in seconds.items():
        result[f"{name}_seconds"] = round(float(np.median(times)), 3)
    if "repeated" in seconds:
        ratio = median_ratio(seconds["repeated"], seconds["shared"])
        result["vs_repeated"] = round(ratio["median"], 2)
        result["vs_repeated_range"] = [round(ratio["min"], 2), round(ratio["max"], 2)]
    finish(result, args.json)


if __name__ == "__main__":
    main()
