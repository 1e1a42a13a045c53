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

import chex
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rlp_jax.config import ConfigError, MeshConfig, RolloutLayout
from rlp_jax.models.constraints import DOCUMENTS
from rlp_jax.models.transformer import cast_kernels

AXES = ("slice", "data", "fsdp", "tensor")

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
    return Mesh(np.stack(own), AXES)


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
    axes = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, shape, strict=False)]
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


def rollout_params(params: chex.ArrayTree, layout: RolloutLayout, dtype: str) -> chex.ArrayTree:
    """Inside a traced function: the parameters that a decode loop reads, in the layout of `mesh.rollout`.

    "same": as they are. In a loop over layers each device then gathers its layer's weights over 'fsdp' for every token.
    "gathered": they are gathered here, once, in the model's compute `dtype`, and stay split over 'tensor' alone.
    """
    mesh = _mesh_in_context()
    if mesh is None or layout == "same":
        return params

    def gather(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = re.sub(r"/kernel/(qvalue|scale)$", "/kernel", name)  # int8
        spec = P(*(None if axis == "fsdp" else axis for axis in spec_for(name, leaf.shape, mesh)))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(gather, cast_kernels(params, dtype))


def _mesh_in_context() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else None


def document_shards(mesh: Mesh | None) -> int:
    """In how many runs a batch's documents are split over devices."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in DOCUMENTS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Documents are split over 'slice', 'data' and 'fsdp' together; 'tensor' sees all of them."""
    return NamedSharding(mesh, P(DOCUMENTS))


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
