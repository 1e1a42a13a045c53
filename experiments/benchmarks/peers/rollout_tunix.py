# SPDX-License-Identifier: Apache-2.0
"""Rollouts with Tunix's own sampler (JAX on CPU, float32): the B x G prompts as one batch.

It stops at an end token or at the cap alone, so thoughts of unequal length are all decoded to the longest.
"""

import jax
import jax.numpy as jnp
import tunix_model
from flax import nnx
from protocol import serve
from tunix.generate.sampler import CacheConfig, Sampler


def prepare(job):
    model, config = tunix_model.load(job["directory"])
    tokenizer = tunix_model.Numbers()
    prefix, new = len(job["documents"][0]), max(map(max, job["lengths"]))
    cache = CacheConfig(prefix + new, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, tokenizer, cache)
    prompts = [tokenizer.decode(document) for document in job["documents"] for _ in range(job["group"])]
    useful = sum(map(sum, job["lengths"]))

    def run():
        out = sampler(
            prompts, max_generation_steps=new, max_prompt_length=prefix,
            temperature=job["temperature"], top_p=1.0, eos_tokens=[tunix_model.NEVER],
        )  # fmt: skip
        assert [len(tokens) for tokens in out.tokens] == [new] * len(prompts)
        return useful

    likeliest = nnx.jit(lambda model, tokens: tunix_model.logits(model, tokens)[:, -1].argmax(-1))
    facts = {"next": likeliest(model, jnp.asarray(job["documents"])).tolist(), "jax": jax.__version__}
    return run, facts


if __name__ == "__main__":
    serve(prepare)
