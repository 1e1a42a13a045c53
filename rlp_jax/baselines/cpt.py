# SPDX-License-Identifier: Apache-2.0
"""Continued pretraining, RLP's rival: next-token loss on every token of the same documents.

Appendix of arXiv 2510.01265; how much of it RLP is compared with, `aot/matching.py` computes.
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

    def every_token(batch):
        return jnp.ones(batch["tokens_BT"].shape, bool)

    return Step(model, optimizer, template, config, mesh, every_token, config.cpt.sequence_tokens)
