# SPDX-License-Identifier: Apache-2.0
"""The table of chips and what may be asked for."""

import pytest

from rlp_jax.aot.chips import CHIPS, EXAMPLES, parse_topology
from rlp_jax.config import ConfigError


def test_topologies():
    topology = parse_topology("v5p:4x8x8", slices=2)
    assert (topology.chips_per_slice, topology.chips, topology.name) == (256, 512, "v5p:4x8x8")
    assert topology.chip.bfloat16_flops == 459e12
    for generation, example in EXAMPLES.items():
        assert parse_topology(example).chip is CHIPS[generation]


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v9:4x4", 1, "'v9' is not a known chip"),
        ("16x16", 1, "'16x16' is not a known chip"),
        ("v5e:4x4x4", 1, "a v5e has 2 axes"),
        ("v5p:4x4", 1, "a v5p has 3 axes"),
        ("v5e:4x", 1, "a v5e has 2 axes"),
        ("v5e:0x4", 1, "a v5e has 2 axes"),
        ("v5e:4x4", 0, "--slices is 0"),
    ],
)
def test_what_cannot_be(text, slices, message):
    with pytest.raises(ConfigError, match=message):
        parse_topology(text, slices)
