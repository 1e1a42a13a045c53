# SPDX-License-Identifier: Apache-2.0
"""The step after a checkpoint on whatever devices there are, for tests that compare numbers of devices."""

import dataclasses
from importlib import import_module

import jax
import numpy as np
from rich.console import Console
from tiny_run import tiny_config

from rlp_jax import rlp
from rlp_jax.checkpoint import Checkpoints, Position
from rlp_jax.config import MeshConfig
from rlp_jax.distributed import Team
from rlp_jax.optimizer import make_optimizer
from rlp_jax.settings import fingerprint
from rlp_jax.sharding import place_batch
from rlp_jax.state import run_key

train = import_module("rlp_jax.train")  # `rlp_jax.train` of the package is the function


def next_step(root, run_dir, mesh: MeshConfig, save: bool = False) -> dict[str, np.ndarray]:
    """Restores a run of `tiny_config`, computes one step and saves it, if asked to.

    Returns:
      Arrays by name. "before ..." and "after ...": the state; "exact ...": what must not depend on the devices;
      "value ...": what may in rounding.
    """
    config = tiny_config(root, mesh=mesh)
    parts = train.prepare(config, Console(quiet=True), Team(), fresh=False)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        state, progress = train.start_or_resume(config, run_dir, parts, optimizer, checkpoints, Team())
    values = named("before", state) | {"exact step": np.asarray(state.step)}
    step = rlp.make_step(parts.model, optimizer, parts.tokens, config, mesh=parts.mesh)
    batch = place_batch(next(parts.batches), parts.mesh, config.batch_documents)
    key = run_key(config.seed, int(state.step))
    samples = step.sample(state.params, state.ema_params, batch, key)
    state, metrics, scores = train.in_place(step.learn, state, parts.mesh)(state, batch, samples)
    del metrics["padding"]  # of bins, one for each device at least
    exact = {"key": jax.random.key_data(key), "batch": batch, "position": samples.position_BK}
    exact |= {"thought": samples.thought_BKGL, "length": samples.length_BKG}
    values |= named("exact", exact) | named("value", (metrics, scores.reward_BKG, samples.s_ema_BKH))
    if save:
        where = (parts.batches.get_state(), {}, dataclasses.asdict(progress), fingerprint(config))
        with Checkpoints(run_dir, config.checkpoint) as checkpoints:
            checkpoints.save(state, Position(*where))
    return values | named("after", state)


def named(prefix, tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {f"{prefix} {jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
