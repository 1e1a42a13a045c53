# SPDX-License-Identifier: Apache-2.0
"""The cost model on paper: its counts against sums written out, how they go with chips, and what was compiled."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from rlp_jax.aot.chips import CHIPS
from rlp_jax.rollout.engine import ring_sizes
from rlp_jax.settings import load_experiment


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale", Path(__file__).parents[2] / "tpu" / "scale.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def qwen(scale):
    config = load_experiment("pod/qwen3_1_7b")
    return config, scale.shape_of(config)


@pytest.mark.parametrize(("tokens", "limit"), [(1, 64), (64, 64), (65, 2048), (2048, 2048), (700, 1000)])
def test_ring_reads_are_the_ring_of_every_token(scale, tokens, limit):
    every = [next(size for size in ring_sizes(limit) if token < size) for token in range(tokens)]
    assert scale.ring_reads(tokens, limit) == sum(every)


def test_shapes_are_the_published_ones(scale, qwen):
    _, shape = qwen
    assert shape.cached == 28 * 2 * 8 * 128 * 2  # layers, keys and values, heads, width, bytes
    assert shape.layers == 28 * (2048 * (16 + 8 + 8) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144)
    assert shape.head == 151_936 * 2048 and shape.state == 0
    hybrid = scale.shape_of(load_experiment("pod/nemotron_nano_12b_v2"))
    pattern = hybrid.config.hybrid.pattern
    assert hybrid.cached == pattern.count("*") * 2 * hybrid.config.n_kv_heads * hybrid.config.head_dim * 2
    assert hybrid.state == pattern.count("M") * hybrid.config.hybrid.width * hybrid.config.hybrid.state_size * 4


def test_decoding_reads_weights_every_turn_and_the_rest_by_its_share(scale, qwen):
    config, shape = qwen
    turns, W = 2048, 2 * (shape.layers + shape.head)
    one = scale.costs(config, shape, scale.Layout(256, 1, 1, 16, 2), turns)["rollout"]["hbm"]
    per_document = 16 * scale.ring_reads(2048, 2048) * shape.cached + 2048 * turns * shape.cached
    drawn = 16 * turns * 2 * 151_936 * 4
    assert one == pytest.approx(turns * W + 2 * (per_document + drawn))
    # Half of the slots: twice as many turns, so weights and prefixes are read twice; rings do not shrink again.
    half = scale.costs(config, shape, scale.Layout(256, 1, 1, 8, 2), turns)["rollout"]["hbm"]
    longer = 8 * (2048 * turns - scale.ring_reads(2048, 2048)) * shape.cached
    assert half - one == pytest.approx(turns * W + 2 * (2048 * turns * shape.cached + longer))
    shared = scale.costs(config, shape, scale.Layout(256, 1, 8, 16, 2), turns)
    plain = scale.costs(config, shape, scale.Layout(256, 1, 1, 16, 2), turns)
    assert all(shared[phase] == plain[phase] for phase in ("baseline", "prefill", "gradient"))
    cut = shared["rollout"]["hbm"]
    assert cut == pytest.approx(turns * W / 8 + 2 * (per_document + drawn))  # eight times the documents, an eighth each


def test_more_chips_share_the_work_until_there_are_no_more_documents(scale, qwen):
    config, shape = qwen
    few, many = (scale.costs(config, shape, scale.Layout(n, 1, 1, 16, 1), 512) for n in (64, 512))
    assert all(few[phase]["flops"] == pytest.approx(8 * many[phase]["flops"]) for phase in few)
    seconds = {n: sum(scale.best(config, shape, n, CHIPS["v5p"], {})[1].values()) for n in scale.CHIP_COUNTS}
    assert all(seconds[2 * n] < 1.001 * seconds[n] for n in scale.CHIP_COUNTS[:-1])
    assert seconds[8192] == pytest.approx(seconds[4096], rel=1e-3)  # 512 documents, at most 8 chips each


def test_a_layout_that_does_not_fit_is_not_taken(scale, qwen):
    config, shape = qwen
    small = dataclasses.replace(CHIPS["v5e"], hbm_bytes=2**30)
    assert scale.best(config, shape, 8, small, {}) is None
    for layout in scale.layouts(config, shape, 256, CHIPS["v5e"]):
        assert scale.memory(config, shape, layout) < CHIPS["v5e"].hbm_bytes


def test_operations_and_decoding_are_what_the_compiler_says(scale):
    found = scale.ratios()
    assert found
    for name, ratios in found.items():
        hybrid = name.startswith("nemotron")
        for phase in ("baseline", "prefill", "rollout"):
            assert 0.95 < ratios[phase, "flops"] < 1.15, (name, phase)
        # The formula counts each layer's forward twice. The product that a layer ends in is not needed again, and is
        # half of an MLP, which is a layer of its own in a hybrid.
        assert (0.85 if hybrid else 0.95) < ratios["gradient", "flops"] < 1.15, name
        # A hybrid's loop moves recurrent states out of the stack of layers and back, beside reading and writing them.
        assert 0.8 < ratios["rollout", "hbm"] < (3.5 if hybrid else 1.6), name


def test_the_page_shows_what_the_script_prints(scale):
    page = scale.PAGE.read_text()
    for heading, table in scale.tables().items():
        assert f"**{heading}**\n\n{table}\n" in page, heading
