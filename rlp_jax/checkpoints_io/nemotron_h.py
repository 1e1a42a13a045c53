# SPDX-License-Identifier: Apache-2.0
"""config.json of Nemotron-H, and the two styles of its checkpoints.

Published checkpoints say hybrid_override_pattern and backbone.*; transformers 5 may say layers_block_type and model.*.
Both are read. The published style is written: transformers 5 loads it too.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from rlp_jax.checkpoints_io.safetensors_file import shown
from rlp_jax.checkpoints_io.tables import CheckpointError
from rlp_jax.models.blocks import ModelConfig
from rlp_jax.models.mamba2 import HybridConfig

MODEL_TYPE = "nemotron_h"
MOST_LAYERS = 512
ARCHITECTURE = "NemotronHForCausalLM"
BLOCK_TYPES = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
_OLDER_TYPES = {"mamba": "M", "attention": "*", "moe": "E"}
Value = TypeVar("Value")


def published_names(found: Mapping[str, Value]) -> dict[str, Value]:
    """Tensors by the names of published checkpoints, whichever of the two styles these have."""
    renamed = {}
    for name, value in found.items():
        published = "backbone." + name.removeprefix("model.") if name.startswith("model.") else name
        renamed[name if published in found else published] = value
    return renamed


def config_from_json(fields: dict[str, Any], source: str) -> ModelConfig:
    """A `ModelConfig` from the fields of config.json, whose types have been checked.

    Raises:
      CheckpointError: a missing field, numbers that do not fit each other, or a feature the model does not have.
    """

    def size(key: str, default: int | None = None) -> int:
        value = fields.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{source}: field {key} is missing")
        return value

    pattern = _pattern(fields, source)
    _refuse_unsupported(fields, source)
    groups = fields.get("mamba_n_groups") or size("n_groups", 8)
    hybrid = HybridConfig(
        pattern=pattern,
        heads=size("mamba_num_heads", 128),
        head_dim=size("mamba_head_dim", 64),
        state_size=size("ssm_state_size", 128),
        groups=groups,
        conv_kernel=fields.get("mamba_d_conv") or size("conv_kernel", 4),
        conv_bias=fields.get("use_conv_bias") is not False,
        chunk_size=fields.get("mamba_chunk_size") or size("chunk_size", 128),
        time_step_limit=_time_step_limit(fields, source),
    )
    n_heads, n_kv_heads = size("num_attention_heads", 32), size("num_key_value_heads", 8)
    if hybrid.heads % groups:
        raise CheckpointError(f"{source}: {hybrid.heads} Mamba heads cannot share {groups} groups (n_groups) evenly")
    if n_heads % n_kv_heads:
        raise CheckpointError(f"{source}: {n_heads} query heads cannot share {n_kv_heads} key/value heads evenly")
    eps = fields.get("layer_norm_epsilon")
    eps = fields.get("rms_norm_eps") if eps is None else eps
    return ModelConfig(
        family=MODEL_TYPE,
        vocab_size=size("vocab_size"),
        d_model=size("hidden_size"),
        n_layers=len(pattern),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=size("head_dim", fields.get("attention_head_dim") or 128),
        d_ff=size("intermediate_size"),
        rope_theta=None,
        norm_eps=1e-5 if eps is None else float(eps),
        tie_embeddings=False,
        hybrid=hybrid,
        max_positions=size("max_position_embeddings", 4_096),
    )


def _pattern(fields: dict[str, Any], source: str) -> str:
    if types := fields.get("layers_block_type") or fields.get("layer_types"):
        known = BLOCK_TYPES | _OLDER_TYPES
        if unknown := sorted(set(types) - known.keys()):
            kind = shown(repr(unknown[0]))
            raise CheckpointError(f"{source}: layer type {kind} is not supported; supported: {', '.join(known)}")
        pattern = "".join(known[kind] for kind in types)
    elif not (pattern := fields.get("hybrid_override_pattern") or ""):
        raise CheckpointError(
            f"{source}: neither layers_block_type nor hybrid_override_pattern says what the layers are"
        )
    if len(pattern) > MOST_LAYERS:
        raise CheckpointError(f"{source}: the pattern has {len(pattern)} layers, more than {MOST_LAYERS}")
    if "E" in pattern:
        raise CheckpointError(f"{source}: mixture-of-experts layers ('E' in the pattern, moe) are not supported")
    if unknown := sorted(set(pattern) - set(BLOCK_TYPES.values())):
        raise CheckpointError(f"{source}: hybrid_override_pattern has {unknown[0]!r}; supported: M, * and -")
    depth = fields.get("num_hidden_layers")
    if depth is not None and depth != len(pattern):
        raise CheckpointError(f"{source}: num_hidden_layers is {depth}, but the pattern has {len(pattern)} layers")
    return pattern


def _time_step_limit(fields: dict[str, Any], source: str) -> tuple[float, float]:
    """transformers 5 writes infinity as an object, others as Infinity or as a text."""
    limit = fields.get("time_step_limit")
    if limit is None:
        return 0.0, math.inf
    try:
        low, high = (float(value["__float__"] if isinstance(value, dict) else value) for value in limit)
    except (TypeError, ValueError, KeyError):
        low = high = math.nan
    if not 0 <= low < high:
        raise CheckpointError(
            f"{source}: time_step_limit is {shown(repr(limit))}, expected two numbers, 0 <= low < high"
        )
    return low, high


def _refuse_unsupported(fields: dict[str, Any], source: str) -> None:
    flags = ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "num_nextn_predict_layers")
    flags = (*flags, "tie_word_embeddings")  # transformers would not tie them either
    activations = {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
    refused = {key: bool(fields.get(key)) for key in flags}
    refused |= {f"{key} {fields.get(key)!r}": fields.get(key) not in (None, act) for key, act in activations.items()}
    refused["quantization_config (load the unquantised weights)"] = bool(fields.get("quantization_config"))
    for feature, present in refused.items():
        if present:
            raise CheckpointError(f"{source}: {feature} is not supported")


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json from which transformers 5 builds the same function.

    Its prefill raises steps below time_step_min to it (its decoding does not), where published code keeps to
    time_step_limit. So time_step_min is written as the limit's lower end, as a number too small to matter for 0. An
    upper limit, which no published model has, transformers ignores. JSON knows no infinity: transformers' way of
    saying it is used only where the default (0, infinity) will not do.
    """
    h = config.hybrid
    low, high = h.time_step_limit
    limit = [low, {"__float__": "Infinity"} if high == math.inf else high]
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "hybrid_override_pattern": h.pattern,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "mlp_hidden_act": "relu2",
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_num_heads": h.heads,
        "mamba_head_dim": h.head_dim,
        "ssm_state_size": h.state_size,
        "n_groups": h.groups,
        "conv_kernel": h.conv_kernel,
        "use_conv_bias": h.conv_bias,
        "chunk_size": h.chunk_size,
        "mamba_hidden_act": "silu",
        "time_step_min": low or 1e-30,
        **({} if h.time_step_limit == (0.0, math.inf) else {"time_step_limit": limit}),
        "layer_norm_epsilon": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
