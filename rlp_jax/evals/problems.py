# SPDX-License-Identifier: Apache-2.0
"""Where problems come from: a .jsonl file, a directory of them, or a Hugging Face dataset (package `datasets`)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.data.sources import read_records
from rlp_jax.evals.tasks import Problem, Task, read_problem


def read_problems(task: Task, data: str | None, limit: int | None = None) -> list[Problem]:
    """The problems of a task, in the order of their source.

    Args:
      data: a .jsonl file; a directory, in which the one whose name begins as the task's files do is taken; a dataset as
        NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; None: the task's usual dataset.
      limit: the first so many.

    Raises:
      ConfigError: no such data, no problem in it, or a record that cannot be used.
    """
    problems = []
    for number, (record, place) in enumerate(records(task, data)):
        if limit is not None and number >= limit:
            break
        problems.append(read_problem(task, record, number, place))
    if not problems:
        raise ConfigError(f"--data {data} holds no problem for {task.name}")
    return problems


def records(task: Task, data: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Records with their places. Arguments and errors as those of `read_problems`."""
    if data is not None and Path(data).exists():
        return read_records(file_of(task, Path(data)))
    if data is not None and data.endswith((".jsonl", ".json", "/")):
        raise ConfigError(f"--data: no file or directory {data}")
    return _from_hub(task, data)


def file_of(task: Task, path: Path) -> Path:
    """The file itself, or the one of a directory that belongs to the task.

    Raises:
      ConfigError: another kind of file, or none or several in the directory.
    """
    if path.is_file():
        if path.suffix != ".jsonl":
            raise ConfigError(f"--data: {path} is no .jsonl file, one JSON object a line")
        return path
    found = sorted(file for file in path.glob("*.jsonl") if file.name.lower().startswith(task.files))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConfigError(
            f"--data: {path} should hold one .jsonl file for {task.name}, its name beginning with "
            f"{' or '.join(task.files)}; found {names}"
        )
    return found[0]


def _from_hub(task: Task, data: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    name, config, split = task.hub
    if data is not None:
        name, _, rest = data.partition(":")
        config, _, split = rest.partition(":")
        config, split = config or None, split or "test"
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError(
            f"--data: {data or name} is no file here, and Hugging Face datasets need a library: pip install datasets"
        ) from None
    try:
        rows: Iterable[dict] = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and those below it raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = f"{name} (config {config}, split {split})"
        raise ConfigError(f"--data: the dataset {where} cannot be had: {reason}") from None
    return ((row, f"{name}:{number}") for number, row in enumerate(rows))
