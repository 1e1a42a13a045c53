# SPDX-License-Identifier: Apache-2.0
"""Scalars to Weights & Biases (`--wandb PROJECT`), beside TensorBoard. The library is imported only where it is used.

`WANDB_MODE=offline` keeps everything below the run directory; `wandb sync` sends it later. A run that is resumed goes
on in the same W&B run: its id follows from the run directory.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.goodput import STARTED


def check_wandb(project: str) -> None:
    """Raises ConfigError where the library is absent or the project's name cannot be one."""
    if not project or set(project) & set("/\\#?%:"):
        raise ConfigError(f"--wandb is {project!r}: a project's name is not empty and has none of / \\ # ? % :")
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs a library: pip install 'rlp_jax[wandb]'")


class Wandb:
    """A W&B run. A failure there is said once and ends the logging to it, not the training.

    Args:
      project: its name.
      run_dir: the run's directory; W&B's own files go into `wandb/` in it.
      config: the run's settings, nested.
      say: told of failures.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any], say: Callable[[str], None]):
        self._say, self._run = say, None
        started = Path(run_dir) / STARTED  # a run that begins anew in the same place is another one
        where = str(Path(run_dir).resolve()) + (started.read_text() if started.is_file() else "")
        try:
            import wandb

            self._run = wandb.init(
                project=project, name=Path(run_dir).name, id=hashlib.sha256(where.encode()).hexdigest()[:16],
                resume="allow", dir=str(run_dir), config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Exception as error:
            self._give_up(error)

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        if self._run is not None:
            try:
                self._run.log({**scalars, "step": step}, step=step)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Writes what is left."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(f"warning: Weights & Biases: {' '.join(str(error).split()) or type(error).__name__}; "
                  "it misses the numbers from here on")  # fmt: skip
