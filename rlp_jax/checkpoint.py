# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the train state and, beside it, everything else that a run needs to go on as if never stopped.

Orbax writes in the background and renames a finished checkpoint into place, so a killed run leaves none half written.
A manifest (manifest.py) tells damaged ones, and the newest that is intact is used. The `Position` holds the data
iterator's place and how far each log file had been written: resuming cuts the logs there, so that they show neither a
gap nor a repeat.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rlp_jax import manifest
from rlp_jax.checkpoints_io.load import open_model
from rlp_jax.config import CheckpointConfig, Config
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.settings import read_config
from rlp_jax.sharding import with_shardings
from rlp_jax.state import TrainState
from rlp_jax.storage import StorageError, advice, reason, retried

DIRECTORY = "checkpoints"
SLOWEST_SAVE_S = 1800
STORE_ERRORS = (OSError, ValueError, RuntimeError)  # what Orbax and the stores below it raise where storage fails
READ_ONLY = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable or of another run: one line naming it and what to do."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Everything of a run outside its train state, JSON throughout.

    data: the batch iterator's get_state(). logs: file name to bytes written. progress: counters of the loop.
    fingerprint: of the config (less its number of steps).
    """

    data: Any
    logs: dict[str, int]
    progress: dict[str, Any]
    fingerprint: str


def on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run directory. Close it (or use `with`): saves are asynchronous.

    Args:
      run_dir: a run directory.
      config: how often they are saved is the caller's business, how many are kept is done here.
      say: told of checkpoints that are damaged or could not be saved.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, say: Callable[[str], None] = on_stderr):
        self.directory = Path(run_dir).resolve() / DIRECTORY
        self._config, self._say = config, say
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        """Removes what an unfinished save has left."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep,
            keep_period=self._config.keep_every or None,
            enable_async_checkpointing=True,
            # Created in the background, a directory that cannot be leaves threads that wait for it.
            async_options=ocp.AsyncOptions(timeout_secs=SLOWEST_SAVE_S, create_directories_asynchronously=False),
            cleanup_tmp_directories=True,
            temporary_path_class=manifest.SealedPath,
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=("state", "position"))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, position: Position, wait: bool = False) -> None:
        """Saves under the state's step; nothing where that step is saved already. The state may be donated at once:
        Orbax copies it to the host before it returns.

        A save that fails in the background is found out by the next one, which then is tried until it succeeds.

        Raises:
          StorageError: it kept failing. The checkpoints before it are as they were.
        """
        step = int(state.step)

        def attempt(wait: bool) -> None:
            if step not in self._manager.all_steps():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(state._asdict()),
                        position=ocp.args.JsonSave(dataclasses.asdict(position)),
                    ),
                )
            if wait:
                self._manager.wait_until_finished()

        def again() -> None:
            self._reopen()
            attempt(wait=True)

        try:
            attempt(wait)
        except STORE_ERRORS as error:
            if jax.process_count() > 1:  # the others have not failed and would not try again with this one
                raise self._lost(error) from error
            self._say(f"warning: {self.directory}: {reason(error)}; saving step {step} now")
            retried(again, self.directory / str(step), self._say, STORE_ERRORS)

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises StorageError where it failed."""
        try:
            self._manager.wait_until_finished()
        except STORE_ERRORS as error:
            raise self._lost(error) from error

    def restore(self, like: TrainState, fingerprint: str) -> tuple[TrainState, Position]:
        """The latest checkpoint that is intact; newer ones are moved aside, as `NAME.damaged`.

        Args:
          like: a state of the same shapes, dtypes and shardings (arrays or ShapeDtypeStructs).
          fingerprint: of the run's config.

        Raises:
          CheckpointError: there is none, it cannot be read, or it belongs to another config.
        """
        step = self._latest_intact()
        where = self.directory / str(step)
        abstract = jax.tree.map(_abstract, like._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            position = Position(**restored["position"])
        except jax.errors.JaxRuntimeError:  # of a device or another process: the checkpoint may be sound
            raise
        except Exception as error:  # Orbax raises many types here
            raise unreadable(where, error) from error
        if position.fingerprint != fingerprint:
            raise CheckpointError(f"{where} belongs to another config: choose another run directory")
        self._delete_surplus(step)
        return TrainState(**restored["state"]), position

    def _delete_surplus(self, newest: int) -> None:
        """Those that a run killed after its last save had not come to delete: there may be no other save to do it."""
        every = self._config.keep_every or sys.maxsize
        older = sorted((step for step in self._manager.all_steps() if step <= newest), reverse=True)
        try:
            for step in older[self._config.keep :]:
                if step % every:
                    self._manager.delete(step)
        except STORE_ERRORS as error:  # it takes up space, and the run can go on
            self._say(f"warning: {self.directory / str(step)} cannot be deleted: {reason(error)}")

    def _latest_intact(self) -> int:
        """Its step, the same in all processes: the first one reads and moves."""
        step = 0
        if jax.process_index() == 0:
            step, damaged = latest_intact(self.directory, self._say)
            for bad in damaged:
                self._say(f"warning: {self.directory / str(bad)} moved to {set_aside(self.directory / str(bad))}")
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        self._manager.reload()
        return step

    def _lost(self, error: Exception) -> StorageError:
        return StorageError(
            f"{self.directory}: the last save failed ({reason(error)}): {advice(error)}, then the same command goes on "
            "from the checkpoint before it"
        )

    def _reopen(self) -> None:
        """Forgets a save that failed."""
        try:
            self._manager.close()
        except STORE_ERRORS as error:  # what is known already, or follows from it
            self._say(f"warning: {self.directory}: {reason(error)}")
        self._manager = self._open()

    def close(self) -> None:
        """Waits for the last save. Raises StorageError where it failed."""
        self.wait()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        try:
            self.close()
        except StorageError as lost:
            if kind is None:
                raise
            self._say(f"warning: {lost}")  # the error that ends the run is another one


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a run's directory of them, the newest first."""
    return sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)


