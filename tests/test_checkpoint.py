# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: what goes in comes out, bit by bit; bad ones say so in a line."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from rlp_jax import manifest
from rlp_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Position,
    latest_step,
    restore_params,
    set_aside,
    steps,
    truncate_logs,
)
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


def saved(run_dir, count=3, **settings):
    """Checkpoints of steps 1 to `count`, and the state of each."""
    state, optimizer = some_state()
    states = {}
    with Checkpoints(run_dir, CheckpointConfig(**{"keep": count} | settings)) as checkpoints:
        for _ in range(count):
            state = advance(state, optimizer)
            states[int(state.step)] = state
            checkpoints.save(state, POSITION)
    return states


def largest(directory):
    """The checkpoint's largest file of arrays: a damage there is one of parameters."""
    return max((directory / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def cut(directory):
    os.truncate(largest(directory), largest(directory).stat().st_size // 2)


def flip(directory):
    data = bytearray(largest(directory).read_bytes())
    data[len(data) // 2] ^= 1
    largest(directory).write_bytes(data)


def half_delete(directory):
    for path in sorted(path for path in directory.rglob("*") if path.is_file())[::2]:
        path.unlink()


def lose_manifest(directory):
    (directory / "manifest.json").unlink()


def spoil_manifest(directory):
    (directory / "manifest.json").write_text('{"files": [1')


def clobber_metadata(directory):
    """Orbax's own notes, which come after the manifest; half of the checkpoint is gone too."""
    (directory / "_CHECKPOINT_METADATA").write_bytes(b"\xff{")
    cut(directory)


DAMAGES = (cut, flip, half_delete, lose_manifest, spoil_manifest, clobber_metadata)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_used(tmp_path, damage):
    states, said = saved(tmp_path), []
    directory = tmp_path / "checkpoints"
    damage(directory / "3")
    kept = {path: path.read_bytes() for path in (directory / "3").rglob("*") if path.is_file()}
    like = jax.tree.map(np.asarray, states[3].params)
    params, step = restore_params(tmp_path, like, say=said.append)
    assert step == 2 and (directory / "3").is_dir()  # reading moves nothing
    assert_same(params["params"], states[2].params)
    assert len(said) == 1 and f"checkpoint {directory / '3'} is damaged" in said[0]

    said.clear()
    with Checkpoints(tmp_path, CheckpointConfig(keep=3), said.append) as checkpoints:
        restored, position = checkpoints.restore(jax.eval_shape(lambda: states[3]), "f")
        assert_same(restored, states[2])
        assert position == POSITION
        assert "is damaged" in said[0] and said[1].endswith(f"moved to {directory / '3.damaged'}")
        checkpoints.save(states[3], POSITION, wait=True)  # its place is free
        again, _ = checkpoints.restore(jax.eval_shape(lambda: states[3]), "f")
    assert_same(again, states[3])
    moved = [directory / "3.damaged" / path.relative_to(directory / "3") for path in kept]
    assert [path.read_bytes() for path in moved] == list(kept.values())
    assert set_aside(directory / "3").name == "3.damaged.1"


def test_every_file_of_a_checkpoint_is_covered(tmp_path):
    """Whichever bit of whichever file flips, it is seen."""
    saved(tmp_path, 1)
    directory = tmp_path / "checkpoints" / "1"
    assert manifest.fault(directory) is None
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in manifest.LATER]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 16]))
        assert manifest.fault(directory) == f"the contents of {path.relative_to(directory)} changed"
        path.unlink()
        assert manifest.fault(directory) == f"{path.relative_to(directory)} is missing"
        path.write_bytes(data)
    assert manifest.fault(directory) is None


def test_orbaxs_own_notes_do_not_matter(tmp_path):
    """The files that the manifest leaves out."""
    states = saved(tmp_path, 1)
    for name in manifest.LATER - {manifest.FILE}:
        (tmp_path / "checkpoints" / "1" / name).write_bytes(b"\xff{")
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert_same(checkpoints.restore(jax.eval_shape(lambda: states[1]), "f")[0], states[1])
    assert_same(restore_params(tmp_path, jax.tree.map(np.asarray, states[1].params))[0]["params"], states[1].params)


def test_no_intact_checkpoint_ends_the_run_and_moves_none(tmp_path):
    states = saved(tmp_path, 2)
    for step in (1, 2):
        flip(tmp_path / "checkpoints" / str(step))
    message = r"no intact checkpoint \(2: the contents of state.* changed; 1: .*\): restore one, or remove all of them"
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(states[2], "f")
    with pytest.raises(CheckpointError, match=message):
        restore_params(tmp_path, states[2].params)
    assert steps(tmp_path / "checkpoints") == [2, 1]


def test_an_intact_checkpoint_of_another_kind_is_not_moved(tmp_path):
    states = saved(tmp_path, 2)
    other = jax.eval_shape(lambda: states[2]._replace(opt_state={"other": jnp.ones(3)}))
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match=r"checkpoints/2 cannot be read .* remove it"),
    ):
        checkpoints.restore(other, "f")
    assert steps(tmp_path / "checkpoints") == [2, 1]


def test_a_device_or_a_peer_that_fails_is_not_the_checkpoints_fault(tmp_path, monkeypatch):
    states = saved(tmp_path, 1)

    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: planted")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(jax.errors.JaxRuntimeError, match="planted"),
    ):
        checkpoints.restore(states[1], "f")
    with pytest.raises(jax.errors.JaxRuntimeError, match="planted"):
        restore_params(tmp_path, states[1].params)


def test_some_are_kept_for_good(tmp_path):
    saved(tmp_path, 7, keep=2, keep_every=3)
    assert steps(tmp_path / "checkpoints") == [7, 6, 3]


def test_old_ones_that_a_killed_run_had_not_come_to_delete_are_deleted_when_it_resumes(tmp_path):
    state = saved(tmp_path, 7, keep=7)[7]
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "state")  # half deleted
    with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=3)) as checkpoints:
        restored, _ = checkpoints.restore(state, "f")
    assert int(restored.step) == 7 and steps(tmp_path / "checkpoints") == [7, 6, 3]


def test_no_intact_one_is_deleted_for_the_sake_of_damaged_ones(tmp_path):
    state = saved(tmp_path, 4, keep=4)[4]
    for step in (3, 4):
        flip(tmp_path / "checkpoints" / str(step))
    with Checkpoints(tmp_path, CheckpointConfig(keep=2), lambda text: None) as checkpoints:
        restored, _ = checkpoints.restore(state, "f")
    assert int(restored.step) == 2 and steps(tmp_path / "checkpoints") == [2, 1]


def test_what_a_killed_save_left_is_removed(tmp_path):
    states = saved(tmp_path, 1)
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(states[1]._replace(step=jnp.int32(2)), POSITION, wait=True)
    assert not left.exists() and steps(tmp_path / "checkpoints") == [2, 1]


def test_logs_are_cut_at_the_recorded_byte_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("one\ntwo\nthree\n")
    (tmp_path / "b").write_text("one\n")
    with pytest.raises(CheckpointError, match="b holds 4 bytes, the checkpoint recorded 8"):
        truncate_logs(tmp_path, {"a": 4, "b": 8})
    assert (tmp_path / "a").read_text() == "one\ntwo\nthree\n"
    truncate_logs(tmp_path, {"a": 8, "b": 4, "never written": 0})
    assert (tmp_path / "a").read_text() == "one\ntwo\n"
    assert (tmp_path / "b").read_text() == "one\n"
