# SPDX-License-Identifier: Apache-2.0
"""Over which devices a model is evaluated."""

from rlp_jax.config import Config, ConfigError, MeshConfig
from rlp_jax.overrides import override
from rlp_jax.sharding import mesh_shape
from rlp_jax.validation import check_sampling


def mesh_for(given: str | None, config: Config | None, devices: int) -> MeshConfig:
    """How the model and its documents are split over the devices there: as the user says; without, as the run was,
    where as many devices divide that way; else weights over all of them.

    Args:
      given: `axis=devices` and `rollout=layout`, with commas between. config: the run's, None for a model.

    Raises:
      ConfigError: no such axis, or axes that do not multiply to the devices.
    """
    if given is not None:
        parts = [part.strip() for part in given.split(",")]
        if not all("=" in part for part in parts):
            raise ConfigError(f"--mesh {given}: write axes and devices, for instance data=2,tensor=4")
        mesh = override(Config(), [f"mesh.{part}" for part in parts]).mesh
        check_sampling(mesh.rollout_tensor, *mesh_shape(mesh, devices)[2:])
        return mesh
    split = MeshConfig(data=1, fsdp=-1)
    if config is None:
        return split
    try:
        check_sampling(config.mesh.rollout_tensor, *mesh_shape(config.mesh, devices)[2:])
    except ConfigError:
        return split
    return config.mesh
