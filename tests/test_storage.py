# SPDX-License-Identifier: Apache-2.0
"""Storage that fails for a while or for good: full disks, limits, directories that vanish or cannot be written to."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rlp_jax import storage, writers
from rlp_jax.checkpoint import Checkpoints, Position, steps
from rlp_jax.config import CheckpointConfig, OptimizerConfig
from rlp_jax.optimizer import make_optimizer
from rlp_jax.state import init_state
from rlp_jax.storage import StorageError, retried
from rlp_jax.writers import Lines, RunLog, TensorBoard, printer

POSITION = Position(data={}, logs={}, progress={}, fingerprint="f")


@pytest.fixture
def waits(monkeypatch):
    """Nobody waits; what is appended here is done in the waits, one after the other."""
    during = []
    sleep = types.SimpleNamespace(sleep=lambda seconds: during.pop(0)() if during else None)
    monkeypatch.setattr(storage, "time", sleep)  # not time.sleep itself, which others need
    return during


def state_of(step, size=100_000):
    key = jax.random.key(step)
    state = init_state({"kernel": jax.random.normal(key, (size,))}, make_optimizer(OptimizerConfig(), 10))
    return state._replace(step=jnp.int32(step))


def restored(run_dir, step):
    with Checkpoints(run_dir, CheckpointConfig(keep=9)) as checkpoints:
        state, _ = checkpoints.restore(jax.eval_shape(lambda: state_of(step)), "f")
    return state


def assert_is(state, step):
    assert state.step == step
    np.testing.assert_array_equal(state.params["kernel"], state_of(step).params["kernel"])


@contextlib.contextmanager
def file_limit(size):
    """No file of this process grows beyond this many bytes: a write of the system itself that fails, as on a full
    disk. Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_action_is_repeated_a_few_times_and_then_given_up(monkeypatch):
    waited, said, calls = [], [], []
    monkeypatch.setattr(storage, "time", types.SimpleNamespace(sleep=waited.append))

    def fails(times, error):
        def action():
            calls.append(1)
            if len(calls) <= times:
                raise error
            return "done"

        calls.clear()
        return action

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert retried(fails(2, full), Path("/run/file"), said.append) == "done"
    assert waited == list(storage.WAITS_S[:2]) and len(calls) == 3
    assert said[0] == "warning: /run/file: No space left on device; trying again in 1 s"
    with pytest.raises(StorageError, match="/run/file: No space left on device, 5 times: free space, then the"):
        retried(fails(99, full), Path("/run/file"), said.append)
    assert len(calls) == 1 + len(storage.WAITS_S) == 5
    with pytest.raises(StorageError, match="repair the storage"):
        retried(fails(99, OSError(errno.EIO, "Input/output error")), Path("x"), said.append)
    with pytest.raises(KeyError):
        retried(fails(99, KeyError("x")), Path("x"), said.append)
    assert len(calls) == 1
    hidden = ValueError("UNKNOWN: Error writing: [OS error 30: Read-only file system]")
    with pytest.raises(StorageError, match="make it writable"):
        retried(fails(99, hidden), Path("x"), said.append, (Exception,))


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch, waits):
    """Attempts that stop in the middle leave nothing."""
    said = []
    lines = Lines(tmp_path / "file", said.append)
    assert lines.size == 0 and not (tmp_path / "file").exists()
    lines.append("first — é")
    write, fails = os.write, [3]

    def half(descriptor, data):
        if not fails[0]:
            return write(descriptor, data)
        fails[0] -= 1
        write(descriptor, data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writers.os, "write", half)
    lines.append("second")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "first — é\nsecond\n"
    assert len(said) == 3 and lines.size == (tmp_path / "file").stat().st_size
    fails[0] = 99
    with pytest.raises(StorageError, match="file: No space left on device, 5 times"):
        lines.append("third")
    fails[0] = 0
    lines.append("fourth")
    assert (tmp_path / "file").read_text(encoding="utf-8").splitlines() == ["first — é", "second", "fourth"]
    lines.close()


def test_a_log_that_was_removed_or_replaced_is_noticed(tmp_path, waits):
    lines = Lines(tmp_path / "file", lambda text: None)
    lines.append("first")
    (tmp_path / "file").rename(tmp_path / "away")
    with pytest.raises(StorageError, match="file: No such file or directory, 5 times: bring the directory back"):
        lines.append("second")
    (tmp_path / "file").write_text("first\n")
    with pytest.raises(StorageError, match="another file has taken its place"):
        lines.sync()
    waits.append(lambda: (tmp_path / "away").rename(tmp_path / "file"))
    lines.append("second")
    assert (tmp_path / "file").read_text() == "first\nsecond\n"
    lines.close()


