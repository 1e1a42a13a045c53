# SPDX-License-Identifier: Apache-2.0
"""README's code runs as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_block(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    for value in ("loss", "logits_BTV"):
        if value in names:
            assert jnp.isfinite(names[value]).all()


def test_first_block_is_the_algorithm():
    names = {}
    exec(BLOCKS[0], names)
    # Advantages: rewards 1, 0, -1, 0.5 minus their mean 0.125, times 4/3; at ratio 1 the loss is minus their mean, 0.
    assert names["advantage_G"].tolist() == pytest.approx([7 / 6, -1 / 6, -1.5, 0.5])
    assert float(names["loss"]) == pytest.approx(0.0, abs=1e-7)


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / path).is_file(), path
