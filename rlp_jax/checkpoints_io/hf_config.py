"""config.json of Hugging Face model directories to `ModelConfig`, and back."""

from typing import Any

from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import ModelConfig

MODEL_TYPES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_KEY_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}


def config_from_json(fields: dict[str, Any], source: str) -> ModelConfig:
    """A `ModelConfig` from the fields of config.json, with the defaults of the reference implementation.

    Args:
      fields: the parsed config.json.
      source: its path, for messages.

    Raises:
      CheckpointError: an unknown architecture, a missing field, or a feature the decoder does not have.
    """
    family = fields.get("model_type")
    if family not in MODEL_TYPES:
        raise CheckpointError(f"{source}: model_type {family!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    _refuse_unsupported(fields, source)
    sizes = {ours: _positive_int(fields, theirs, source) for ours, theirs in _KEY_NAMES.items()}
    n_heads = sizes["n_heads"]
    default_head_dim = 128 if family == "qwen3" else sizes["d_model"] // n_heads
    default_kv_heads = 32 if family == "qwen3" else n_heads
    rope = fields.get("rope_parameters") or {}
    return checked(
        ModelConfig(
            family=family,
            **sizes,
            n_kv_heads=_positive_int(fields, "num_key_value_heads", source, default_kv_heads),
            head_dim=_positive_int(fields, "head_dim", source, default_head_dim),
            rope_theta=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            max_positions=_positive_int(fields, "max_position_embeddings", source, 2_048),
        ),
        source,
    )


def checked(config: ModelConfig, source: str) -> ModelConfig:
    """The config, if its head counts can work."""
    if config.n_heads % config.n_kv_heads:
        raise CheckpointError(
            f"{source}: {config.n_heads} query heads cannot share {config.n_kv_heads} key/value heads evenly"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{source}: head_dim {config.head_dim} is odd, rotary positions need an even one")
    return config


def _refuse_unsupported(fields: dict[str, Any], source: str) -> None:
    rope = {**(fields.get("rope_parameters") or {}), **(fields.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(fields.get("layer_types") or ())
    refused = {
        f"rope scaling {kind!r}": kind != "default",
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        f"hidden_act {fields.get('hidden_act')!r}": fields.get("hidden_act", "silu") not in ("silu", "swish"),
        "sliding-window attention": bool(fields.get("use_sliding_window")) or not layer_types <= {"full_attention"},
        "partial_rotary_factor": rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0,
        "quantization_config (load the unquantised weights)": bool(fields.get("quantization_config")),
    }
    for feature, present in refused.items():
        if present:
            raise CheckpointError(f"{source}: {feature} is not supported")


def _positive_int(fields: dict[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = fields.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{source}: field {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive integer")
    return value


def config_to_json(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The fields of config.json that transformers needs to rebuild the model."""
    fields = {
        "architectures": [MODEL_TYPES[config.family]],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in _KEY_NAMES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
    }
    return fields | (token_ids(tokenizer) if tokenizer else {})


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    eos = list(tokenizer.eos_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_id,
    }