def test_tensorboard_misses_numbers_and_the_run_goes_on(tmp_path, monkeypatch):
    """A hundred rows: more than a writer's queue holds, which would wait for ever."""
    from tensorboardX.event_file_writer import EventsWriter

    said, broken = [], [True]
    write = EventsWriter.write_event

    def fails(writer, event):
        if broken[0] and event.step == 2:
            broken[0] = False
            raise OSError(errno.EIO, "Input/output error")
        return write(writer, event)

    monkeypatch.setattr(EventsWriter, "write_event", fails)
    board = TensorBoard(tmp_path / "tensorboard", None, said.append)
    for step in range(1, 101):
        board.add({"loss": 0.5}, step)
    board.close()
    assert said == [f"warning: {tmp_path / 'tensorboard'}: Input/output error; TensorBoard misses these numbers"]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_console_that_is_gone_does_not_end_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    printer(Console(file=Gone()))("text")
    with RunLog(tmp_path, 1, console=Console(file=Gone())) as log:
        log.step({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_a_save_that_failed_in_the_background_is_made_up_for_by_the_next(tmp_path, waits):
    said = []
    with Checkpoints(tmp_path, CheckpointConfig(keep=9), said.append) as checkpoints:
        checkpoints.save(state_of(1), POSITION, wait=True)
        with file_limit(100_000):
            checkpoints.save(state_of(2), POSITION)
            while checkpoints._manager.is_saving_in_progress():
                time.sleep(0.01)  # it has failed, and nobody has been told
        checkpoints.save(state_of(3), POSITION)
        assert any("File too large" in text and "saving step 3 now" in text for text in said)
        assert steps(tmp_path / "checkpoints") == [3, 1]
        checkpoints.save(state_of(4), POSITION)
    assert steps(tmp_path / "checkpoints") == [4, 3, 1]
    assert_is(restored(tmp_path, 4), 4)


def test_a_save_waits_for_storage_to_come_back(tmp_path, waits):
    said = []
    with Checkpoints(tmp_path, CheckpointConfig(keep=9), said.append) as checkpoints, file_limit(100_000) as lift:
        waits += [lambda: None, lift]
        checkpoints.save(state_of(1), POSITION, wait=True)
    assert sum("trying again" in text for text in said) == 2
    assert_is(restored(tmp_path, 1), 1)


def test_storage_that_stays_full_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, waits):
    with Checkpoints(tmp_path, CheckpointConfig(keep=9), lambda text: None) as checkpoints:
        checkpoints.save(state_of(1), POSITION, wait=True)
        with (
            file_limit(100_000),
            pytest.raises(StorageError, match=r"checkpoints/2: .*File too large.* 5 times: raise the limit") as error,
        ):
            checkpoints.save(state_of(2), POSITION, wait=True)
        assert "\n" not in str(error.value)
    assert steps(tmp_path / "checkpoints") == [1]
    assert_is(restored(tmp_path, 1), 1)


def test_a_last_save_that_fails_is_not_lost_on_the_way_out(tmp_path):
    with (
        pytest.raises(StorageError, match=r"the last save failed .*File too large.* goes on from the checkpoint"),
        file_limit(100_000),
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
    ):
        checkpoints.save(state_of(1), POSITION)
    said = []
    with (
        pytest.raises(KeyError),
        file_limit(100_000),
        Checkpoints(tmp_path, CheckpointConfig(), said.append) as checkpoints,
    ):
        checkpoints.save(state_of(1), POSITION)
        raise KeyError("the run's own error is the one to be seen")
    assert "File too large" in said[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte; mounting needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here; the limit on files stands in for it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk, waits):
    with Checkpoints(small_disk, CheckpointConfig(keep=9), lambda text: None) as checkpoints:
        checkpoints.save(state_of(1, 1000), POSITION, wait=True)
        with pytest.raises(StorageError, match=r"No space left on device.*free space, then the same command goes on"):
            checkpoints.save(state_of(2, 400_000), POSITION, wait=True)
        (small_disk / "ballast").write_bytes(bytes(600_000))
        waits += [lambda: None, (small_disk / "ballast").unlink]
        checkpoints.save(state_of(3, 30_000), POSITION, wait=True)
    assert steps(small_disk / "checkpoints") == [3, 1]


@pytest.fixture
def ordinary_user():
    """Not root, whom no permission stops; a directory of its own, since root's temporary ones are closed to others."""
    root = Path(tempfile.mkdtemp())
    if os.geteuid():
        yield root
    else:
        root.chmod(0o777)
        os.seteuid(65534)
        yield root
        os.seteuid(0)
    shutil.rmtree(root)


def test_a_directory_that_becomes_read_only(ordinary_user, waits):
    directory = ordinary_user / "checkpoints"
    with Checkpoints(ordinary_user, CheckpointConfig(keep=9), lambda text: None) as checkpoints:
        checkpoints.save(state_of(1, 10), POSITION, wait=True)
        directory.chmod(0o500)
        with pytest.raises(StorageError, match=r"Permission denied.*make it writable, then the same command goes on"):
            checkpoints.save(state_of(2, 10), POSITION, wait=True)
        waits.append(lambda: directory.chmod(0o700))
        checkpoints.save(state_of(3, 10), POSITION, wait=True)
    assert steps(directory) == [3, 1]


def test_a_directory_of_checkpoints_that_vanishes_is_begun_again(tmp_path, waits):
    with Checkpoints(tmp_path, CheckpointConfig(keep=9), lambda text: None) as checkpoints:
        checkpoints.save(state_of(1, 10), POSITION, wait=True)
        shutil.rmtree(tmp_path / "checkpoints")
        checkpoints.save(state_of(2, 10), POSITION, wait=True)
        checkpoints.save(state_of(3, 10), POSITION)
    assert set(steps(tmp_path / "checkpoints")) >= {3}
