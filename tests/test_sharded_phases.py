# SPDX-License-Identifier: Apache-2.0
"""Sampling, rewards, learning and evaluation over meshes of eight devices give the numbers of one device."""

import pytest
from eight_devices import on_eight_devices
from sharded_phases import TRIED


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_every_phase_gives_the_numbers_of_one_device(family):
    printed = on_eight_devices("import sys, sharded_phases; sharded_phases.main(sys.argv[1])", family)
    assert printed.count("off by") == len(TRIED[family])
