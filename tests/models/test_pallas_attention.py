# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel, interpreted on CPU, against the plain implementation; and compiled by the real TPU compiler."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_layouts import attention, random_ranges

from rlp_jax.models import pallas_attention
from rlp_jax.models.blocked_attention import visited_blocks
from rlp_jax.models.self_attention import Ranges, causal, self_attention

M, E = 2, 16


@pytest.fixture(scope="module", autouse=True)
def small_blocks_compiled_quickly():
    """Small, so that short sequences have several."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_attention, "BLOCK", 128)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def inputs(B, C, heads_per_key=3, seed=0, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, C, M * heads_per_key, E), (B, C, M, E), (B, C, M, E)
    return [jnp.asarray(scale * rng.normal(size=shape), dtype) for shape in shapes]


def layouts(B, C, seed, **kwargs):
    rng = np.random.default_rng(seed)
    return Ranges(*(jnp.asarray(x) for x in zip(*(random_ranges(rng, C, **kwargs) for _ in range(B)), strict=True)))


def kernel(q_BCNE, k_BCME, v_BCME, ranges):
    """The interpreted kernel with the arguments of `self_attention`."""
    B, C, N, _ = q_BCNE.shape
    q_BMOCE = (E**-0.5 * q_BCNE).reshape(B, C, M, N // M, E).transpose(0, 2, 3, 1, 4)
    k_BMCE, v_BMCE = (x.transpose(0, 2, 1, 3) for x in (k_BCME, v_BCME))
    ranges = [jnp.broadcast_to(x, (B, C)) for x in ranges]
    out_BMOCE = pallas_attention.attend(q_BMOCE, k_BMCE, v_BMCE, *ranges, interpret=True)
    return out_BMOCE.transpose(0, 3, 1, 2, 4).reshape(B, C, N, E)


def plain(q_BCNE, k_BCME, v_BCME, ranges):
    return self_attention(q_BCNE, k_BCME, v_BCME, ranges, implementation="xla")


def value_and_gradients(function, qkv, ranges):
    direction = jnp.asarray(np.random.default_rng(9).normal(size=qkv[0].shape), qkv[0].dtype)

    @jax.jit
    def compute(qkv, ranges, direction):
        out, gradients = jax.vjp(lambda *qkv: function(*qkv, ranges), *qkv)
        return out, *gradients(direction)

    return compute(qkv, ranges, direction)


def assert_same(ours, theirs, tolerance=1e-5):
    """Each array to `tolerance` of its size, and no element far off."""
    for one, other in zip(ours, theirs, strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
        np.testing.assert_allclose(one, other, rtol=10 * tolerance, atol=10 * tolerance)


def test_against_a_loop_in_float64():
    C = 200
    qkv, ranges = inputs(2, C), layouts(2, C, 0, sizes=(1, 60))
    out = kernel(*qkv, ranges)
    for b in range(2):
        exact = attention(*(x[b] for x in qkv), [np.asarray(x[b]) for x in ranges])
        assert_same([out[b]], [exact])


@settings(max_examples=4, deadline=None)
@given(st.integers(129, 500), st.integers(0, 1_000), st.sampled_from([1, 3]), st.sampled_from([40, 150]))
def test_documents_and_thoughts_packed_in_any_way(C, seed, heads_per_key, longest):
    """Padding included: places at the end that see only themselves."""
    qkv, ranges = inputs(2, C, heads_per_key, seed), layouts(2, C, seed, sizes=(1, longest))
    assert_same(value_and_gradients(kernel, qkv, ranges), value_and_gradients(plain, qkv, ranges))


@pytest.mark.parametrize("C", [5, 128, 300])
def test_causal(C):
    qkv = inputs(1, C)
    assert_same(value_and_gradients(kernel, qkv, causal(C)), value_and_gradients(plain, qkv, causal(C)))


def test_windows():
    C = 300
    qkv, ranges = inputs(1, C), causal(C).within(70, jnp.arange(C)[None])
    assert_same(value_and_gradients(kernel, qkv, ranges), value_and_gradients(plain, qkv, ranges))


def test_bfloat16():
    """As near the exact numbers as rounding to 8 bits allows, gradients included."""
    qkv, ranges = inputs(2, 300, dtype=jnp.bfloat16), layouts(2, 300, 1)
    ours = value_and_gradients(kernel, qkv, ranges)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    assert_same(ours, value_and_gradients(plain, [x.astype(jnp.float32) for x in qkv], ranges), tolerance=0.01)


def test_many_sequences_one_by_one(monkeypatch):
    """Where the steps of all sequences do not fit into scalar memory, each sequence gets a kernel call of its own."""
    qkv, ranges = inputs(3, 200), layouts(3, 200, 2)
    together = value_and_gradients(kernel, qkv, ranges)
    monkeypatch.setattr(pallas_attention, "STEPS", 1)
    assert_same(value_and_gradients(kernel, qkv, ranges), together, tolerance=1e-6)


def test_blocks_that_nobody_sees_are_not_touched():
    """Two documents, one of them NaN in every input: nothing of it reaches the other, which even a weight of 0 would
    let through. Scores of hundreds do not overflow."""
    C, start = 512, 256
    alone = Ranges(*(jnp.zeros((1, C), jnp.int32),) * 2, jnp.where(jnp.arange(C) < start, 0, start)[None])
    whole = inputs(1, C, scale=12.0)
    clean = value_and_gradients(kernel, whole, alone)
    broken = [x.at[:, :start].set(jnp.nan) for x in whole]
    for one, other in zip(value_and_gradients(kernel, broken, alone), clean, strict=True):
        assert np.isfinite(other).all()
        assert np.isnan(one[:, :start]).all()
        np.testing.assert_array_equal(one[:, start:], other[:, start:])


@pytest.mark.parametrize("by_key", [False, True])
def test_steps_are_the_visited_pairs(by_key):
    """Each once, row by row; a sequence with fewer repeats its last pair, so that nothing new is fetched."""
    visited = np.array(visited_blocks(*layouts(3, 96, 4, sizes=(8, 30)), 8, 8))
    visited[0] = np.eye(12, dtype=bool)  # a sequence with few
    visited = visited.swapaxes(1, 2) if by_key else visited
    steps, most = pallas_attention._steps(jnp.asarray(visited))
    assert most == visited.sum((1, 2)).max()
    for one, step in zip(visited, np.asarray(steps).reshape(3, -1), strict=True):
        pairs = list(zip(pallas_attention._row(step), pallas_attention._column(step), strict=True))
        count = one.sum()
        assert pairs[:count] == list(zip(*np.nonzero(one), strict=True))
        assert set(pairs[count:]) <= {pairs[count - 1]}
        first, live, last = ((step & flag) != 0 for flag in (1, 2, 4))
        assert live[:count].all() and not (live | first | last)[count:].any()
        ends = np.cumsum(one.sum(1))
        assert np.flatnonzero(last).tolist() == (ends - 1).tolist()
        assert np.flatnonzero(first).tolist() == [0, *ends[:-1]]


def test_block_sizes(monkeypatch):
    monkeypatch.setattr(pallas_attention, "BLOCK", 512)
    for length in (1, 128, 513, 2_100, 34_816):
        for heads, width, itemsize in ((1, 64, 2), (2, 128, 2), (8, 128, 4), (16, 256, 4)):
            block = pallas_attention.block_size(length, heads * width * itemsize)
            assert block % 128 == 0 and 128 <= block <= 512
            assert block == 128 or block * heads * width * itemsize <= pallas_attention.HEADS_BYTES
            blocks = -(-length // block)
            assert blocks * block - length < 128 * blocks
    assert pallas_attention.block_size(34_816, 2 * 128 * 2) == 512


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from rlp_jax.models.causal_attention import KEPT
from rlp_jax.models.pallas_attention import attend

B, M, O, C = 2, 2, 2, 1_100
device = topologies.get_topology_desc(sys.argv[1], "tpu").devices[0]
remat = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
# Forward; gradient of a layer that keeps what the kernel marks, so that forward runs once; gradient.
cases = (128, jnp.bfloat16, None, 1), (128, jnp.bfloat16, remat, 3), (64, jnp.float32, attend, 3)
for E, dtype, function, kernels in cases:
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    def program(q, k, v, *ranges):
        if function is None:
            return attend(q, k, v, *ranges)
        return jax.grad(lambda *qkv: (function(*qkv, *ranges) ** 2).sum().astype("float32"), (0, 1, 2))(q, k, v)

    arrays = array(B, M, O, C, E), *[array(B, M, C, E)] * 2, *[array(B, C, dtype=jnp.int32)] * 3
    compiled = jax.jit(program).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1"])
def test_compiles_for_tpu(topology):
    """Ahead of time, in a process that takes no TPU: this shows that it lowers and fits, not how fast it is."""
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", COMPILE, topology]
    result = subprocess.run(command, env=os.environ | alone | quiet, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4_000:]
