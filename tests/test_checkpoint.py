"""Orbax checkpoints: what goes in comes out, bit by bit; bad ones say so in a line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlp_jax.checkpoint import CheckpointError, Checkpoints, Position, latest_step, restore_params, truncate_logs
from rlp_jax.config import CheckpointConfig, OptimizerConfig
from rlp_jax.optimizer import make_optimizer
from rlp_jax.state import init_state


def some_state(seed=0):
    optimizer = make_optimizer(OptimizerConfig(), 10)
    key = jax.random.key(seed)
    params = {"layer": {"kernel": jax.random.normal(key, (8, 4)), "scale": jnp.ones(4)}}
    return init_state(params, optimizer), optimizer


def advance(state, optimizer):
    gradient = jax.tree.map(jnp.cos, state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return state._replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


POSITION = Position(data={"next": [1, 2]}, logs={"metrics.jsonl": 12}, progress={"skipped": 0}, fingerprint="f")


def test_round_trip_is_bitwise_and_keeps_the_newest(tmp_path):
    state, optimizer = some_state()
    step = jax.jit(lambda s: advance(s, optimizer), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        assert checkpoints.latest_step() is None is latest_step(tmp_path)
        for _ in range(4):
            state = step(state)  # donates what the save before it is still writing
            checkpoints.save(state, POSITION)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["3", "4"]
    assert latest_step(tmp_path) == 4 and latest_step(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    fresh, _ = some_state(seed=1)
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        restored, position = checkpoints.restore(jax.eval_shape(lambda: fresh), "f")
    assert position == POSITION
    assert_same(restored, state)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    state, optimizer = some_state()
    step = jax.jit(lambda s: advance(s, optimizer), donate_argnums=0)
    state = step(state)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, POSITION)
        for _ in range(20):
            state = step(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state), "f")
    assert_same(restored, expected)


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    state, _ = some_state()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, POSITION, wait=True)
        checkpoints.save(state, POSITION, wait=True)
        assert checkpoints.latest_step() == 0


def test_params_or_their_average_alone(tmp_path):
    state, optimizer = some_state()
    state = advance(state, optimizer)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, POSITION)
    like = jax.tree.map(np.asarray, state.params)
    for names in (("params",), ("ema_params",), ("params", "ema_params")):
        restored, step = restore_params(tmp_path, like, names)
        assert step == 1
        assert_same(restored, {name: getattr(state, name) for name in names})
    assert not np.array_equal(state.params["layer"]["kernel"], state.ema_params["layer"]["kernel"])


def test_missing_foreign_and_corrupt_checkpoints(tmp_path):
    state, _ = some_state()
    with pytest.raises(CheckpointError, match="does not exist"):
        restore_params(tmp_path, state.params)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoints.restore(state, "f")
        checkpoints.save(state, POSITION, wait=True)
        with pytest.raises(CheckpointError, match="belongs to another config"):
            checkpoints.restore(state, "g")
        for path in (tmp_path / "checkpoints" / "0" / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match=r"checkpoints/0 cannot be read .* remove it"):
            checkpoints.restore(state, "f")
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore_params(tmp_path, state.params)


def test_logs_are_cut_at_the_recorded_byte_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("one\ntwo\nthree\n")
    (tmp_path / "b").write_text("one\n")
    with pytest.raises(CheckpointError, match="b holds 4 bytes, the checkpoint recorded 8"):
        truncate_logs(tmp_path, {"a": 4, "b": 8})
    assert (tmp_path / "a").read_text() == "one\ntwo\nthree\n"
    truncate_logs(tmp_path, {"a": 8, "b": 4, "never written": 0})
    assert (tmp_path / "a").read_text() == "one\ntwo\n"
    assert (tmp_path / "b").read_text() == "one\n"
