# SPDX-License-Identifier: Apache-2.0
"""Checkpoint to parameter tree, and back, through the tables of names."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlp_jax.checkpoints_io.leaves import HOST, Leaf, Rows, Target
from rlp_jax.checkpoints_io.safetensors_file import is_finite, shown
from rlp_jax.checkpoints_io.tables import CheckpointError, Params, Tensor, tensors
from rlp_jax.models.transformer import ModelConfig


def assemble(
    config: ModelConfig,
    layout: str,
    found: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Rows],
    source: str,
    target: Target = HOST,
) -> Params:
    """Builds the parameter tree from a checkpoint's tensors, each leaf in its place, with one tensor besides at most.

    Args:
      config: what the checkpoint should hold.
      layout: "huggingface" or "gguf", the column of the table to use.
      found: shape of every tensor in the checkpoint, by name.
      read: gives one tensor by name: an array of any float dtype, or something that reads rows when they are sliced
        out of it; then memory holds some rows, and shards read what they need.
      source: the file or directory, for messages.
      target: where the parameters go, by default numpy float32.

    Raises:
      CheckpointError: tensors that are missing, surplus, of the wrong shape, or not finite. Names and shapes are
        checked before anything is read.
    """
    check(config, layout, found, source)
    params: Params = {}
    for tensor in tensors(config):
        leaf = Leaf(tensor, target)
        for row, layer in _rows(tensor):
            name = getattr(tensor.name, layout).format(layer)
            blocks = leaf.blocks(row)
            stored = read(name) if blocks else None
            for first, last in blocks:
                block = np.asarray(stored[first:last])
                if not is_finite(block):
                    raise CheckpointError(
                        f"{source}: tensor {name} holds values that are not finite: the file is damaged"
                    )
                leaf.fill(row, block, first)
            del stored
        *parents, last_key = tensor.name.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last_key] = leaf.finish()
    return params


def check(config: ModelConfig, layout: str, found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises CheckpointError unless a checkpoint's tensors are exactly those of the config; arguments of `assemble`."""
    expected = {
        getattr(tensor.name, layout).format(layer): tensor.stored
        for tensor in tensors(config)
        for _, layer in _rows(tensor)
    }
    check_names(found, set(expected), source)
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {list(found[name])}, the configuration needs {list(shape)}"
            )


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
        shape = tensor.shape if tensor.layers is None else (len(tensor.layers), *tensor.shape)
        if tuple(leaves[path].shape) != shape:
            raise CheckpointError(
                f"parameters: {path} has shape {list(leaves[path].shape)}, the configuration needs {list(shape)}"
            )
        for row, layer in _rows(tensor):
            name = tensor.name.huggingface.format(layer)
            result.append((name, tensor.stored, _reader(tensor, leaves[path], row)))
    return result


def _rows(tensor: Tensor) -> list[tuple[int | None, int | None]]:
    """(row of the stacked leaf, layer of the model) for each of a tensor's layers."""
    return [(None, None)] if tensor.layers is None else list(enumerate(tensor.layers))


def _reader(tensor: Tensor, leaf: Any, row: int | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        array = np.asarray(leaf if row is None else leaf[row], dtype=np.float32)
        return np.ascontiguousarray(tensor.to_stored(array))

    return read


def _flatten(tree: Params, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _some(names: list[str]) -> str:
    some = ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"tensor {some}" if len(names) == 1 else f"tensors {some}"
