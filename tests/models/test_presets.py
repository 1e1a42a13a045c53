# SPDX-License-Identifier: Apache-2.0
"""The named shapes have the published numbers of parameters, counted from shapes alone."""

import jax
import pytest

from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel

# As the model hub counts the published safetensors.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-nano-12b-v2": 12_310_001_152,
}


def test_every_preset_is_checked():
    assert PUBLISHED.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count(name):
    shapes = jax.eval_shape(LanguageModel(CONFIGS[name]).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PUBLISHED[name]
