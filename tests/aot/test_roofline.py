# SPDX-License-Identifier: Apache-2.0
"""Bounds by hand, advice, and the meshes that a search tries."""

import dataclasses

import jax
import pytest

from rlp_jax.aot.chips import CHIPS, parse_topology
from rlp_jax.aot.command import candidate_meshes
from rlp_jax.aot.programs import Abstract, TooLarge
from rlp_jax.aot.roofline import Phase, advice
from rlp_jax.config import Config, MeshConfig, RLPConfig
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel

CONFIG = Config(batch_documents=512, compute_dtype="bfloat16", rlp=RLPConfig(microbatches=8))


@pytest.mark.parametrize(
    ("figures", "limit", "seconds"),
    [
        ((197e12, 819e8, 0.0, 0.0), "flops", 1.0),
        ((197e11, 2 * 819e9, 200e9, 0.0), "hbm", 2.0),
        ((0.0, 0.0, 600e9, 0.0), "ici", 3.0),
        ((0.0, 0.0, 0.0, 25e9), "dcn", 8.0),  # a host's network serves eight chips
    ],
)
def test_the_slowest_of_four_bounds_a_phase(figures, limit, seconds):
    phase = Phase("learn", *figures, {}, None)
    assert phase.bound(CHIPS["v5e"]) == (limit, pytest.approx(seconds))


MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
73.70G of 15.75G hbm. Exceeded hbm capacity by 57.95G.

Total hbm usage >= 74.22G:
    reserved        530.00M
    program          73.70G

  Largest program allocations in hbm:

  1. Size: 32.00G
     Operator: op_name="jit(f)/dot_general" source_file="x.py" source_line=3
     Shape: f32[65536,131072]{1,0:T(8,128)}
     Unpadded size: 32.00G
     ==========================

  2. Size: 512.5M
     Shape: bf16[16384,16384]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.0M
"""


def test_the_compilers_message_is_read():
    error = TooLarge("learn", MESSAGE)
    assert (error.used, error.capacity) == (73.7 * 2**30, 15.75 * 2**30)
    assert error.largest == [
        {"bytes": 32 * 2**30, "array": "f32[65536,131072]", "from": "jit(f)/dot_general"},
        {"bytes": 512.5 * 2**20, "array": "bf16[16384,16384]", "from": ""},
    ]


def test_without_a_list_the_largest_values_are_named():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.13G) "
    message += "exceeds available HBM (15.75G)."

    def program(x):
        with jax.named_scope("outer"):
            return jax.lax.scan(lambda x, _: (x, x @ x), x, length=3)[1].sum()

    jaxpr = jax.jit(program).trace(jax.ShapeDtypeStruct((8, 8), "float32")).jaxpr
    error = TooLarge("sample", message, jaxpr)
    assert (error.used, error.capacity) == (18.13 * 2**30, 15.75 * 2**30)
    assert error.largest[0] == {"bytes": 3 * 64 * 4, "array": "float32[3,8,8] over all chips", "from": "outer"}


def advised(program, config, **mesh):
    shape = {"slice": 1, "data": 1, "fsdp": 4, "tensor": 1} | mesh
    mesh = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
    shards = shape["data"] * shape["fsdp"]
    model = LanguageModel(CONFIGS["qwen3-1.7b"])
    run = Abstract(config, None, model, None, mesh, shards, _NoState(), None, None, None)
    return " ".join(advice(run, TooLarge(program, MESSAGE), None))


class _NoState:
    params = ema_params = opt_state = ()


def test_advice_says_what_can_still_be_changed():
    learn = advised("learn", dataclasses.replace(CONFIG, remat="none"))
    assert "rlp.microbatches (now 8, at most 128)" in learn and "remat=layer" in learn and "mesh.tensor" in learn
    assert "rlp.microbatches" not in advised("learn", CONFIG, fsdp=64)  # one document a part already
    sample = advised("sample", CONFIG, data=2, fsdp=2)
    assert "rlp.slots (now 16 of 16" in sample and "remat" not in sample and "mesh.data (now 2)" in sample
    assert "compute_dtype=bfloat16" in advised("sample", dataclasses.replace(CONFIG, compute_dtype="float32"))


def test_a_search_tries_meshes_that_split_the_batch():
    found = list(candidate_meshes(CONFIG, parse_topology("v5e:16x16", slices=2)))
    for mesh, microbatches in found:
        ways = mesh.slices * mesh.data * mesh.fsdp
        assert ways * mesh.tensor == 512 and mesh.slices == 2
        assert 512 % microbatches == 0 and 512 // microbatches % ways == 0
    assert (MeshConfig(slices=2, data=1, fsdp=256, tensor=1), 1) in found
    assert (MeshConfig(slices=2, data=1, fsdp=64, tensor=4), 4) in found
    gathered = dataclasses.replace(CONFIG, mesh=MeshConfig(rollout="gathered"))
    more = list(candidate_meshes(gathered, parse_topology("v5e:16x16", slices=2)))
    assert (MeshConfig(2, 1, 64, 4, "gathered", rollout_tensor=8), 4) in more
    assert {mesh.rollout_tensor for mesh, _ in found} == {0} and {mesh.rollout_tensor for mesh, _ in more} == {0, 8}
    assert not list(candidate_meshes(dataclasses.replace(CONFIG, batch_documents=3), parse_topology("v5e:4x4")))
