# SPDX-License-Identifier: Apache-2.0
"""Where arrays inside a model live when its program runs over a mesh: documents over some axes, heads over another.

The model knows no mesh. It says what an axis of an array holds, and this module asks JAX for the mesh in context, which
`rlp_jax.sharding.over` puts there; where there is none, nothing happens. Numbers do not depend on it.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# What an array's axis holds, and the mesh axes it is split over (those that exist; all of them, if they divide it).
# Devices along 'rollout' have documents of their own, except while decoding: then they share documents and split heads.
DOCUMENTS = ("slice", "data", "fsdp", "rollout")
HEADS = VOCABULARY = ("tensor",)
_WHILE_DECODING = {DOCUMENTS: ("slice", "data", "fsdp"), HEADS: ("rollout", "tensor")}
_decoding = contextvars.ContextVar("decoding", default=False)


@contextlib.contextmanager
def decoding():
    """What is traced inside is laid out for decoding."""
    token = _decoding.set(True)
    try:
        yield
    finally:
        _decoding.reset(token)


def _names(wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh's axes for what an array's axis holds."""
    wanted = _WHILE_DECODING.get(wanted, wanted) if _decoding.get() else wanted
    return tuple(name for name in mesh_axes() if name in (wanted or ()))


def mesh_axes() -> dict[str, int]:
    """Name and size of the axes that the compiler lays arrays over: none without a mesh or inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }


def spec(shape: tuple[int, ...], *axes: tuple[str, ...] | None) -> P:
    """The PartitionSpec of an array whose first axes hold DOCUMENTS, HEADS and so on, or (None) something never split.

    What does not divide an axis leaves it whole.
    """
    sizes = mesh_axes()
    entries = []
    for size, wanted in zip(shape, axes, strict=False):
        names = _names(wanted)
        split = names and size % math.prod(sizes[name] for name in names) == 0
        entries.append(names if split else None)
    return P(*entries)


def constrain(tree: Any, *axes: tuple[str, ...] | None) -> Any:
    """The same arrays, laid over the mesh by their first axes; the others are whole on every device."""
    if not mesh_axes():
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec(x.shape, *axes)), tree)


def on_shards(
    function: Callable, in_specs: tuple[P, ...], out_specs: Any, axes: tuple[str, ...] | None = None
) -> Callable:
    """`function` on every device's own part of its arrays, for what the compiler cannot split well: loops over
    documents, and kernels. With `axes` they are split over these, and the compiler lays them over the others."""
    names = frozenset(mesh_axes() if axes is None else _names(axes))
    if not names:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)
