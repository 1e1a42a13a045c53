# SPDX-License-Identifier: Apache-2.0
"""The optax chain, against AdamW written out in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.config import ConfigError, OptimizerConfig
from rlp_jax.optimizer import make_optimizer, make_schedule


def adamw_numpy(gradients, x, config, decay):
    m, v = np.zeros_like(x), np.zeros_like(x)
    for i, g in enumerate(gradients, start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        step = (m / (1 - config.beta1**i)) / (np.sqrt(v / (1 - config.beta2**i)) + 1e-8)
        x = x - config.learning_rate * (step + decay * x)
    return x


def test_adamw_with_decay_on_kernels_alone_and_clipping_by_global_norm():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=1.0)
    rng = np.random.default_rng(0)
    x = {"kernel": rng.normal(size=(3, 2)), "scale": rng.normal(size=(2,))}
    raw = [{name: rng.normal(size=leaf.shape) * 3 for name, leaf in x.items()} for _ in range(4)]
    optimizer = make_optimizer(config, updates=4)
    params = {"layer": {name: jnp.asarray(leaf, jnp.float32) for name, leaf in x.items()}}
    opt_state = optimizer.init(params)
    clipped = []
    for gradient in raw:
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        assert norm > 1
        clipped.append({name: leaf / norm for name, leaf in gradient.items()})
        tree = {"layer": {name: jnp.asarray(leaf, jnp.float32) for name, leaf in gradient.items()}}
        updates, opt_state = optimizer.update(tree, opt_state, params)
        params = {"layer": {name: params["layer"][name] + updates["layer"][name] for name in x}}
    for name, decay in (("kernel", 0.5), ("scale", 0.0)):
        expected = adamw_numpy([gradient[name] for gradient in clipped], x[name], config, decay)
        np.testing.assert_allclose(params["layer"][name], expected, rtol=2e-5)


def test_constant_after_warmup():
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), updates=10)
    np.testing.assert_allclose([schedule(i) for i in range(7)], [0.25, 0.5, 0.75, 1, 1, 1, 1], rtol=1e-6)


def test_cosine_reaches_the_final_rate_at_the_last_update():
    config = OptimizerConfig(learning_rate=1e-6, final_learning_rate=1e-7, warmup_steps=2)
    schedule = make_schedule(config, updates=12)
    middle = 1e-7 + 0.5 * (1e-6 - 1e-7)
    np.testing.assert_allclose([schedule(i) for i in (1, 2, 7, 12)], [1e-6, 1e-6, middle, 1e-7], rtol=1e-5)


def test_no_warmup_is_constant_from_the_first_update():
    schedule = make_schedule(OptimizerConfig(learning_rate=3e-4), updates=1)
    assert float(schedule(0)) == pytest.approx(3e-4)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps is 10, the run has 10 updates"):
        make_schedule(OptimizerConfig(warmup_steps=10), updates=10)
