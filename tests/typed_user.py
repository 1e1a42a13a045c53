# SPDX-License-Identifier: Apache-2.0
"""A small typed program of a user of the package. test_typing.py has the type checker read it, nobody runs it."""

from typing import Any

import jax
import jax.numpy as jnp

import rlp_jax
from rlp_jax import objective
from rlp_jax.config import Config, RLPConfig
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.cache import Cache, fork
from rlp_jax.models.transformer import LanguageModel


def loss(s_pred_G: jax.Array, s_ema: jax.Array, logprob_GL: jax.Array, mask_GL: jax.Array) -> jax.Array:
    reward_G: jax.Array = objective.information_gain(s_pred_G, s_ema)
    advantage_G = objective.group_relative_advantage(reward_G)
    ratio_GL = objective.importance_ratio(logprob_GL, logprob_GL, mask_GL)
    return objective.clipped_surrogate(ratio_GL, advantage_G, mask_GL).mean()


def logits(model: LanguageModel, params: dict[str, Any], tokenizer: Tokenizer, text: str) -> tuple[jax.Array, Cache]:
    logits_BTV, cache = model.apply(params, jnp.array([tokenizer.encode(text)]))
    return logits_BTV, fork(cache, jnp.array([[1, 2]]), capacity=4)


def settings() -> Config:
    return Config(name="mine", model="quickstart", steps=3, rlp=RLPConfig(group_size=4))


def main() -> None:
    model, params, tokenizer = rlp_jax.load("quickstart")
    print(logits(model, params, tokenizer, "c flip turn swap ="), settings().rlp.group_size)
