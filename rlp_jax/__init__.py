"""RLP, reinforcement as a pretraining objective, in JAX.

    model, params, tokenizer = rlp_jax.load(path_or_preset)
    logits_BTV, cache = model.apply(params, tokens_BT)

`rlp_jax.objective` holds the algorithm alone and needs nothing but jax and chex.
"""

from typing import Any

__all__ = ["fork", "load"]

_HOMES = {"fork": "rlp_jax.models.cache", "load": "rlp_jax.checkpoints_io.load"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for: `rlp --help` and `rlp_jax.objective` stay light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlp_jax' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