def latest_step(run_dir: Path) -> int | None:
    """The step of a run directory's latest checkpoint, None where there is none; writes nothing."""
    return next(iter(steps(Path(run_dir) / DIRECTORY)), None)


def latest_intact(directory: Path, say: Callable[[str], None]) -> tuple[int, list[int]]:
    """The newest checkpoint that is as it was written, and the newer ones that are not. Writes nothing.

    Args:
      directory: a run's directory of checkpoints. A run that goes on may add some meanwhile and delete others.
      say: told what is wrong with each damaged one.

    Raises:
      CheckpointError: there is none.
    """
    damaged: dict[int, str] = {}
    while left := [step for step in steps(directory) if step not in damaged]:
        where = directory / str(left[0])
        found = manifest.fault(where, say)
        if found is None:
            return left[0], [step for step in damaged if (directory / str(step)).exists()]
        damaged[left[0]] = found
        say(f"warning: checkpoint {where} is damaged and not used: {found}")
    if damaged:
        listed = "; ".join(f"{step}: {found}" for step, found in damaged.items())
        raise CheckpointError(f"{directory} holds no intact checkpoint ({listed}): restore one, or remove all of them")
    raise CheckpointError(f"{directory} holds no checkpoint: the run has not saved one yet")


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to a name that nothing reads, which it returns."""
    names = (path.with_name(f"{path.name}.damaged{f'.{i}' if i else ''}") for i in range(sys.maxsize))
    new = next(name for name in names if not name.exists())
    os.rename(path, new)
    return new


def restore_params(
    run_dir: Path,
    like: chex.ArrayTree,
    names: tuple[str, ...] = ("params",),
    say: Callable[[str], None] = on_stderr,
    mesh: Mesh | None = None,
) -> tuple[dict[str, chex.ArrayTree], int]:
    """Trees of parameters of a run directory's latest intact checkpoint, without the optimizer's state. Writes nothing.

    Args:
      run_dir: a run directory.
      like: parameters of the same shapes: numpy arrays, on any device, or ShapeDtypeStructs.
      names: "params", "ema_params" or both.
      say: told of damaged checkpoints.
      mesh: shard the parameters over it.

    Returns:
      ({name: parameters on the mesh or else on the default device}, step of the checkpoint).

    Raises:
      CheckpointError: no checkpoint, or it cannot be read.
    """
    directory = Path(run_dir).resolve() / DIRECTORY
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: the run has saved no checkpoint yet")
    step, _ = latest_intact(directory, say)
    with ocp.CheckpointManager(directory, options=READ_ONLY) as manager:
        tree = with_shardings(like, mesh)
        abstract = dict.fromkeys(names, tree)
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        try:
            restored = manager.restore(step, args=ocp.args.Composite(state=args))
        except jax.errors.JaxRuntimeError:  # as above
            raise
        except Exception as error:
            raise unreadable(directory / str(step), error) from error
    return restored["state"], step


class LoadedRun(NamedTuple):
    """A run directory's latest checkpoint, with what it needs to be used. Trees that were not asked for are None."""

    config: Config
    model: LanguageModel
    params: chex.ArrayTree
    ema_params: chex.ArrayTree
    tokenizer: Any
    step: int


def load_run(run_dir: Path, names: tuple[str, ...] = ("params", "ema_params"), mesh: Mesh | None = None) -> LoadedRun:
    """Model, tokenizer and trained parameters of a run directory; the weights it started from are not read.

    Args:
      run_dir: a run directory.
      names: "params", "ema_params" or both, what to read.
      mesh: shard the parameters over it.

    Raises:
      ValueError: not a run directory, no checkpoint in it, or its model can no longer be found.
    """
    config = read_config(run_dir)
    opened = open_model(config.model, config.compute_dtype)
    trained, step = restore_params(run_dir, opened.abstract(), names, mesh=mesh)
    return LoadedRun(config, opened.model, trained.get("params"), trained.get("ema_params"), opened.tokenizer, step)


def unreadable(where: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{where} cannot be read ({reason(error)}): remove it to resume from the one before it")


def truncate_logs(run_dir: Path, logs: dict[str, int]) -> None:
    """Cuts each log file back to the bytes it held at a checkpoint; a file of 0 bytes need not exist.

    Raises:
      CheckpointError: a file is shorter than the checkpoint says; nothing is cut then.
    """
    paths = {Path(run_dir) / name: size for name, size in logs.items()}
    for path, size in paths.items():
        held = path.stat().st_size if path.exists() else 0
        if held < size:
            raise CheckpointError(
                f"{path} holds {held} bytes, the checkpoint recorded {size}: restore the file or start a new run"
            )
    for path, size in paths.items():
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
