# SPDX-License-Identifier: Apache-2.0
"""The check passes on every family, and sees a fork whose branches stand at wrong positions or see too much."""

import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import FAMILIES, rough_params, tiny

from rlp_jax.rollout import selfcheck

pytestmark = pytest.mark.usefixtures("quick_compiles")

DOCUMENT = np.random.default_rng(0).integers(3, 50, 20)


@pytest.mark.parametrize("family", [*FAMILIES, "nemotron_h"])
def test_families_pass(family):
    model = hybrid() if family == "nemotron_h" else tiny(family)
    assert selfcheck.check_sharing(model, rough_params(model), DOCUMENT) < 1e-4
    assert selfcheck.check_sharing(model, rough_params(model), DOCUMENT[:3]) < 1e-4


def test_bfloat16_passes():
    model = tiny(compute_dtype="bfloat16")
    assert 1e-4 < selfcheck.check_sharing(model, rough_params(model), DOCUMENT) < 0.5


@pytest.mark.parametrize("error", [1, -1])
def test_a_wrong_fork_is_found(error, monkeypatch):
    fork = selfcheck.fork
    monkeypatch.setattr(selfcheck, "fork", lambda cache, length_BR: fork(cache, length_BR + error))
    model = tiny()
    with pytest.raises(selfcheck.SharingError, match=r"differ by .* nats a token .*float32"):
        selfcheck.check_sharing(model, rough_params(model), DOCUMENT)


def test_a_wrong_layout_is_found(monkeypatch):
    """Branches packed behind their document that see one token of it too few."""
    pack = selfcheck._pack

    def short(*args):
        tokens_C, layout, place_RS = pack(*args)
        fewer = layout.ranges._replace(prefix_end_BC=layout.ranges.prefix_end_BC - 1)
        return tokens_C, layout._replace(ranges=fewer), place_RS

    monkeypatch.setattr(selfcheck, "_pack", short)
    with pytest.raises(selfcheck.SharingError, match=r"differ by .* nats a token .*float32"):
        selfcheck.check_sharing(tiny(), rough_params(tiny()), DOCUMENT)


def test_nan_on_one_side_is_found_and_on_both_is_not_its_business(monkeypatch):
    fork = selfcheck.fork
    broken = rough_params(tiny())
    broken["final_norm"]["scale"] *= jnp.nan
    assert selfcheck.check_sharing(tiny(), broken, DOCUMENT) == 0.0
    monkeypatch.setattr(selfcheck, "fork", lambda cache, length_BR: fork(cache, length_BR + 1))
    with pytest.raises(selfcheck.SharingError, match="nan"):  # a hybrid has no state there
        selfcheck.check_sharing(hybrid(), rough_params(hybrid()), DOCUMENT)
