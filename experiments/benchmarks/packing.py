# SPDX-License-Identifier: Apache-2.0
"""What packing saves the learner: padding and seconds of a gradient, packed into bins against padded rows.

    python experiments/benchmarks/packing.py [--quick] [--json]

Lengths are like those of GSM8K: documents log-normal with the mean and deviation of log length that 1,500 of its
training problems with their answers have in SmolLM2's tokens (5.14, 0.36: median 169, 99% below 409), a position
anywhere in each, and thoughts log-normal around a quarter of their cap, cut at it. `padding` is the share of the
learner's tokens that nobody needs, as `metrics.jsonl` logs it: at 512 documents of at most 512 tokens with 16 thoughts
of at most 256, for several numbers of microbatches (a small model, since it does not matter here). `vs_padded` compares
seconds: SmolLM2-135M with random weights, 16 documents of at most 512 tokens, 8 thoughts of at most 64, 8 microbatches.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from timing import finish, median_ratio, take_turns

from rlp_jax.config import Config, RLPConfig
from rlp_jax.data.template import TemplateTokens
from rlp_jax.learner import Learner, Part, Samples
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel

TEMPLATE = TemplateTokens(plain=(), context=(), open=(1,), close=(2,))


class Padded(Learner):
    """The learner as it treats models that cannot be packed."""

    packs = False


def draw(documents: int, group: int, document_tokens: int, thought_tokens: int, vocab_size: int) -> Part:
    """A batch and its thoughts."""
    random = np.random.default_rng(0)
    length_B = np.clip(np.rint(random.lognormal(5.14, 0.36, documents)), 8, document_tokens).astype(np.int32)
    position_B1 = random.integers(1, length_B)[:, None]
    length_B1G = random.lognormal(np.log(thought_tokens / 4), 0.8, (documents, 1, group))
    length_B1G = np.clip(np.rint(length_B1G), 1, thought_tokens).astype(np.int32)
    thought_B1GL = random.integers(3, vocab_size, (documents, 1, group, thought_tokens)).astype(np.int32)
    tokens_BT = random.integers(3, vocab_size, (documents, document_tokens)).astype(np.int32)
    samples = Samples(
        position_B1, np.ones((documents, 1), bool), np.full((documents, 1, 1), -3.0, np.float32), thought_B1GL,
        length_B1G, np.zeros(length_B1G.shape, bool), np.zeros(thought_B1GL.shape, np.float32),
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, Part({"tokens_BT": tokens_BT, "length_B": length_B}, samples, None))


def gradient(kind, model, config, part):
    """(gradient's norm, padding) of the whole batch, compiled."""
    learner = kind(model, TEMPLATE, config)

    @jax.jit
    def run(params, part):
        grads, metrics, _ = learner.gradient(params, None, part)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)))
        return norm, metrics["padding"]

    return lambda params: jax.block_until_ready(run(params, part))


def settings(group: int, thought_tokens: int, microbatches: int) -> Config:
    return Config(rlp=RLPConfig(group_size=group, thought_tokens=thought_tokens, microbatches=microbatches))


def paddings(documents: int) -> dict[str, float]:
    shape = dict(vocab_size=64, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8)
    model = LanguageModel(dataclasses.replace(CONFIGS["smollm2-135m"], **shape))
    params = model.init(jax.random.key(0))
    part = draw(documents, 16, 512, 256, shape["vocab_size"])
    result = {}
    for microbatches in (16, 64, documents):
        for name, kind in (("packed", Learner), ("padded", Padded)):
            _, padding = gradient(kind, model, settings(16, 256, microbatches), part)(params)
            result[f"padding_{name}_{microbatches}"] = round(float(padding), 3)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 of the 30 layers, 128 documents, one round of three")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    args = parser.parse_args()

    result = {"layers": 6 if args.quick else 30} | paddings(128 if args.quick else 512)
    model = LanguageModel(dataclasses.replace(CONFIGS["smollm2-135m"], n_layers=result["layers"], remat="elementwise"))
    params = jax.jit(model.init)(jax.random.key(0))
    part, config = draw(16, 8, 512, 64, model.config.vocab_size), settings(8, 64, 8)
    calls = {name: gradient(kind, model, config, part) for name, kind in (("packed", Learner), ("padded", Padded))}
    norms = {name: call(params) for name, call in calls.items()}
    np.testing.assert_allclose(norms["packed"][0], norms["padded"][0], rtol=1e-3)
    seconds = take_turns({name: lambda call=call: call(params) for name, call in calls.items()}, 1 if args.quick else 3)
    ratio = median_ratio(seconds["padded"], seconds["packed"])
    for name in calls:
        result[f"{name}_seconds"] = round(float(np.median(seconds[name])), 2)
        result[f"{name}_padding"] = round(float(norms[name][1]), 3)
    result["vs_padded"] = round(ratio["median"], 2)
    result["vs_padded_range"] = [round(ratio["min"], 2), round(ratio["max"], 2)]
    finish(result, args.json)


if __name__ == "__main__":
    main()
