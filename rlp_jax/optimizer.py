# SPDX-License-Identifier: Apache-2.0
"""The optax chain (clip by global norm, AdamW, constant or cosine learning rate after a linear warm-up), and its steps.

The paper states RLP's learning rate (1e-6, constant) and AdamW's settings for its continued-pretraining baseline; the
defaults in `config.OptimizerConfig` take both.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from rlp_jax import objective
from rlp_jax.config import ConfigError, OptimizerConfig
from rlp_jax.sharding import constrain_state
from rlp_jax.state import TrainState


def make_schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Learning rate by update count: linear warm-up that ends at `learning_rate` on update number `warmup_steps`
    (the first update is not wasted on a rate of zero), then constant, or a cosine to `final_learning_rate`.

    Args:
      config: the optimizer's settings.
      updates: optimizer updates in the whole run, the cosine's end.

    Raises:
      ConfigError: the warm-up does not fit into the run.
    """
    warmup = config.warmup_steps
    if not 0 <= warmup < max(updates, 1):
        raise ConfigError(f"optimizer.warmup_steps is {warmup}, the run has {updates} updates: make it smaller")
    if config.final_learning_rate is None:
        after = optax.constant_schedule(config.learning_rate)
    else:
        ratio = config.final_learning_rate / config.learning_rate
        after = optax.cosine_decay_schedule(config.learning_rate, max(updates - warmup, 1), alpha=ratio)
    if warmup == 0:
        return after
    first = optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([first, after], [warmup])


DECAYED = ("kernel", "embedding")


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Clip, then AdamW. Weight decay takes matrices alone: pulling a norm's gain, a bias, or the rate at which a
    recurrent state decays towards zero is not regularisation.

    Args:
      config: the optimizer's settings.
      updates: optimizer updates in the whole run (steps x updates_per_batch x minibatches).
    """

    def decayed(params):
        return jax.tree.map_with_path(lambda path, _: getattr(path[-1], "key", None) in DECAYED, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, updates),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


@jax.named_scope("update")
def apply_gradient(
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    step: jax.Array,
    grads: chex.ArrayTree,
    finite: jax.Array,
) -> TrainState:
    """One optimizer step, then the moving average's; a gradient that is not finite leaves all of it as it is.

    Args:
      step: of the state to come.
      finite: bool scalar.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = objective.ema_update(state.ema_params, params, ema_decay)
    proposed = TrainState(step, params, ema_params, opt_state)
    return constrain_state(jax.tree.map(lambda x, y: jnp.where(finite, x, y), proposed, state._replace(step=step)))
