# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 as a Tunix model: its Qwen2 with biases of zero computes the same function as a Llama (Tunix's own Llama 3
has a fixed rotary base), and its loader reads the same Hugging Face directory."""

import json
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params

PAD, NEVER = 0, -1  # prompts hold no 0; an end that no token matches


def config_of(directory: str) -> qwen2.ModelConfig:
    fields = json.loads((pathlib.Path(directory) / "config.json").read_text())
    return qwen2.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=fields["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        use_tied_embedding=True,
    )


def load(directory: str, mesh: jax.sharding.Mesh | None = None) -> tuple[qwen2.Qwen2, qwen2.ModelConfig]:
    """The model in float32, with biases of zero."""
    config = config_of(directory)
    model = qwen2_params.create_model_from_safe_tensors(directory, config, mesh, dtype=jnp.float32, mode="original")
    for layer in model.layers:
        for name in ("q_bias", "k_bias", "v_bias"):
            bias = getattr(layer.attn, name)
            bias.value = jnp.zeros(bias.value.shape, jnp.float32)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model)))
    return model, config


def logits(model: qwen2.Qwen2, tokens: jax.Array) -> jax.Array:
    """Logits of whole sequences [B, T]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.broadcast_to(jnp.tri(tokens.shape[1], dtype=bool), (*tokens.shape, tokens.shape[1]))
    return model(tokens, positions, None, mask)[0]


class Numbers:
    """A tokenizer whose text is the token numbers themselves, for interfaces that take and give strings."""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is added

    def eos_id(self) -> int:
        return NEVER

    def pad_id(self) -> int:
        return PAD
