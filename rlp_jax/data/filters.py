# SPDX-License-Identifier: Apache-2.0
"""What of the documents was left out, and what was kept but is worth knowing: counted, and listed one by one.

`filtered.jsonl` holds one object a line: place ("file:line"), reason (`REASONS`), detail, and text, its first
characters.
"""

import collections
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlp_jax.data.documents import FIRST_CHARACTERS

FILE = "filtered.jsonl"
MEMORY_BYTES = 1 << 24  # of the list; more goes into a temporary file

# reason: what a reader is told.
REASONS = {
    "malformed": "records that cannot be used",
    "encoding": "records that are not UTF-8, or hold half a character",
    "copy": "documents whose text came before, dropped",
    "copy_kept": "documents whose text came before, kept",
    "too_long": "documents longer than data.document_tokens, dropped",
    "cut": "documents longer than data.document_tokens, cut into pieces",
    "short": "pieces shorter than data.min_tokens",
    "without_span": "pieces without a token that a position could be chosen from",
    "without_answer": "examples without a final answer",
}
KEPT = ("copy_kept", "cut")  # nothing of these is lost


class Filtered:
    """The list, as long as it may be."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self._lines = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115  # as long as this object

    def add(self, reason: str, place: str, detail: str = "", text: str = "") -> None:
        self.counts[reason] += 1
        entry = {"place": place, "reason": reason, "detail": detail, "text": text[:FIRST_CHARACTERS]}
        self._lines.write(json.dumps(entry).encode() + b"\n")

    def __iter__(self) -> Iterator[dict[str, str]]:
        self._lines.seek(0)
        yield from map(json.loads, self._lines)
        self._lines.seek(0, os.SEEK_END)

    def save(self, path: Path) -> None:
        """Writes the list, all of it or nothing."""
        temporary = path.with_name(f".{path.name}.tmp")
        self._lines.seek(0)
        with open(temporary, "wb") as file:
            while block := self._lines.read(MEMORY_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        self._lines.seek(0, os.SEEK_END)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Filtered":
        filtered = cls()
        with open(path, "rb") as file:
            for line in file:
                filtered.counts[json.loads(line)["reason"]] += 1
                filtered._lines.write(line)
        return filtered
