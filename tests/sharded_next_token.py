# SPDX-License-Identifier: Apache-2.0
"""Next-token loss over meshes of eight simulated devices against one device; run by baselines/test_cpt.py.

python sharded_next_token.py FAMILY
"""

import sys

import jax
import numpy as np
from reference import rough_params
from sharded_phases import (
    DOCUMENTS,
    MESHES,
    MODELS,
    OF_A_GRADIENT,
    OF_ITS_LEAF,
    RATE,
    TOLERANCE,
    TRIED,
    VOCABULARY,
    off,
)
from slow_step import TEMPLATE, batch_of, recorder

from rlp_jax.baselines import cpt
from rlp_jax.config import Config, CPTConfig, MeshConfig
from rlp_jax.sharding import make_mesh, place_batch, place_state, state_shardings
from rlp_jax.state import init_state
from rlp_jax.train import in_place


def run(model, documents=DOCUMENTS, mesh_config=None):
    """Gradient, average and metrics of a step, as numpy."""
    mesh = mesh_config and make_mesh(mesh_config)
    config = Config(cpt=CPTConfig(sequence_tokens=32), mesh=mesh_config or MeshConfig())
    lengths = np.random.default_rng(1).integers(2, 13, documents)
    batch = place_batch(batch_of(VOCABULARY, length_B=lengths, T=12), mesh)
    optimizer = recorder(RATE)
    state = place_state(init_state(rough_params(model), optimizer), mesh)
    step = cpt.make_step(model, optimizer, TEMPLATE, config, mesh=mesh)
    state, metrics, _ = in_place(step.learn, state, mesh)(state, batch, None)
    if mesh is not None:
        wanted = jax.tree.leaves(state_shardings(state, mesh))
        for leaf, sharding in zip(jax.tree.leaves(state), wanted, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    metrics.pop("padding")  # each shard has sequences of its own
    return jax.tree.map(np.asarray, (state.opt_state, state.ema_params, metrics))


# Meshes, each with 16 documents or with 15, which do not divide and are replicated. Sampling has no part in this.
CASES = {
    family: [(name, DOCUMENTS) for name in names if "sampling" not in name] + [("two slices", DOCUMENTS - 1)]
    for family, names in TRIED.items()
}


def main(family: str):
    jax.config.update("jax_disable_most_optimizations", True)
    model = MODELS[family]
    plain = {documents: run(model, documents) for documents in (DOCUMENTS, DOCUMENTS - 1)}
    for name, documents in CASES[family]:
        got, wanted = run(model, documents, MESHES[name]), plain[documents]
        assert off(*map(jax.tree.leaves, (got[0], wanted[0]))) < OF_A_GRADIENT, name
        worst = max(off([x], [y]) for x, y in zip(*map(jax.tree.leaves, (got[0], wanted[0])), strict=True))
        assert worst < OF_ITS_LEAF, name
        for x, y in zip(*map(jax.tree.leaves, (got[1:], wanted[1:])), strict=True):
            assert off([x], [y], 0.1) < TOLERANCE, name
        print(f"{family} {name}, {documents} documents: off by {worst:.1e} at most", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1])
