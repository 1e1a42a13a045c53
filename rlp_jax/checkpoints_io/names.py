"""One table of tensor names per family, and the two ways through it: checkpoint to parameter tree, and back.

Checkpoints store a linear layer as [out, in] with heads flattened; the tree of ARCHITECTURE.md stores [in, out] with
heads apart and layers stacked. Both are views of the same numbers, so a round trip is exact.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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

FAMILIES: dict[str, tuple[Name, ...]] = {"llama": LLAMA, "qwen3": QWEN3}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of one config. `shape` is one layer's in our tree, `stored` the same in a checkpoint."""

    name: Name
    shape: tuple[int, ...]
    stored: tuple[int, ...]

    @property
    def per_layer(self) -> bool:
        return self.name.path.startswith("layers/")

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
      CheckpointError: a family without a table, or one that contradicts `qk_norm`.
    """
    if config.family not in FAMILIES:
        raise CheckpointError(f"family {config.family!r} has no table of names; supported: {', '.join(FAMILIES)}")
    if config.qk_norm != (config.family == "qwen3"):
        raise CheckpointError(
            f"family {config.family!r} with qk_norm={config.qk_norm} is not a published architecture: "
            "qwen3 has qk_norm, llama has not"
        )
    D, V, F, E = config.d_model, config.vocab_size, config.d_ff, config.head_dim
    N, M = config.n_heads, config.n_kv_heads
    shapes = {
        "embed/embedding": (V, D),
        "layers/attention/q/kernel": (D, N, E),
        "layers/attention/k/kernel": (D, M, E),
        "layers/attention/v/kernel": (D, M, E),
        "layers/attention/o/kernel": (N, E, D),
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
        else:
            stored = shape
        result.append(Tensor(name, shape, stored))
    return tuple(result)


def assemble(
    config: ModelConfig,
    layout: str,
    found: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    source: str,
) -> Params:
    """Builds the parameter tree (numpy float32) from a checkpoint's tensors, holding one tensor twice at most.

    Args:
      config: what the checkpoint should hold.
      layout: "huggingface" or "gguf", the column of the table to use.
      found: shape of every tensor in the checkpoint, by name.
      read: gives one tensor by name, any float dtype.
      source: the file or directory, for messages.

    Raises:
      CheckpointError: tensors that are missing, surplus, of the wrong shape, or not finite. Names and shapes are
        checked before anything is read.
    """
    plan = [
        (tensor, layer, getattr(tensor.name, layout).format(layer))
        for tensor in tensors(config)
        for layer in (range(config.n_layers) if tensor.per_layer else [None])
    ]
    check_names(found, {name for _, _, name in plan}, source)
    for tensor, _, name in plan:
        if tuple(found[name]) != tensor.stored:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(found[name])}, the configuration needs {list(tensor.stored)}"
            )
    params: Params = {}
    for tensor, layer, name in plan:
        stored = read(name)
        if not np.isfinite(stored).all():
            raise CheckpointError(f"{source}: tensor {name} holds values that are not finite: the file is damaged")
        *parents, last = tensor.name.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        if layer is None:
            node[last] = np.ascontiguousarray(tensor.to_tree(stored), dtype=np.float32)
        else:
            if last not in node:
                node[last] = np.empty((config.n_layers, *tensor.shape), np.float32)
            node[last][layer] = tensor.to_tree(stored)
    return params


def check_names(found: Mapping[str, Any], expected: set[str], source: str) -> None:
    """Raises CheckpointError naming the first missing and surplus tensors."""
    missing, surplus = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing:
        raise CheckpointError(f"{source}: {_some(missing)} missing from the weights")
    biases = [name for name in surplus if name.endswith(".bias")]
    if biases:
        raise CheckpointError(f"{source}: {_some(biases)} found, but layers with a bias are not supported")
    if surplus:
        raise CheckpointError(f"{source}: {_some(surplus)} found, which this architecture does not have")


def disassemble(config: ModelConfig, params: Params) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """The Hugging Face view of a parameter tree: (name, shape, function that gives the float32 array), in file order.

    The arrays are made one at a time, when asked for.

    Raises:
      CheckpointError: a tree that does not fit the config.
    """
    leaves = dict(_flatten(params))
    table = tensors(config)
    for path in leaves.keys() - {tensor.name.path for tensor in table}:
        raise CheckpointError(f"parameters: {path} does not belong to a {config.family} model of this configuration")
    result = []
    for tensor in table:
        path = tensor.name.path
        if path not in leaves:
            raise CheckpointError(f"parameters: {path} is missing")
        shape = (config.n_layers, *tensor.shape) if tensor.per_layer else tensor.shape
        if tuple(leaves[path].shape) != shape:
            raise CheckpointError(
                f"parameters: {path} has shape {list(leaves[path].shape)}, the configuration needs {list(shape)}"
            )
        for layer in range(config.n_layers) if tensor.per_layer else [None]:
            name = tensor.name.huggingface.format(layer)
            result.append((name, tensor.stored, _reader(tensor, leaves[path], layer)))
    return result


def _reader(tensor: Tensor, leaf: Any, layer: int | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.asarray(leaf if layer is None else leaf[layer], dtype=np.float32)
        return np.ascontiguousarray(tensor.to_stored(array))

    return read


def _flatten(tree: Params, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"tensor {shown}" if len(names) == 1 else f"tensors {shown}"
