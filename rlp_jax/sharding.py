# SPDX-License-Identifier: Apache-2.0
"""Where every array lives: a short table maps parameter paths to a PartitionSpec over the mesh ('slice', 'data',
'fsdp', 'tensor'), documents are split over the first three axes, and the compiler does the rest. What it would not find
by itself the model says (`models/constraints.py`), without knowing the mesh: `over` puts it into JAX's context.

Parameters, their average and the optimizer's moments share paths, hence rules. They are replicated over 'slice' and
'data': between slices, whose network is slow, only gradients travel. A dimension that an axis does not divide is
replicated along that axis. On one device there is no mesh: `place_state` and `place_batch` return what they got.
"""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rlp_jax.config import ConfigError, MeshConfig
from rlp_jax.models.cache import Cache
from rlp_jax.models.constraints import DOCUMENTS, HEADS, constrain, decoding
from rlp_jax.models.transformer import cast_kernels

AXES = ("slice", "data", "fsdp", "tensor")
ROLLOUT = "rollout"  # a part of 'fsdp' where `mesh.rollout_tensor` is set

# The first rule whose pattern ends the leaf's path wins; the dimensions are those of ARCHITECTURE.md, layers first.
# A Mamba mixer's in_proj gives z, x, B, C and dt side by side, so shares of its columns are not shares of heads. They
# are a fair share of its memory and its product, though: it is cut regardless, and what it gives is gathered before it
# is taken apart (models/mamba2.py).
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"(attention|mixer)/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"(attention|mixer)/[qkv]/bias", P(None, "tensor", None)),
    (r"(attention|mixer)/o/kernel", P(None, "tensor", None, "fsdp")),
    (r"(mlp|mixer)/(gate|up|in_proj)/kernel", P(None, "fsdp", "tensor")),
    (r"(mlp|mixer)/(down|out_proj)/kernel", P(None, "tensor", "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"scale", P()),
    (r"mixer/(A_log|D|dt_bias|conv/kernel|conv/bias)", P()),  # a few numbers a head or channel
)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Devices along AXES, with -1 resolved to what is left.

    Raises:
      ConfigError: more than one -1, an axis below 1, or a product that is not the number of devices.
    """
    shape = [config.slices, config.data, config.fsdp, config.tensor]
    said = f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}"
    if config.slices != 1:
        said += f" slices={config.slices}"
    if config.slices < 1 or any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ConfigError(f"{said}: axes are 1 or more, and at most one but slices is -1 (what is left)")
    known = math.prod(size for size in shape if size != -1)
    if devices % known or (-1 not in shape and known != devices):
        raise ConfigError(f"{said} needs {'a multiple of ' * (-1 in shape)}{known} devices, there are {devices}")
    slices, data, fsdp, tensor = (devices // known if size == -1 else size for size in shape)
    return slices, data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh | None:
    """The mesh over all devices (or those given), None where there is one device and nothing to shard.

    Devices that know their slice are put in its order, and inside a slice as its wiring suggests.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or TPUs belong to more slices than were said.
    """
    devices = jax.devices() if devices is None else devices
    slices, *shape = mesh_shape(config, len(devices))
    if len(devices) == 1:
        return None
    devices = sorted(devices, key=_slice_of)  # stable
    groups = np.array_split(np.asarray(devices), slices)
    if devices[0].platform == "tpu" and any(len(set(map(_slice_of, group))) > 1 for group in groups):
        found = len(set(map(_slice_of, devices)))
        raise ConfigError(f"mesh.slices is {slices}, the devices belong to {found} slices: set mesh.slices={found}")
    own = [mesh_utils.create_device_mesh(shape, list(group), allow_split_physical_axes=True) for group in groups]
    grid = np.stack(own)
    more = config.rollout_tensor // shape[-1]  # settings.check_devices: no remainder
    if more <= 1:
        return Mesh(grid, AXES)
    return Mesh(grid.reshape(*grid.shape[:2], -1, more, shape[-1]), (*AXES[:-1], ROLLOUT, AXES[-1]))


def _slice_of(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0


def over(mesh: Mesh | AbstractMesh | None) -> contextlib.AbstractContextManager:
    """A context in which functions are traced for this mesh: a model's own constraints then hold."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def mesh_of(tree: chex.ArrayTree) -> Mesh | None:
    """The mesh over which arrays have been placed, None on a single device."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.num_devices > 1 else None


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of one leaf: its rule, less the axes that do not divide its dimensions.

    A leaf without a rule is replicated.
    """
    rule = rule_for(path) or P()
    if len(rule) > len(shape):
        return P()
    axes = []
    for axis, size in zip(rule, shape, strict=False):
        names = ("fsdp", ROLLOUT) if axis == "fsdp" and ROLLOUT in mesh.shape else (axis,)
        divides = axis and size % math.prod(mesh.shape[name] for name in names) == 0
        axes.append((names if len(names) > 1 else axis) if divides else None)
    return P(*axes)


def rule_for(path: str) -> P | None:
    return next((spec for pattern, spec in RULES if re.search(rf"(^|/){pattern}$", path)), None)


def state_shardings(abstract_state: chex.ArrayTree, mesh: Mesh) -> chex.ArrayTree:
    """A NamedSharding for each leaf of a state (or of bare parameters) as `jax.eval_shape` gives it."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, abstract_state)


def constrain_state(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Inside a traced function: leaves named like parameters, laid out by the rules over the mesh in context."""
    mesh = _mesh_in_context()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, state_shardings(tree, mesh))


