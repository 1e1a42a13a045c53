# SPDX-License-Identifier: Apache-2.0
"""TrainState and keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlp_jax.state import Purpose, init_state, step_key


def test_average_starts_equal_in_memory_of_its_own():
    params = {"a": jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3)}
    state = init_state(params, optax.adam(1e-3))
    assert state.params["a"].dtype == state.ema_params["a"].dtype == jnp.float32
    np.testing.assert_array_equal(state.params["a"], state.ema_params["a"])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in (params["a"], state.params["a"], state.ema_params["a"])]
    assert len(set(pointers)) == 3


def test_a_donated_state_leaves_the_given_params_alone():
    params = {"a": jnp.ones((4, 4), jnp.float32)}
    state = init_state(params, optax.sgd(1.0))
    step = jax.jit(lambda s: s._replace(step=s.step + 1, params=jax.tree.map(jnp.sin, s.params)), donate_argnums=0)
    state = step(state)
    assert int(state.step) == 1
    np.testing.assert_array_equal(params["a"], np.ones((4, 4)))
    np.testing.assert_array_equal(state.ema_params["a"], np.ones((4, 4)))


def test_given_params_are_freed_where_they_are_to_be_consumed():
    params = {"a": jnp.arange(4.0), "b": jax.device_put(np.ones(3, np.float32))}
    state = init_state(params, optax.adam(1e-3), consume=True)
    assert params["a"].is_deleted() and params["b"].is_deleted()
    np.testing.assert_array_equal(state.params["a"], np.arange(4.0))
    np.testing.assert_array_equal(state.ema_params["b"], np.ones(3))


def test_keys_differ_by_seed_step_and_purpose_and_repeat():
    keys = {
        (seed, step, purpose): tuple(jax.random.key_data(step_key(seed, step, purpose)).tolist())
        for seed, step, purpose in itertools.product((0, 1), (0, 1, 2), Purpose)
    }
    assert len(set(keys.values())) == len(keys)
    again = jax.jit(lambda step: jax.random.key_data(step_key(1, step, Purpose.THOUGHTS)))(2)
    assert tuple(again.tolist()) == keys[1, 2, Purpose.THOUGHTS]
