# SPDX-License-Identifier: Apache-2.0
"""Records of an evaluation, one JSON object a line, so that a killed one goes on where it stopped.

The first line holds the settings that decide the others: a file is gone on with under the same ones only.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.writers import Lines

Record = dict[str, Any]


class Records:
    """The records of one file, those that are there already and those added. Close it, or use `with`.

    Args:
      path: the file; its directory is made.
      settings: of the evaluation, JSON values.
      say: told of what is cut off or written again.

    Raises:
      ConfigError: the file was written under other settings, or holds a line that is no record.
    """

    def __init__(self, path: Path, settings: Record, say: Callable[[str], None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Record] = []
        if path.exists():
            _cut_torn_line(path, say)
            self.rows = _read(path)
        if self.rows:
            _check_settings(path, self.rows.pop(0), settings)
            self._lines = Lines(path, say)
        else:
            self._lines = Lines(path, say)
            self._lines.append(json.dumps({"settings": settings}, allow_nan=False))

    def add(self, rows: list[Record]) -> None:
        """Appends records. Raises StorageError where they cannot be written."""
        for row in rows:
            self._lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
            self.rows.append(row)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _cut_torn_line(path: Path, say: Callable[[str], None]) -> None:
    """A process that was killed as it wrote leaves a line without an end."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        say(f"{path}: its last line was cut short and is written again")
        os.truncate(path, whole)


def _read(path: Path) -> list[Record]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: not a record: remove the line, or choose another --out")
        rows.append(row)
    return rows


def _check_settings(path: Path, head: Record, settings: Record) -> None:
    old = head.get("settings")
    if not isinstance(old, dict):
        raise ConfigError(f"{path}: not a file of records: choose another --out")
    new = json.loads(json.dumps(settings))
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    if names:
        listed = ", ".join(f"{name} ({old.get(name)!r} there, {new.get(name)!r} here)" for name in names)
        raise ConfigError(f"{path} belongs to an evaluation with other settings: {listed}; choose another --out")
