# SPDX-License-Identifier: Apache-2.0
"""Whole sequences over a mesh: kernels and loops see their own documents and heads, and nothing is gathered."""

import importlib.util
import os
import subprocess
import sys

import pytest
from eight_devices import on_eight_devices

EIGHT = """
    import functools

    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from packed_layouts import random_ranges

    from rlp_jax.config import MeshConfig
    from rlp_jax.models import blocked_attention, causal_attention, pallas_attention
    from rlp_jax.models.self_attention import Ranges, self_attention
    from rlp_jax.sharding import make_mesh, over

    jax.config.update("jax_disable_most_optimizations", True)
    pallas_attention.BLOCK = blocked_attention.BLOCK = causal_attention.BLOCK = 128
    pallas_attention.attend = functools.partial(pallas_attention.attend, interpret=True)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    documents = NamedSharding(mesh, P(("slice", "data", "fsdp")))

    def compute(implementation, mesh, ranges, *arrays):
        def program(direction, *qkv):
            with over(mesh):
                out, gradients = jax.vjp(
                    lambda *qkv: self_attention(*qkv, ranges, implementation=implementation), *qkv)
                return out, *gradients(direction)

        return jax.jit(program).lower(*arrays).compile()

    # Two key heads on two devices; one of three query heads, which do not divide; one whose four query heads do. Three
    # documents do not divide over four devices.
    for B, M, heads, causal in (4, 2, 1, False), (4, 1, 3, False), (4, 1, 4, True), (3, 2, 1, True):
        C, E, rng = 200, 8, np.random.default_rng(B * heads)
        shapes = [(B, C, M * heads, E)] * 2 + [(B, C, M, E)] * 2
        arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
        one = [random_ranges(rng, C, (1, 60)) for _ in range(B)]
        ranges = None if causal else Ranges(*map(jnp.asarray, map(np.stack, zip(*one, strict=True))))
        plain = compute("xla", None, ranges, *arrays)(*arrays)
        placed = jax.device_put(arrays, documents if B == 4 else NamedSharding(mesh, P()))
        for implementation in ("pallas", "blocked"):
            program = compute(implementation, mesh, ranges, *placed)
            if (B, M) == (4, 2):  # both divide
                assert "all-gather" not in program.as_text(), implementation
                assert program(*placed)[0].sharding.shard_shape((B, C, 2, E)) == (1, C, 1, E)
            for name, ours, theirs in zip(("out", "q", "k", "v"), program(*placed), plain, strict=True):
                error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
                # float32 sums in another order, as on one device (test_pallas_attention.py)
                assert error < 1e-5, (implementation, B, M, heads, name, error)
    print("agree")
"""


def test_eight_devices_compute_what_one_does():
    assert "agree" in on_eight_devices(EIGHT)


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from rlp_jax.config import MeshConfig
from rlp_jax.models.causal_attention import KEPT
from rlp_jax.models.self_attention import Ranges, self_attention
from rlp_jax.sharding import make_mesh, over

mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), list(topologies.get_topology_desc("v5e:2x4", "tpu").devices))
documents = P(("slice", "data", "fsdp"))

def array(*shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

def attend(q, k, v, *ranges):
    return self_attention(q, k, v, Ranges(*ranges), implementation="pallas")

def program(q, k, v, *ranges):
    remat = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    with over(mesh):
        return jax.grad(lambda *qkv: (remat(*qkv, *ranges) ** 2).sum().astype("float32"), (0, 1, 2))(q, k, v)

B, C, N, M, E = 8, 1_100, 8, 4, 128
by_head = P(*documents, None, "tensor")
arrays = [array(B, C, heads, E, spec=by_head) for heads in (N, M, M)]
ranges = [array(B, C, spec=documents, dtype=jnp.int32)] * 3
compiled = jax.jit(program).trace(*arrays, *ranges).lower(lowering_platforms=("tpu",)).compile()
text = compiled.as_text()
assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward once, for what the layer keeps
for collective in ("all-gather", "all-to-all", "all-reduce(", "collective-permute"):
    assert collective not in text, collective
assert all(s.spec == by_head for s in compiled.output_shardings), compiled.output_shardings
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu, the TPU compiler, is not installed")
def test_compiles_for_eight_tpus():
    """Ahead of time: every device runs the kernels on its own part and asks no other for anything."""
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    alone = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=os.environ | alone | quiet, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4_000:]
