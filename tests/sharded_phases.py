# SPDX-License-Identifier: Apache-2.0
"""Every phase of a step on meshes of eight simulated devices against one device; run by test_sharded_phases.py.

    python sharded_phases.py FAMILY

The learner does plain gradient descent and keeps its last gradient: that compares gradients and parameters, where
Adam's first updates would only compare their signs.
"""

import dataclasses
import re
import sys

import jax
import numpy as np
from hybrids import hybrid
from reference import rough_params
from slow_step import SETTINGS, TEMPLATE, batch_of, recorder, small

from rlp_jax import rlp
from rlp_jax.aot.hlo_cost import replica_groups
from rlp_jax.config import Config, EvalConfig, MeshConfig
from rlp_jax.evals.likelihood import evaluate
from rlp_jax.sharding import make_mesh, place_batch, place_state, state_shardings
from rlp_jax.state import init_state
from rlp_jax.train import in_place

DOCUMENTS, VOCABULARY, RATE = 16, 16, 0.02

# Blocks in loops, as sequences of useful length have. Key heads and groups of Mamba heads divide over two devices, not
# over four, where every device then computes them all.
MODELS = {
    "dense": small("qwen3", n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCABULARY, attention="blocked"),
    "hybrid": hybrid("M*-M*-", vocab_size=VOCABULARY, attention="blocked"),
}
MESHES = {
    "8x1x1": MeshConfig(),
    "1x8x1": MeshConfig(data=1, fsdp=8),
    "2x2x2": MeshConfig(fsdp=2, tensor=2),
    "1x2x4": MeshConfig(data=1, fsdp=2, tensor=4),
    "two slices": MeshConfig(slices=2, fsdp=2, tensor=2, rollout="gathered"),
    "1x8x1, sampling 1x2x4": MeshConfig(data=1, fsdp=8, rollout="gathered", rollout_tensor=4),
}
# Which of them a family is tried on: hybrids, which take longest to compile, on those that split most.
TRIED = {"dense": tuple(MESHES), "hybrid": ("1x2x4", "two slices", "1x8x1, sampling 1x2x4")}
# Sums over devices are taken in another order: float32 keeps 1e-7 of each, and a few layers and exponentials add up.
# In a gradient large terms cancel, since advantages sum to zero: one device with its documents in twice as many parts
# is off by 6e-6 of the hybrid's, and by more in small leaves.
TOLERANCE, OF_A_GRADIENT, OF_ITS_LEAF = 1e-5, 3e-5, 1e-4


def run(model, mesh_config=None):
    """What each phase gives, by name."""
    mesh = mesh_config and make_mesh(mesh_config)
    settings = dataclasses.replace(SETTINGS, microbatches=2)
    config = Config(rlp=settings, mesh=mesh_config or MeshConfig(), eval=EvalConfig(positions=1, group_size=2))
    several = dataclasses.replace(config, rlp=dataclasses.replace(settings, microbatches=1, minibatches=2))
    rng = np.random.default_rng(1)
    batch = batch_of(VOCABULARY, length_B=rng.integers(2, 13, DOCUMENTS), T=12)
    batch = place_batch(batch, mesh)
    optimizer, found = recorder(RATE), {}

    def start():
        state = init_state(rough_params(model), optimizer)._replace(ema_params=rough_params(model, 1))
        return place_state(jax.tree.map(jax.numpy.array, state), mesh)

    for name, own in {"one": config, "several": several}.items():
        step, state = rlp.make_step(model, optimizer, TEMPLATE, own, mesh=mesh), start()
        given = state.params, state.ema_params, batch, jax.random.key(3)
        sample = step.sample.lower(*given).compile()
        samples = sample(*given)
        found[f"{name} samples"] = samples._asdict()
        state, metrics, scores = in_place(step.learn, state, mesh)(state, batch, samples)
        found[f"{name} learnt"] = {"params": state.params, "ema": state.ema_params}
        found[f"{name} gradient"] = state.opt_state
        found[f"{name} scores"], found[f"{name} metrics"] = scores._asdict(), metrics
        if mesh is not None:
            check_layout(state, samples, mesh)
            # Known to fail where a hybrid samples over other axes: scores of its attention are gathered.
            if not (model.config.hybrid and mesh_config.rollout_tensor):
                check_documents_stay(sample.as_text(), mesh_config.rollout_tensor or mesh.shape["tensor"])
    state = start()
    result = evaluate(model, state.params, state.ema_params, [batch], TEMPLATE, config, jax.random.key(5))
    return jax.tree.map(np.asarray, found | {"evaluation": result})


