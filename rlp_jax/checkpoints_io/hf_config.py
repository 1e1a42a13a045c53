# SPDX-License-Identifier: Apache-2.0
"""config.json of Hugging Face model directories to `ModelConfig`, and back."""

from typing import Any

from rlp_jax.checkpoints_io import nemotron_h
from rlp_jax.checkpoints_io.hf_fields import check_types
from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.checkpoints_io.safetensors_file import shown
from rlp_jax.checkpoints_io.tables import STRUCTURE
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.layers import RopeScaling
from rlp_jax.models.transformer import ModelConfig

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# What the reference implementations assume where config.json says nothing.
_DEFAULTS = {
    "llama": {"positions": 2_048},
    "qwen3": {"positions": 32_768, "head_dim": 128, "n_kv_heads": 32},
    "qwen2": {"positions": 32_768, "n_kv_heads": 32},
    "gemma3_text": {"positions": 131_072, "head_dim": 256, "n_kv_heads": 4},
}
_ROPE_FIELDS = {  # of RopeScaling -> of config.json, for the kinds that are supported
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_positions": "original_max_position_embeddings",
    },
}
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
    check_types(fields, source)
    family = fields.get("model_type")
    if family == "gemma3":
        raise CheckpointError(
            f"{source}: model_type 'gemma3' reads images too and is not supported: export its language model "
            "(model_type gemma3_text, tensors model.layers...)"
        )
    if family == nemotron_h.MODEL_TYPE:
        return nemotron_h.config_from_json(fields, source)
    if family not in MODEL_TYPES:
        kind, supported = shown(repr(family)), ", ".join((*MODEL_TYPES, nemotron_h.MODEL_TYPE))
        raise CheckpointError(f"{source}: model_type {kind} is not supported; supported: {supported}")
    _refuse_unsupported(fields, source)
    sizes = {ours: _positive_int(fields, theirs, source) for ours, theirs in _KEY_NAMES.items()}
    n_heads = sizes["n_heads"]
    default = {"n_kv_heads": n_heads, "head_dim": sizes["d_model"] // n_heads, **_DEFAULTS[family]}
    rope_theta, rope_scaling, extra = _rope(fields, source)
    if local_layers := _local_layers(fields, sizes["n_layers"], source):
        extra |= {"local_layers": local_layers, "window": _positive_int(fields, "sliding_window", source, 4_096)}
    if family == "gemma3_text":
        extra["query_scalar"] = _positive_int(fields, "query_pre_attn_scalar", source, 256)
    eps, tie_embeddings = fields.get("rms_norm_eps"), fields.get("tie_word_embeddings")  # null as well: the default
    return checked(
        ModelConfig(
            family=family,
            **sizes,
            **STRUCTURE[family],
            **extra,
            n_kv_heads=_positive_int(fields, "num_key_value_heads", source, default["n_kv_heads"]),
            head_dim=_positive_int(fields, "head_dim", source, default["head_dim"]),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            norm_eps=1e-6 if eps is None else float(eps),
            tie_embeddings=family == "gemma3_text" if tie_embeddings is None else bool(tie_embeddings),
            max_positions=_positive_int(fields, "max_position_embeddings", source, default["positions"]),
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


def _rope(fields: dict[str, Any], source: str) -> tuple[float, RopeScaling | None, dict[str, Any]]:
    """Base and scaling of the rotary positions, and fields for those of local layers."""
    rope = fields.get("rope_parameters") or {}
    if fields["model_type"] != "gemma3_text":
        theta = rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0
        return float(theta), _scaling({**rope, **(fields.get("rope_scaling") or {})}, fields, source), {}
    everything, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    if _scaling(local, fields, source) is not None:
        raise CheckpointError(f"{source}: rope scaling of sliding_attention layers is not supported")
    theta = everything.get("rope_theta") or fields.get("rope_theta") or 1_000_000.0
    local_theta = float(local.get("rope_theta") or fields.get("rope_local_base_freq") or 10_000.0)
    scaling = _scaling({**everything, **(fields.get("rope_scaling") or {})}, fields, source)
    return float(theta), scaling, {"local_rope_theta": local_theta}


def _scaling(rope: dict[str, Any], fields: dict[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(f"{source}: partial_rotary_factor is not supported")
    if kind == "default":
        return None
    if kind not in _ROPE_FIELDS:
        supported = ", ".join(_ROPE_FIELDS)
        raise CheckpointError(f"{source}: rope scaling {shown(repr(kind))} is not supported; supported: {supported}")
    values = {ours: rope.get(theirs) for ours, theirs in _ROPE_FIELDS[kind].items()}
    if kind == "llama3" and values["original_positions"] is None:
        values["original_positions"] = fields.get("max_position_embeddings")
    for ours, theirs in _ROPE_FIELDS[kind].items():
        value = values[ours]
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            said = f"rope scaling {kind!r} has {theirs} {shown(repr(value))}"
            raise CheckpointError(f"{source}: {said}, expected a positive number")
    scaling = RopeScaling(kind, **{ours: float(value) for ours, value in values.items()})
    if not scaling.low_frequency_factor < scaling.high_frequency_factor:
        raise CheckpointError(f"{source}: rope scaling {kind!r}: low_freq_factor is not below high_freq_factor")
    return scaling


def _local_layers(fields: dict[str, Any], n_layers: int, source: str) -> tuple[int, ...]:
    """The layers with a sliding window: as layer_types says, else by the family's older fields."""
    family = fields["model_type"]
    qwen = family in ("qwen2", "qwen3")
    if types := fields.get("layer_types"):
        if not set(types) <= {"full_attention", "sliding_attention"} or len(types) < n_layers:
            raise CheckpointError(
                f"{source}: layer_types is {shown(repr(types))}, expected full_attention (or sliding_attention, where "
                f"the family has sliding-window attention) for each of {n_layers} layers"
            )
        local = tuple(y for y in range(n_layers) if types[y] == "sliding_attention")
    elif family == "gemma3_text":
        every = _positive_int(fields, "sliding_window_pattern", source, 6)
        local = tuple(y for y in range(n_layers) if (y + 1) % every)
    elif qwen and fields.get("use_sliding_window"):
        local = tuple(range(fields.get("max_window_layers", 28), n_layers))
    else:
        local = ()
    if (local and family != "gemma3_text" and not (qwen and fields.get("use_sliding_window"))) or (
        fields.get("use_sliding_window") and not qwen
    ):
        raise CheckpointError(f"{source}: sliding-window attention is not supported for model_type {family!r}")
    return local


def _refuse_unsupported(fields: dict[str, Any], source: str) -> None:
    allowed = {"gelu_tanh": ("gelu_pytorch_tanh",)}.get(
        STRUCTURE[fields["model_type"]].get("activation"), ("silu", "swish")
    )
    act_key = "hidden_activation" if fields["model_type"] == "gemma3_text" else "hidden_act"
    act = fields.get(act_key) or allowed[0]
    refused = {
        "attention_bias": bool(fields.get("attention_bias")),
        "mlp_bias": bool(fields.get("mlp_bias")),
        f"{act_key} {act!r}": act not in allowed,
        "use_bidirectional_attention": bool(fields.get("use_bidirectional_attention")),
        "attn_logit_softcapping": bool(fields.get("attn_logit_softcapping")),
        "final_logit_softcapping": bool(fields.get("final_logit_softcapping")),
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
    if config.hybrid is not None:
        return nemotron_h.config_to_json(config) | (token_ids(tokenizer) if tokenizer else {})
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
        "attention_bias": False,
        "torch_dtype": "float32",
        **_family_fields(config),
    }
    if config.rope_scaling is not None:
        names = _ROPE_FIELDS[config.rope_scaling.kind]
        values = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in names.items()}
        if "original_max_position_embeddings" in values:
            values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
        fields["rope_scaling"] = {"rope_type": config.rope_scaling.kind, **values}
    return fields | (token_ids(tokenizer) if tokenizer else {})


def _family_fields(config: ModelConfig) -> dict[str, Any]:
    """What only some families' config.json says, and only they can."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    layer_types = [kinds[y in config.local_layers] for y in range(config.n_layers)]
    if config.family == "gemma3_text":
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": config.query_scalar or config.head_dim,
            "rope_local_base_freq": config.local_rope_theta or config.rope_theta,
            "sliding_window": config.window or None,
            "layer_types": layer_types,
        }
    if config.query_scalar is not None or config.local_rope_theta is not None:
        raise CheckpointError(f"family {config.family!r} has no query_scalar and no local_rope_theta to write")
    if config.local_Y is None:
        return {"hidden_act": "silu"}
    if config.family not in ("qwen2", "qwen3"):
        raise CheckpointError(f"family {config.family!r} has no sliding windows to write")
    return {
        "hidden_act": "silu",
        "use_sliding_window": True,
        "sliding_window": config.window,
        "max_window_layers": config.local_layers[0],
        "layer_types": layer_types,
    }


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    eos = list(tokenizer.eos_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_id,
    }
