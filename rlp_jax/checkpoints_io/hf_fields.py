# SPDX-License-Identifier: Apache-2.0
"""Types of config.json's fields, checked before any is used: the file may say anything.

Only fields that `hf_config` reads are listed; a null counts as absent, and what else a config.json holds is ignored.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from rlp_jax.checkpoints_io.safetensors_file import shown
from rlp_jax.checkpoints_io.tables import CheckpointError

LARGEST = 2**31 - 1  # of any size
MOST_LAYERS = 4_096


def _integer(value: Any, smallest: int = 1, largest: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def _number(value: Any, smallest: float = 0.0) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:
        return False
    return math.isfinite(value) and value >= smallest


def _token_id(value: Any) -> bool:
    return _integer(value, smallest=-1)  # -1 is how some exports say none


def _one_or_more(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: all(map(check, value)) if isinstance(value, list) else check(value)


_SIZE = (_integer, "a positive integer below 2**31")
_LAYERS = (lambda value: _integer(value, largest=MOST_LAYERS), f"a positive integer of at most {MOST_LAYERS}")
_COUNT = (lambda value: _integer(value, smallest=0), "an integer, 0 or more and below 2**31")
_POSITIVE = (lambda value: _number(value) and value > 0, "a positive number")
_NUMBER = (_number, "a number, 0 or more")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: isinstance(value, str), "a text")
_KINDS = (
    lambda value: (
        isinstance(value, list) and len(value) <= MOST_LAYERS and all(isinstance(kind, str) for kind in value)
    ),
    f"a list of at most {MOST_LAYERS} texts",
)
_TOKENS = (_one_or_more(_token_id), "a token id, or several in a list")

_ROPE = {
    "rope_theta": _POSITIVE,
    "rope_type": _TEXT,
    "type": _TEXT,
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _SIZE,
    "partial_rotary_factor": _NUMBER,
}
FIELDS: dict[str, Any] = {
    "model_type": _TEXT,
    "num_hidden_layers": _LAYERS,
    "max_window_layers": _COUNT,
    "num_nextn_predict_layers": _COUNT,
    "rms_norm_eps": _NUMBER,
    "layer_norm_epsilon": _NUMBER,
    "rope_local_base_freq": _POSITIVE,
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim",
         "max_position_embeddings", "sliding_window", "sliding_window_pattern", "mamba_num_heads", "mamba_head_dim",
         "ssm_state_size", "n_groups", "mamba_n_groups", "conv_kernel", "mamba_d_conv", "chunk_size",
         "mamba_chunk_size", "expand",
         "attention_head_dim"), _SIZE),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_conv_bias", "mamba_proj_bias",
         "use_sliding_window", "use_bidirectional_attention"), _FLAG),
    **dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act", "mamba_hidden_act",
                     "hybrid_override_pattern"), _TEXT),
    **dict.fromkeys(("layer_types", "layers_block_type"), _KINDS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
    **{name: _ROPE[name] for name in ("rope_theta", "partial_rotary_factor")},
    "rope_scaling": _ROPE,
    "rope_parameters": {**_ROPE, "full_attention": _ROPE, "sliding_attention": _ROPE},
}  # fmt: skip


def check_types(fields: Mapping[str, Any], source: str, expected: Mapping[str, Any] = FIELDS, within: str = "") -> None:
    """Checks every known field of a parsed config.json.

    Args:
      fields: its values.
      source: its path, for messages.
      expected: known field -> (check, what it expects), or a table of such for an object.
      within: the names of the objects around it, for messages.

    Raises:
      CheckpointError: the first field of the wrong type or out of bounds.
    """
    for key, kind in expected.items():
        value = fields.get(key)
        if value is None:
            continue
        name = f"{within}{key}"
        if isinstance(kind, Mapping):
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{source}: {name} is {_quoted(value)}, expected an object")
            check_types(value, source, kind, f"{name}.")
        elif not kind[0](value):
            raise CheckpointError(f"{source}: {name} is {_quoted(value)}, expected {kind[1]}")


def _quoted(value: Any) -> str:
    return shown(repr(value))
