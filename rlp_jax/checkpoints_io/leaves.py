# SPDX-License-Identifier: Apache-2.0
"""Leaves of a parameter tree under construction: host buffers of just the pieces this process's devices will hold.

A stacked, sharded leaf is filled layer by layer, then becomes a `jax.Array` without a copy of it as a whole anywhere.
On CPU the buffers themselves become the device's memory (JAX adopts aligned ones).
"""

import dataclasses
import math
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rlp_jax.checkpoints_io.tables import CheckpointError, Tensor
from rlp_jax.sharding import spec_for

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
ALIGNMENT = 64  # bytes, what XLA asks of memory it adopts
BLOCK_ROWS, BLOCK_VALUES = 256, 2**16  # read and transposed at once: few enough rows to stay in the cache
Index = tuple[slice, ...]


class Rows(Protocol):
    """A tensor in a checkpoint: an array, or something that reads the rows that are sliced out of it."""

    def __getitem__(self, rows: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """Where parameters go and in which type: over a mesh, to the default device (None), or (host) to numpy arrays."""

    mesh: Mesh | None = None
    host: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise CheckpointError(f"param_dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.host and self.mesh is not None:
            raise CheckpointError("host and mesh exclude each other: numpy arrays live on no mesh")


HOST = Target(host=True)


@dataclasses.dataclass
class Piece:
    """A part of a leaf and the devices that hold it; `index` has a start and a stop for every axis."""

    index: Index
    buffer: np.ndarray
    devices: list[jax.Device]


class Leaf:
    """One leaf, to be filled by `fill` and taken by `finish`.

    Args:
      tensor: what it holds.
      target: where it goes.
    """

    def __init__(self, tensor: Tensor, target: Target):
        self.tensor, self.target, self.sharding = tensor, target, None
        self.shape = tensor.shape if tensor.layers is None else (len(tensor.layers), *tensor.shape)
        whole = tuple(slice(0, n) for n in self.shape)
        places: dict[tuple, tuple[Index, list]] = {}
        if target.mesh is None:
            places[()] = (whole, [])
        else:
            self.sharding = NamedSharding(target.mesh, spec_for(tensor.name.path, self.shape, target.mesh))
            for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
                full = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))
                places.setdefault(tuple((s.start, s.stop) for s in full), (full, []))[1].append(device)
        self.pieces = [
            Piece(index, _aligned(tuple(s.stop - s.start for s in index), DTYPES[target.dtype]), devices)
            for index, devices in places.values()
        ]

    def stored_rows(self, row: int | None) -> tuple[int, int]:
        """Rows [first, last) of the checkpoint's array that the pieces need of this layer; (0, 0) for none."""
        ranges = [_stored_rows(self.tensor, rest) for _, rest in self._of_layer(row)]
        return (min(first for first, _ in ranges), max(last for _, last in ranges)) if ranges else (0, 0)

    def blocks(self, row: int | None) -> list[tuple[int, int]]:
        """`stored_rows` in blocks that `fill` takes one by one."""
        first, last = self.stored_rows(row)
        axes = _row_axes(self.tensor)
        if axes is None:
            return [(first, last)] if last > first else []
        inner = math.prod(self.tensor.shape[axes[0] + 1 : axes[1]])
        step = max(BLOCK_ROWS, BLOCK_VALUES // math.prod(self.tensor.stored[1:]))
        step = max(step // inner, 1) * inner
        return [(start, min(start + step, last)) for start in range(first, last, step)]

    def fill(self, row: int | None, stored: np.ndarray, first: int) -> None:
        """Writes one layer into the pieces.

        Args:
          row: of the stacked leaf; None for a leaf that is not stacked.
          stored: rows of the checkpoint's array, in any float type: a range of `blocks` or of `stored_rows`.
          first: which row of the whole array the first one is.
        """
        stored = stored.astype(DTYPES[self.target.dtype], copy=False)  # before the transpose: in the order of memory
        part, axis, start = _to_tree(self.tensor, stored, first)
        for target, rest in self._of_layer(row):
            where = (...,)
            if axis is not None:
                piece, stop = rest[axis], start + part.shape[axis]
                low, high = max(piece.start, start), min(piece.stop, stop)
                if low >= high:
                    continue
                rest = (*rest[:axis], slice(low - start, high - start), *rest[axis + 1 :])
                where = (*[slice(None)] * axis, slice(low - piece.start, high - piece.start))
            target[where] = part[rest]

    def finish(self) -> np.ndarray | jax.Array:
        """The leaf; its buffers are given away."""
        pieces, self.pieces = self.pieces, []
        if self.target.host:
            return pieces[0].buffer
        if self.sharding is None:
            return jax.block_until_ready(jax.device_put(pieces[0].buffer))
        arrays = []
        for piece in pieces:
            for n, device in enumerate(piece.devices):
                # A CPU adopts the buffer: simulated devices get memory of their own.
                buffer = _copy(piece.buffer) if n and device.platform == "cpu" else piece.buffer
                arrays.append(jax.device_put(buffer, device))
        whole = jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)
        return jax.block_until_ready(whole)  # the buffers of an accelerator's host are free after this

    def _of_layer(self, row: int | None) -> list[tuple[np.ndarray, Index]]:
        """(buffer, index within the layer) of each piece that holds a part of this layer."""
        if row is None:
            return [(piece.buffer, piece.index) for piece in self.pieces]
        return [
            (piece.buffer[row - piece.index[0].start], piece.index[1:])
            for piece in self.pieces
            if piece.index[0].start <= row < piece.index[0].stop
        ]


def _row_axes(tensor: Tensor) -> tuple[int, int] | None:
    """The axes [first, last) of the tree's array that a checkpoint's rows run over, None if no axes do."""
    shape, rows = tensor.shape, tensor.stored[0]
    if tensor.transposed:
        return next(((k, len(shape)) for k in range(1, len(shape)) if math.prod(shape[k:]) == rows), None)
    return next(((0, k) for k in range(1, len(shape) + 1) if math.prod(shape[:k]) == rows), None)


def _stored_rows(tensor: Tensor, index: Index) -> tuple[int, int]:
    """Rows that hold a part of the tree's array: a range where only the outermost of the row axes is cut, else all."""
    everything = (0, tensor.stored[0])
    axes = _row_axes(tensor)
    if axes is None:
        return everything
    first, last = axes
    if any(index[k] != slice(0, tensor.shape[k]) for k in range(first + 1, last)):
        return everything
    inner = math.prod(tensor.shape[first + 1 : last])
    return index[first].start * inner, index[first].stop * inner


def _to_tree(tensor: Tensor, stored: np.ndarray, first: int) -> tuple[np.ndarray, int | None, int]:
    """Rows of a checkpoint's array as the tree has them: (array, axis that starts later, where it starts)."""
    if len(stored) == tensor.stored[0]:
        return tensor.to_tree(stored), None, 0
    axis, last = _row_axes(tensor)
    inner = math.prod(tensor.shape[axis + 1 : last])
    shape = (*tensor.shape[:axis], len(stored) // inner, *tensor.shape[axis + 1 :])
    return dataclasses.replace(tensor, shape=shape, stored=stored.shape).to_tree(stored), axis, first // inner


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(array: np.ndarray) -> np.ndarray:
    copy = _aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
