# SPDX-License-Identifier: Apache-2.0
"""TPU generations, what their makers publish of them, and the devices of a pod that is not there."""

import dataclasses
import importlib.util
import os
import re
from typing import TYPE_CHECKING

from rlp_jax.config import ConfigError

if TYPE_CHECKING:
    import jax

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip.

    Attributes:
      bfloat16_flops, int8_ops: products and sums a second.
      hbm_bytes: what the compiler lets a program use of the memory: a little less than is published.
      hbm_bandwidth: bytes a second.
      ici_bandwidth: bytes a second that a chip sends over all its links together, one way: half of what is published
        as bidirectional.
      dcn_bandwidth: bytes a second of a host's network, one way.
      chips_per_host: those that share the host's network.
      axes: of the torus.
      source: where the figures come from.
    """

    bfloat16_flops: float
    int8_ops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    chips_per_host: int
    axes: int
    source: str


CHIPS = {
    "v5e": Chip(197e12, 393e12, 15.75 * GIB, 819e9, 200e9, 25e9, 8, 2, "docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 918e12, 95.73 * GIB, 2765e9, 600e9, 25e9, 4, 3, "docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 1836e12, 31.24 * GIB, 1600e9, 400e9, 100e9, 8, 2, "docs.cloud.google.com/tpu/docs/v6e"),
}
EXAMPLES = {"v5e": "v5e:16x16", "v5p": "v5p:4x4x4", "v6e": "v6e:8x8"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` pods of one shape; slices are connected by their hosts' network, chips of one by their own links."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips_per_slice(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def chips(self) -> int:
        return self.chips_per_slice * self.slices

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Of "v5e:16x16" and the like.

    Raises:
      ConfigError: a generation that is not in the table, a shape of another number of axes, or no slice.
    """
    generation, _, shape = text.partition(":")
    chip = CHIPS.get(generation)
    if chip is None:
        raise ConfigError(f"--topology {text}: {generation!r} is not a known chip; examples: {_examples()}")
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{chip.axes - 1}}}", shape):
        raise ConfigError(
            f"--topology {text}: a {generation} has {chip.axes} axes, for instance {EXAMPLES[generation]}"
        )
    if slices < 1:
        raise ConfigError(f"--slices is {slices}: at least 1")
    return Topology(generation, tuple(map(int, shape.split("x"))), slices)


def _examples() -> str:
    return ", ".join(EXAMPLES.values())


def devices_of(topology: Topology) -> "list[jax.Device]":
    """Descriptions of the topology's chips, good for compiling and nothing else.

    Raises:
      ConfigError: the TPU compiler is not installed, or does not know this shape.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU compiler is not installed: pip install 'rlp_jax[tpu]'")
    from jax.experimental import topologies

    # The compiler looks for a TPU, or for its description by a metadata server, unless told that there is none.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except Exception as error:  # of the plugin, without a class of its own
        raise ConfigError(f"--topology {topology.name}: the TPU compiler refuses it: {error}") from error
