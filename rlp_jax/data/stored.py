# SPDX-License-Identifier: Apache-2.0
"""Tokens on disk (`data.cache`): read once, then mapped into memory, so that a run holds no more than it uses and
starts again at once.

A directory of its own for every choice of files and settings, by a hash over them: `tokens` int32, `spans` bool and
`texts` (names and answers, UTF-8) end to end, `index.npy` (a row a piece, training pieces before held-out ones),
`about.json` (counts, sizes) and `filtered.jsonl`. It gets its name when it is whole.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import TokenizedDocument

FIELDS = {"id": "<i8", "start": "<i8", "length": "<i4", "text": "<i8", "name": "<i4", "answer": "<i4"}
INDEX = np.dtype(list(FIELDS.items()))
FILES = ("tokens", "spans", "texts", "index.npy")
ABOUT = "about.json"


class StoredPieces(Sequence):
    """Pieces that lie on disk; a part of them by a slice.

    Attributes:
      ids, lengths: [N] of every piece.
      answer_bytes: of the longest answer.
    """

    def __init__(self, directory: Path, index: np.ndarray | None = None):
        self.directory = directory
        self._index = np.load(directory / "index.npy") if index is None else index
        self._maps: tuple[np.ndarray, ...] | None = None

    @property
    def ids(self) -> np.ndarray:
        return self._index["id"]

    @property
    def lengths(self) -> np.ndarray:
        return self._index["length"]

    @property
    def answer_bytes(self) -> int:
        return int(self._index["answer"].max(initial=0))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return StoredPieces(self.directory, self._index[i])
        row = self._index[i]
        tokens, spans, texts = self._mapped()
        piece = slice(row["start"], row["start"] + row["length"])
        name_end = row["text"] + row["name"]
        name = bytes(texts[row["text"] : name_end]).decode()
        answer = bytes(texts[name_end : name_end + row["answer"]])
        return TokenizedDocument(np.array(tokens[piece]), np.array(spans[piece]), int(row["id"]), name, answer)

    def _mapped(self) -> tuple[np.ndarray, ...]:
        if self._maps is None:
            kinds = {"tokens": "<i4", "spans": "?", "texts": "u1"}
            self._maps = tuple(_map(self.directory / name, kind) for name, kind in kinds.items())
        return self._maps

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": None}


def _map(path: Path, kind: str) -> np.ndarray:
    empty = path.stat().st_size == 0  # which cannot be mapped
    return np.zeros(0, kind) if empty else np.memmap(path, kind, "r")


class PieceWriter:
    """Writes pieces end to end; `list.append` with a disk behind it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files = {name: open(directory / name, "wb") for name in FILES[:3]}  # noqa: SIM115
        self._rows, self._tokens, self._text = [], 0, 0

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, piece: TokenizedDocument) -> None:
        name = piece.name.encode(errors="replace")
        self._files["tokens"].write(piece.tokens_T.astype("<i4").tobytes())
        self._files["spans"].write(piece.span_T.tobytes())
        self._files["texts"].write(name + piece.answer)
        self._rows.append((piece.id, self._tokens, len(piece.tokens_T), self._text, len(name), len(piece.answer)))
        self._tokens += len(piece.tokens_T)
        self._text += len(name) + len(piece.answer)

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._finish()
        for file in self._files.values():
            file.close()

    def _finish(self) -> None:
        np.save(self._directory / "index.npy", np.array(self._rows, INDEX))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def building(cache: Path, key: str) -> Iterator[tuple[Path, bool]]:
    """The directory of a key, and whether it has to be filled, which the caller then does in the directory given. One
    process at a time; the others wait and find it done.

    Raises:
      ConfigError: the directory cannot be written to, or what it holds is damaged.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / f".{key}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"data.cache: {cache} cannot be written to: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        final, unfinished = cache / key, cache / f".{key}.unfinished"
        if final.is_dir():
            check(final)
            yield final, False
            return
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir()
        try:
            yield unfinished, True
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(final)


def seal(directory: Path, about: dict[str, Any]) -> None:
    """Says what a directory holds, last."""
    sizes = {name: (directory / name).stat().st_size for name in FILES}
    (directory / ABOUT).write_text(json.dumps({"sizes": sizes} | about), encoding="utf-8")


def about(directory: Path) -> dict[str, Any]:
    return json.loads((directory / ABOUT).read_text(encoding="utf-8"))


def check(directory: Path) -> None:
    """Raises ConfigError where a directory does not hold what was written."""
    try:
        wrong = [n for n, size in about(directory)["sizes"].items() if (directory / n).stat().st_size != size]
    except (OSError, ValueError, LookupError):
        wrong = [ABOUT]
    if wrong:
        raise ConfigError(f"data.cache: {directory / wrong[0]} is damaged: delete {directory}, it is made again")


def key_of(facts: Sequence[str]) -> str:
    """A name for what these facts decide."""
    digest = hashlib.blake2b(digest_size=12)
    for fact in facts:
        digest.update(fact.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
