"""Checkpoints: the train state and, beside it, everything else that a run needs to go on as if never stopped.

Orbax writes in the background and renames a finished checkpoint into place, so a killed run leaves none half written.
The `Position` holds the data iterator's place and how far each log file had been written: resuming cuts the logs
there, so that they show neither a gap nor a repeat.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import orbax.checkpoint as ocp

from rlp_jax.checkpoints_io.load import open_model
from rlp_jax.config import CheckpointConfig, Config
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.settings import from_json
from rlp_jax.sharding import with_shardings
from rlp_jax.state import TrainState

DIRECTORY = "checkpoints"
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


class Checkpoints:
    """The checkpoints of one run directory. Close it (or use `with`): saves are asynchronous."""

    def __init__(self, run_dir: Path, config: CheckpointConfig):
        self.directory = Path(run_dir).resolve() / DIRECTORY
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "position"))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, position: Position, wait: bool = False) -> None:
        """Saves under the state's step; nothing where that step is saved already. The state may be donated at once:
        Orbax copies it to the host before it returns."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    position=ocp.args.JsonSave(dataclasses.asdict(position)),
                ),
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, fingerprint: str) -> tuple[TrainState, Position]:
        """The latest checkpoint.

        Args:
          like: a state of the same shapes, dtypes and shardings (arrays or ShapeDtypeStructs).
          fingerprint: of the run's config.

        Raises:
          CheckpointError: there is none, it cannot be read, or it belongs to another config.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint")
        where = self.directory / str(step)
        abstract = jax.tree.map(_abstract, like._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            position = Position(**restored["position"])
        except Exception as error:  # Orbax and the stores below it raise types of their own
            raise unreadable(where, error) from error
        if position.fingerprint != fingerprint:
            raise CheckpointError(f"{where} belongs to another config: choose another run directory")
        return TrainState(**restored["state"]), position

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def latest_step(run_dir: Path) -> int | None:
    """The step of a run directory's latest checkpoint, None where there is none; writes nothing."""
    directory = Path(run_dir).resolve() / DIRECTORY
    if not directory.is_dir():
        return None
    with ocp.CheckpointManager(directory, options=READ_ONLY) as manager:
        return manager.latest_step()


def restore_params(
    run_dir: Path, like: chex.ArrayTree, names: tuple[str, ...] = ("params",)
) -> tuple[dict[str, chex.ArrayTree], int]:
    """Trees of parameters of a run directory's latest checkpoint, without the optimizer's state.

    Args:
      run_dir: a run directory.
      like: parameters of the same shapes: numpy arrays, on any device, or ShapeDtypeStructs.
      names: "params", "ema_params" or both.

    Returns:
      ({name: parameters on the default device}, step of the checkpoint).

    Raises:
      CheckpointError: no checkpoint, or it cannot be read.
    """
    directory = Path(run_dir).resolve() / DIRECTORY
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: the run has saved no checkpoint yet")
    with ocp.CheckpointManager(directory, options=READ_ONLY) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{directory} holds no checkpoint: the run has not saved one yet")
        tree = with_shardings(like, mesh=None)
        abstract = dict.fromkeys(names, tree)
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        try:
            restored = manager.restore(step, args=ocp.args.Composite(state=args))
        except Exception as error:  # as above
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


def load_run(run_dir: Path, names: tuple[str, ...] = ("params", "ema_params")) -> LoadedRun:
    """Model, tokenizer and trained parameters of a run directory; the weights it started from are not read.

    Args:
      run_dir: a run directory.
      names: "params", "ema_params" or both, what to read.

    Raises:
      ValueError: not a run directory, no checkpoint in it, or its model can no longer be found.
    """
    file = Path(run_dir) / "config.json"
    config = from_json(file.read_text(encoding="utf-8"), str(file))
    opened = open_model(config.model, config.compute_dtype)
    trained, step = restore_params(run_dir, opened.abstract(), names)
    return LoadedRun(config, opened.model, trained.get("params"), trained.get("ema_params"), opened.tokenizer, step)


def unreadable(where: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return CheckpointError(f"{where} cannot be read ({reason}): remove it to resume from the checkpoint before it")


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
