# SPDX-License-Identifier: Apache-2.0
"""A tiny Nemotron-H that tests share: a repeated unit with all three kinds of layers, and layers before and after."""

import dataclasses

from rlp_jax.models.mamba2 import HybridConfig
from rlp_jax.models.transformer import LanguageModel, ModelConfig

CONFIG = ModelConfig(
    family="nemotron_h", vocab_size=50, d_model=16, n_layers=7, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20,
    rope_theta=None, tie_embeddings=False,
    hybrid=HybridConfig(pattern="M*-M*-M", heads=4, head_dim=6, state_size=5, groups=2, chunk_size=4),
)  # fmt: skip


def hybrid(pattern: str = CONFIG.hybrid.pattern, **changes) -> LanguageModel:
    """The tiny model with another pattern of layers, or some fields of its `ModelConfig` changed."""
    mixers = dataclasses.replace(CONFIG.hybrid, pattern=pattern)
    return LanguageModel(dataclasses.replace(CONFIG, n_layers=len(pattern), hybrid=mixers, **changes))