def check_layout(state, samples, mesh):
    """Nothing that should be split has become whole on the way."""
    wanted = jax.tree.leaves(state_shardings(state, mesh))
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(state), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (jax.tree_util.keystr(path), leaf.sharding.spec)
    ways = mesh.devices.size // mesh.shape["tensor"]
    assert samples.thought_BKGL.addressable_shards[0].data.shape[0] == DOCUMENTS // ways


def check_documents_stay(program: str, tensor: int):
    """While thoughts are sampled no document, cache or ring is gathered from other devices: only weights, which have
    two axes here and at most VOCABULARY rows, and what is split over 'tensor' of a device's own documents."""
    moved = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)\((.*)", program)
    assert moved
    for dimensions, attributes in moved:
        shape, groups = list(map(int, dimensions.split(","))), replica_groups(attributes)
        assert groups, attributes
        along_tensor = all(len({device // tensor for device in group}) == 1 for group in groups)
        whole = shape[0] % DOCUMENTS == 0 and (len(shape) > 2 or shape[0] > VOCABULARY)
        assert along_tensor or not whole, f"gathered over documents: {shape}"


def off(ours, theirs, floor=0.0):
    """The error of a list of arrays together, over their size."""
    size = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in theirs))
    error = np.sqrt(sum(np.square(np.float64(x) - y).sum() for x, y in zip(ours, theirs, strict=True)))
    return error / max(size, floor)


def compare(ours, theirs, name):
    """Each array to its tolerance, whole numbers exactly. Returns the largest error."""
    worst = 0.0
    for phase, wanted in theirs.items():
        leaves = jax.tree.leaves(ours[phase])
        tolerance, floor = (
            (OF_ITS_LEAF, 0.0) if "gradient" in phase else (TOLERANCE, 0.1)
        )  # nats: 1e-6 of them is nothing
        for (path, other), one in zip(jax.tree.leaves_with_path(wanted), leaves, strict=True):
            where = f"{name}, {phase} {jax.tree_util.keystr(path)}"
            if not np.issubdtype(np.asarray(other).dtype, np.floating):
                np.testing.assert_array_equal(one, other, err_msg=where)
            elif "padding" not in where:  # each shard has bins of its own
                error = off([one], [other], floor)
                # A norm is off by no more than the gradient is, and by as much where that error points along it.
                assert error < (OF_A_GRADIENT if "grad_norm" in where else tolerance), (where, error)
                worst = max(worst, error)
        if "gradient" in phase:
            assert off(leaves, jax.tree.leaves(wanted)) < OF_A_GRADIENT, (name, phase)
    return worst


def main(family: str):
    jax.config.update("jax_disable_most_optimizations", True)
    model = MODELS[family]
    plain = run(model)
    lengths = plain["one samples"]["length_BKG"]
    assert len(np.unique(lengths)) > 3 and 0 < plain["one samples"]["stopped_BKG"].mean() < 1
    assert not plain["one samples"]["valid_BK"].all()  # a document too short for its positions
    for name in TRIED[family]:
        worst = compare(run(model, MESHES[name]), plain, name)
        print(f"{family} {name}: off by {worst:.1e} at most", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1])