def in_rollout_layout(
    config: MeshConfig, dtype: str, sample: Callable, params: chex.ArrayTree, cache: Cache, *rows: chex.ArrayTree
) -> Any:
    """Inside a traced function: `sample(params, cache, *rows)`, with arrays laid out for decoding. `rows` and what it
    returns are trees of [B, ...].

    Weights are gathered over 'fsdp' here, once, in the model's compute `dtype`, and stay split over 'tensor' alone;
    with `mesh.rollout` "same" they stay as they are, and in a loop over layers each device gathers its layer's weights
    for every token. `mesh.rollout_tensor` devices share a document and its heads: a learner of long sequences wants few
    of them, since each holds all of a sequence between its layers, and decoding many, since each reads all its weights
    for every token.
    """
    mesh = _mesh_in_context()
    if mesh is None:
        return sample(params, cache, *rows)
    with decoding():
        if config.rollout == "gathered":
            params = _gathered(params, dtype, mesh)
        keys = constrain((cache.prefix_k, cache.prefix_v), None, DOCUMENTS, HEADS)
        cache = cache._replace(prefix_k=keys[0], prefix_v=keys[1], states=constrain(cache.states, None, DOCUMENTS))
        sampled = constrain(sample(params, cache, *constrain(rows, DOCUMENTS)), DOCUMENTS)
    # Of constraints in a row the compiler takes the last, and would lay out the loop by it.
    return constrain(jax.lax.optimization_barrier(sampled), DOCUMENTS)


def _gathered(params: chex.ArrayTree, dtype: str, mesh: AbstractMesh) -> chex.ArrayTree:
    """Parameters split over the axes of heads alone, matrices in `dtype`."""

    def gather(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = re.sub(r"/kernel/(qvalue|scale)$", "/kernel", name)  # int8
        held = [HEADS if axis == "tensor" else None for axis in spec_for(name, leaf.shape, mesh)]
        return constrain(leaf, *held)

    return jax.tree.map_with_path(gather, cast_kernels(params, dtype))


def _mesh_in_context() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else None


def document_shards(mesh: Mesh | None) -> int:
    """In how many runs a batch's documents are split over devices."""
    return 1 if mesh is None else mesh.size // mesh.shape["tensor"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Documents are split over all axes together but 'tensor', which sees all of them."""
    return NamedSharding(mesh, P(tuple(name for name in mesh.axis_names if name in DOCUMENTS)))


def place_state(state: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """The state on its devices."""
    return state if mesh is None else jax.device_put(state, state_shardings(state, mesh))


def with_shardings(abstract_state: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """ShapeDtypeStructs that say where each array will live: what a checkpoint is restored to."""
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract_state)
    else:
        shardings = state_shardings(abstract_state, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state,
        shardings,
    )


def place_batch(batch: chex.ArrayTree, mesh: Mesh | None, documents: int | None = None) -> chex.ArrayTree:
    """A batch on its devices; replicated when its documents do not divide (the rest of a held-out set).

    Args:
      batch: all rows, the same in every process; or, with `documents`, the rows of this process's own devices.
      documents: how many the whole batch has.
    """
    if mesh is None:
        return batch
    rows = {documents or leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    whole = all(count % document_shards(mesh) == 0 for count in rows)
    sharding = batch_sharding(mesh) if whole else NamedSharding(mesh, P())
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)

    def over_processes(leaf):
        leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
        if documents is None:
            return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
        return jax.make_array_from_process_local_data(sharding, leaf, (documents, *leaf.shape[1:]))

    return jax.tree.map(over_processes, batch)
