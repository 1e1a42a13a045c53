"""Where every array lives. The model knows nothing of it: a short table maps parameter paths to a PartitionSpec over
the mesh ('data', 'fsdp', 'tensor') and the compiler does the rest.

Parameters, their average and the optimizer's moments share paths, hence rules. A dimension that an axis does not
divide is replicated along that axis. On one device there is no mesh: `place_state` and `place_batch` return what
they got.
"""

import re

import chex
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rlp_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")

# The first rule whose pattern ends the leaf's path wins; the dimensions are those of ARCHITECTURE.md, layers first.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"attention/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"attention/o/kernel", P(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"mixer/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"mixer/o/kernel", P(None, "tensor", None, "fsdp")),
    (r"mixer/(up|in_proj)/kernel", P(None, "fsdp", "tensor")),
    (r"mixer/(down|out_proj)/kernel", P(None, "tensor", "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"scale", P()),
)


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along ('data', 'fsdp', 'tensor'), with -1 resolved to what is left.

    Raises:
      ConfigError: more than one -1, an axis below 1, or a product that is not the number of devices.
    """
    shape = [config.data, config.fsdp, config.tensor]
    said = f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}"
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ConfigError(f"{said}: axes are 1 or more, and at most one is -1 (what is left)")
    known = int(np.prod([size for size in shape if size != -1]))
    if devices % known or (-1 not in shape and known != devices):
        raise ConfigError(f"{said} needs {'a multiple of ' * (-1 in shape)}{known} devices, there are {devices}")
    data, fsdp, tensor = (devices // known if size == -1 else size for size in shape)
    return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh | None:
    """The mesh over all devices (or those given), None where there is one device and nothing to shard.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return None if len(devices) == 1 else Mesh(np.asarray(devices).reshape(shape), AXES)


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one leaf: its rule, less the axes that do not divide its dimensions.

    A leaf without a rule is replicated.
    """
    rule = next((spec for pattern, spec in RULES if re.search(rf"(^|/){pattern}$", path)), P())
    if len(rule) > len(shape):
        return P()
    axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, shape, strict=False)]
    return P(*axes)


def state_shardings(abstract_state: chex.ArrayTree, mesh: Mesh) -> chex.ArrayTree:
    """A NamedSharding for each leaf of a state (or of bare parameters) as `jax.eval_shape` gives it."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, abstract_state)


def document_shards(mesh: Mesh | None) -> int:
    """In how many runs a batch's documents are split over devices."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Documents are split over 'data' and 'fsdp' together; 'tensor' sees all of them."""
    return NamedSharding(mesh, P(("data", "fsdp")))


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
