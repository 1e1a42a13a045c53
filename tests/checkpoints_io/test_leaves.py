# SPDX-License-Identifier: Apache-2.0
"""Every piece of every leaf, filled from the checkpoint's rows that it needs, equals the slice it stands for."""

import dataclasses

import numpy as np
import pytest

from rlp_jax.checkpoints_io import leaves
from rlp_jax.checkpoints_io.leaves import ALIGNMENT, Leaf, Piece, Target
from rlp_jax.checkpoints_io.tables import CheckpointError, tensors


def halves(n):
    return (slice(0, n), slice(0, n // 2), slice(n // 2, n))


def test_any_piece_from_the_rows_it_needs(model):
    rng = np.random.default_rng(0)
    fewer = 0
    for tensor in tensors(model.config):
        layers = [None] if tensor.layers is None else range(len(tensor.layers))
        stored = {row: rng.normal(size=tensor.stored).astype(np.float32) for row in layers}
        whole = [tensor.to_tree(stored[row]) for row in layers]
        whole = whole[0] if tensor.layers is None else np.stack(whole)
        for axis in range(whole.ndim):
            for part in halves(whole.shape[axis]):
                index = tuple(part if k == axis else slice(0, n) for k, n in enumerate(whole.shape))
                leaf = Leaf(tensor, Target(host=True))
                leaf.pieces = [Piece(index, np.full(whole[index].shape, np.nan, np.float32), [])]
                for row in layers:
                    first, last = leaf.stored_rows(row)
                    if tensor.layers is not None and axis == 0 and not part.start <= row < part.stop:
                        assert first == last
                    else:
                        leaf.fill(row, stored[row][first:last], first)
                    fewer += 0 < last - first < tensor.stored[0]
                np.testing.assert_array_equal(leaf.finish(), whole[index])
    assert fewer > 20


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_block_by_block(model, monkeypatch, rows):
    """Blocks of all sizes cover the rows once, and pieces of other sizes than theirs are filled from them."""
    monkeypatch.setattr(leaves, "BLOCK_ROWS", rows)
    monkeypatch.setattr(leaves, "BLOCK_VALUES", 1)
    rng = np.random.default_rng(0)
    for tensor in tensors(model.config):
        stored = rng.normal(size=tensor.stored).astype(np.float32)
        whole = tensor.to_tree(stored)
        tensor = dataclasses.replace(tensor, layers=None)
        for axis in range(whole.ndim):
            n = whole.shape[axis]
            for part in (slice(0, n), slice(0, n // 2), slice(n // 3, 2 * n // 3), slice(n - 1, n)):
                index = tuple(part if k == axis else slice(0, m) for k, m in enumerate(whole.shape))
                leaf = Leaf(tensor, Target(host=True))
                leaf.pieces = [Piece(index, np.full(whole[index].shape, np.nan, np.float32), [])]
                ends = [last for _, last in leaf.blocks(None)]
                assert [first for first, _ in leaf.blocks(None)][1:] == ends[:-1]
                for first, last in leaf.blocks(None):
                    leaf.fill(None, stored[first:last], first)
                np.testing.assert_array_equal(leaf.finish(), whole[index])


def test_two_pieces_share_one_reading(model):
    """Quarters of the vocabulary of a process with two devices: the range that holds both."""
    tensor = next(t for t in tensors(model.config) if t.name.path == "embed/embedding")
    V, D = tensor.shape
    stored = np.random.default_rng(0).normal(size=(V, D)).astype(np.float32)
    leaf = Leaf(tensor, Target(host=True))
    parts = [slice(V // 4, V // 2), slice(V // 2, 3 * V // 4)]
    leaf.pieces = [Piece((part, slice(0, D)), np.empty((V // 4, D), np.float32), []) for part in parts]
    pieces = leaf.pieces
    assert leaf.stored_rows(None) == (V // 4, 3 * V // 4)
    leaf.fill(None, stored[V // 4 : 3 * V // 4], V // 4)
    for piece, part in zip(pieces, parts, strict=True):
        np.testing.assert_array_equal(piece.buffer, stored[part])


def test_buffers_can_be_adopted_by_the_cpu(model):
    for tensor in tensors(model.config):
        leaf = Leaf(tensor, Target())
        buffer = leaf.pieces[0].buffer
        buffer[...] = 1
        assert buffer.ctypes.data % ALIGNMENT == 0
        assert leaf.finish().unsafe_buffer_pointer() == buffer.ctypes.data


def test_targets_that_cannot_be():
    with pytest.raises(CheckpointError, match="param_dtype is 'int8', expected one of float32, bfloat16"):
        Target(dtype="int8")
    with pytest.raises(CheckpointError, match="host and mesh exclude each other"):
        dataclasses.replace(Target(host=True), mesh="mesh")
