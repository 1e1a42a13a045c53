# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: next-token loss on responses alone, which the prompts before them make predictable.

A document is a prompt and its response, and its span (`data.span`) is the response. What ends one belongs to it: write
the tokenizer's token into `data.text` and `data.span`. `data/pipeline.py` leaves out examples without a final answer.
"""

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlp_jax.baselines.next_token import Step
from rlp_jax.config import Config
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.transformer import LanguageModel, Params


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    reference_params: Params | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """See `algorithms.Step`; nothing is measured against `reference_params`."""

    def responses(batch):
        return jnp.asarray(batch["span_BT"])

    return Step(model, optimizer, template, config, mesh, responses, config.sft.sequence_tokens)
