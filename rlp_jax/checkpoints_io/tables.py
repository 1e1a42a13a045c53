# SPDX-License-Identifier: Apache-2.0
"""Which tensors each family has: one table of names per family, with shapes here and in checkpoints.

Checkpoints store a linear layer as [out, in] with heads flattened; the tree of ARCHITECTURE.md stores [in, out] with
heads apart and layers stacked. Both are views of the same numbers, so a round trip is exact.
"""

import dataclasses
from typing import Any

import numpy as np

from rlp_jax.models.hybrid import layer_name, segments
from rlp_jax.models.transformer import ModelConfig

Params = dict[str, Any]


class CheckpointError(ValueError):
    """Weights that cannot be read or written: one line naming the file, the tensor or field, and what to do."""


@dataclasses.dataclass(frozen=True)
class Name:
    """Where one parameter lives: its path in the tree, in Hugging Face files and in GGUF files ({} is the layer)."""

    path: str
    huggingface: str
    gguf: str


LLAMA = (
    Name("embed/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    Name("layers/attention_norm/scale", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    Name("layers/attention/q/kernel", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    Name("layers/attention/k/kernel", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    Name("layers/attention/v/kernel", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    Name("layers/attention/o/kernel", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    Name("layers/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    Name("layers/mlp/gate/kernel", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    Name("layers/mlp/up/kernel", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    Name("layers/mlp/down/kernel", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    Name("final_norm/scale", "model.norm.weight", "output_norm.weight"),
    Name("head/kernel", "lm_head.weight", "output.weight"),
)

QWEN3 = (
    *LLAMA,
    Name("layers/attention/q_norm/scale", "model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    Name("layers/attention/k_norm/scale", "model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
)

QWEN2 = (
    *LLAMA,
    Name("layers/attention/q/bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    Name("layers/attention/k/bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    Name("layers/attention/v/bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
)

# Gemma calls the norm before the MLP otherwise, and has one after each half of a layer.
GEMMA3 = (
    *(name for name in QWEN3 if name.path != "layers/mlp_norm/scale"),
    Name("layers/mlp_norm/scale", "model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"),
    Name(
        "layers/post_attention_norm/scale",
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.post_attention_norm.weight",
    ),
    Name(
        "layers/post_mlp_norm/scale",
        "model.layers.{}.post_feedforward_layernorm.weight",
        "blk.{}.post_ffw_norm.weight",
    ),
)

FAMILIES: dict[str, tuple[Name, ...]] = {"llama": LLAMA, "qwen3": QWEN3, "qwen2": QWEN2, "gemma3_text": GEMMA3}

# What the family's name alone says of the decoder.
STRUCTURE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "qwen2": {"qkv_bias": True},
    "gemma3_text": {
        "qk_norm": True,
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "scale_embeddings": True,
    },
}
_STRUCTURAL = tuple(dict.fromkeys(field for fields in STRUCTURE.values() for field in fields))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of one config. `shape` is one layer's in our tree, `stored` the same in a checkpoint.

    `layers` are the model's layers that the leaf's leading axis stacks, in order; None for a leaf that is not stacked.
    """

    name: Name
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    layers: tuple[int, ...] | None = None

    @property
    def transposed(self) -> bool:
        return self.name.path.endswith("/kernel")

    def to_tree(self, stored: np.ndarray) -> np.ndarray:
        """A checkpoint's array as one layer of the tree (a view)."""
        return (stored.T if self.transposed else stored).reshape(self.shape)

    def to_stored(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `to_tree`."""
        return leaf.reshape(self.stored[::-1]).T if self.transposed else leaf.reshape(self.stored)


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every parameter of a config with its names and shapes.

    Raises:
      CheckpointError: a family without a table, or a config that contradicts its family's `STRUCTURE`.
    """
    if (config.family == "nemotron_h") != (config.hybrid is not None):
        raise CheckpointError(f"family {config.family!r} with hybrid={config.hybrid} is not a published architecture")
    if config.hybrid is not None and config.tie_embeddings:
        raise CheckpointError("family 'nemotron_h' with tie_embeddings=True is not a published architecture")
    if config.hybrid is not None:
        return _hybrid_tensors(config)
    if config.family not in FAMILIES:
        known = ", ".join((*FAMILIES, "nemotron_h"))
        raise CheckpointError(f"family {config.family!r} has no table of names; supported: {known}")
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    for field in _STRUCTURAL if config.family in STRUCTURE else ():
        expected = STRUCTURE[config.family].get(field, defaults[field])
        if getattr(config, field) != expected:
            raise CheckpointError(
                f"family {config.family!r} with {field}={getattr(config, field)!r} is not a published architecture: "
                f"it has {field}={expected!r}"
            )
    D, V, F, E = config.d_model, config.vocab_size, config.d_ff, config.head_dim
    N, M = config.n_heads, config.n_kv_heads
    shapes = {
        "embed/embedding": (V, D),
        "layers/attention/q/kernel": (D, N, E),
        "layers/attention/k/kernel": (D, M, E),
        "layers/attention/v/kernel": (D, M, E),
        "layers/attention/o/kernel": (N, E, D),
        "layers/attention/q/bias": (N, E),
        "layers/attention/k/bias": (M, E),
        "layers/attention/v/bias": (M, E),
        "layers/attention/q_norm/scale": (E,),
        "layers/attention/k_norm/scale": (E,),
        "layers/mlp/gate/kernel": (D, F),
        "layers/mlp/up/kernel": (D, F),
        "layers/mlp/down/kernel": (F, D),
        "head/kernel": (D, V),
    }
    result = []
    for name in FAMILIES[config.family]:
        if name.path == "head/kernel" and config.tie_embeddings:
            continue
        shape = shapes.get(name.path, (D,))
        if name.path == "layers/attention/o/kernel":
            stored = (D, N * E)
        elif name.path.endswith("/kernel"):
            stored = (int(np.prod(shape[1:])), shape[0])
        elif name.path.endswith("/bias"):
            stored = (int(np.prod(shape)),)
        else:
            stored = shape
        layers = tuple(range(config.n_layers)) if name.path.startswith("layers/") else None
        result.append(Tensor(name, shape, stored, layers))
    return tuple(result)


def _hybrid_tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Those of Nemotron-H, segment by segment."""
    D, V, E, N, M = config.d_model, config.vocab_size, config.head_dim, config.n_heads, config.n_kv_heads
    h, F = config.hybrid, config.d_ff
    J, I, W = h.heads, h.channels, h.conv_kernel
    # Place in a layer: (name in checkpoints, shape in the tree, shape in checkpoints).
    mixers = {
        "M": {
            "mixer/in_proj/kernel": ("in_proj.weight", (D, h.width + I + J), (h.width + I + J, D)),
            "mixer/conv/kernel": ("conv1d.weight", (W, I), (I, 1, W)),
            "mixer/conv/bias": ("conv1d.bias", (I,), (I,)),
            "mixer/A_log": ("A_log", (J,), (J,)),
            "mixer/D": ("D", (J,), (J,)),
            "mixer/dt_bias": ("dt_bias", (J,), (J,)),
            "mixer/gate_norm/scale": ("norm.weight", (h.width,), (h.width,)),
            "mixer/out_proj/kernel": ("out_proj.weight", (h.width, D), (D, h.width)),
        },
        "*": {
            "mixer/q/kernel": ("q_proj.weight", (D, N, E), (N * E, D)),
            "mixer/k/kernel": ("k_proj.weight", (D, M, E), (M * E, D)),
            "mixer/v/kernel": ("v_proj.weight", (D, M, E), (M * E, D)),
            "mixer/o/kernel": ("o_proj.weight", (N, E, D), (D, N * E)),
        },
        "-": {
            "mixer/up/kernel": ("up_proj.weight", (D, F), (F, D)),
            "mixer/down/kernel": ("down_proj.weight", (F, D), (D, F)),
        },
    }
    if not h.conv_bias:
        del mixers["M"]["mixer/conv/bias"]
    result, first = [Tensor(Name("embed/embedding", "backbone.embeddings.weight", ""), (V, D), (V, D))], 0
    for s, (unit, repeats) in enumerate(segments(h.pattern)):
        for place, kind in enumerate(unit):
            layers = tuple(first + place + repeat * len(unit) for repeat in range(repeats))
            parts = {"norm/scale": ("norm.weight", (D,), (D,))}
            parts |= {path: (f"mixer.{theirs}", *shapes) for path, (theirs, *shapes) in mixers[kind].items()}
            for path, (theirs, shape, stored) in parts.items():
                ours = f"segments_{s}/{layer_name(unit, place)}/{path}"
                result.append(Tensor(Name(ours, f"backbone.layers.{{}}.{theirs}", ""), shape, stored, layers))
        first += repeats * len(unit)
    result.append(Tensor(Name("final_norm/scale", "backbone.norm_f.weight", ""), (D,), (D,)))
    result.append(Tensor(Name("head/kernel", "lm_head.weight", ""), (D, V), (V, D)))
    return tuple(result)
