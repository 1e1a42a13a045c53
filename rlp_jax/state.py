# SPDX-License-Identifier: Apache-2.0
"""What a run carries from step to step, and where its random numbers come from.

Policy and baseline are two trees of one stateless module: `params` and `ema_params`, float32 masters both. Every key
of a run is a function of (seed, step, purpose), so a run that resumes at step n draws what it would have drawn.
"""

import enum
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of every run's randomness: add to the list, never renumber."""

    POSITIONS = 0
    THOUGHTS = 1
    EVALUATION = 2
    UPDATES = 3


class TrainState(NamedTuple):
    """step: int32 scalar, rollout batches seen, skipped ones included. params, ema_params: float32 trees of one shape.
    opt_state: the optax chain's."""

    step: chex.Array
    params: chex.ArrayTree
    ema_params: chex.ArrayTree
    opt_state: Any


def init_state(params: chex.ArrayTree, optimizer: optax.GradientTransformation, consume: bool = False) -> TrainState:
    """The state before the first step: float32 masters and phi = theta (specification, step 8).

    The average is a copy in memory of its own, because the learner donates the state: two leaves that share a buffer
    cannot both be donated. `params` itself stays usable, unless `consume`: then each of its leaves (jax arrays) is
    freed once it has been copied, so that memory holds one leaf more than the state and not a whole tree.
    """

    def own(leaf):
        copy = jnp.array(leaf, jnp.float32, copy=True)
        if consume:
            jax.block_until_ready(copy)
            leaf.delete()
        return copy

    params = jax.tree.map(own, params)
    ema_params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def run_key(seed: int, step: int | chex.Array) -> chex.PRNGKey:
    """A whole step's key, fold_in(key(seed), step), for code that folds in its own purposes."""
    return jax.random.fold_in(jax.random.key(seed), step)


def step_key(seed: int, step: int | chex.Array, purpose: Purpose | int) -> chex.PRNGKey:
    """fold_in(fold_in(key(seed), step), purpose): where every key of a run comes from."""
    return jax.random.fold_in(run_key(seed, step), int(purpose))
