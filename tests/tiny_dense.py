# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every dense family, the same here and in transformers: for live parity and for goldens."""

import zlib

import numpy as np
import pytest

TINY = {
    # Grouped heads, a head width that is not d_model / heads, tied and untied, unusual theta and epsilon.
    "llama-tied": {"family": "llama", "heads": 8, "kv_heads": 2, "head_dim": 6, "tie": True, "theta": 700.0},
    "llama-untied": {"family": "llama", "heads": 4, "kv_heads": 4, "head_dim": 6, "tie": False, "theta": 10_000.0},
    "qwen3-tied": {"family": "qwen3", "heads": 4, "kv_heads": 1, "head_dim": 16, "tie": True, "theta": 1e6},
    "qwen3-untied": {"family": "qwen3", "heads": 4, "kv_heads": 2, "head_dim": 8, "tie": False, "theta": 5_000.0},
    # Every frequency range of the scaling has members: 64 positions hold 10.2, 2.0, 0.4 and 0.07 turns.
    "llama3-scaling": {
        "family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 8, "tie": False, "theta": 700.0,
        "rope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 64},
    },
    "linear-scaling": {
        "family": "llama", "heads": 4, "kv_heads": 2, "head_dim": 8, "tie": True, "theta": 700.0,
        "rope": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen2": {"family": "qwen2", "heads": 4, "kv_heads": 2, "head_dim": 8, "tie": True, "theta": 1e6},
    "qwen2-window": {
        "family": "qwen2", "heads": 4, "kv_heads": 2, "head_dim": 8, "tie": False, "theta": 1_000.0,
        "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
    },
    # Windows of 7 of 60 tokens, two local layers to a global one; queries not scaled by their own width.
    "gemma3": {
        "family": "gemma3_text", "heads": 4, "kv_heads": 2, "head_dim": 8, "tie": True, "theta": 1e6,
        "sliding_window": 7, "query_pre_attn_scalar": 24, "rope": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
KINDS = {"llama": "Llama", "qwen3": "Qwen3", "qwen2": "Qwen2", "gemma3_text": "Gemma3"}


def draw(name: str, shape, family: str) -> np.ndarray:
    """One tensor of a checkpoint, large enough that attention is far from uniform; a function of its name alone."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(0.0, 0.3, tuple(shape))
    gain = 1.0 if "norm" in name and family != "gemma3_text" else 0.0  # Gemma's norms add the 1 themselves
    return (gain + noise).astype(np.float32)


def reference_model(family, heads, kv_heads, head_dim, tie, theta, rope=None, **fields):
    """A tiny transformers model in float32 with weights large enough that attention is far from uniform."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, gemma = KINDS[family], family == "gemma3_text"
    rope = {"rope_type": "default", **(rope or {}), "rope_theta": theta}
    if gemma:
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
    config = getattr(transformers, f"{kind}TextConfig" if gemma else f"{kind}Config")(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-3, tie_word_embeddings=tie,
        max_position_embeddings=256, rope_parameters=rope, attn_implementation="eager",
        pad_token_id=None,  # torch gives a padding row of the embedding no gradient
        **fields,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, parameter.shape, family)))
    return model


def relative_error(ours, reference) -> float:
    """The largest difference over the largest reference value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
