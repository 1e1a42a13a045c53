# SPDX-License-Identifier: Apache-2.0
"""Files of text and JSON lines: here or behind a URL, plain or compressed.

A path is a string: a local one, or a URL that fsspec knows ("gs://bucket/a.jsonl"). A source is a sequence of
documents: `len(source)`, `source[i] -> Document`, and `read(start, stop)`, which gives documents and what is malformed
in order. Opening one reads no more than is needed to know how many documents there are. Sources travel to reading
processes, so they hold no open file while they are pickled.
"""

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import Document, Malformed
from rlp_jax.data.records import BYTE_ORDER_MARK, Fields, decode, parse

COMPRESSED = (".gz", ".zst")
LINES, TEXT, TABLE, ARRAY_RECORD = ".jsonl", ".txt", ".parquet", ".array_record"
FORMATS = (LINES, TEXT, TABLE, ARRAY_RECORD)
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
SHARD = re.compile(r"-\d+-of-\d+$")  # tensorflow-datasets puts it behind the suffix
SKIP_BYTES = 1 << 20
STEP_BYTES = 1 << 13


class Source:
    """Documents by number.

    `length` is None where the number is known at the end only; such a source is read from the front.
    """

    length: int | None

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the number of documents of this source is known at its end only")
        return self.length

    def __getitem__(self, i: int) -> Document:
        """Raises Malformed."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        (document,) = self.read(i, i + 1)
        self.close()
        if isinstance(document, Malformed):
            raise document
        return document

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        """Documents number start to stop, less one."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of files; reading opens them again."""


class Damaged(Source):
    """In the place of a source that cannot be opened: one malformed record."""

    length = 1

    def __init__(self, malformed: Malformed):
        self.malformed = malformed

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        yield self.malformed


class TextSource(Source):
    """One text file, one document, all of it a span. On reading, an empty file or bytes that are not UTF-8 are
    malformed."""

    length = 1

    def __init__(self, path: str | Path):
        self.path = str(path)

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        try:
            with open_file(self.path) as file:
                raw = file.read()
            text = decode(raw, self.path).replace("\r\n", "\n")
            if not text.strip():
                raise Malformed(self.path, "the file is empty: give one with text in it, or leave it out")
        except Malformed as malformed:
            yield malformed
        except DamagedFile as error:
            yield Malformed(self.path, reason_of(error))
        else:
            yield Document(text, ((0, len(text)),), 0, f"{self.path}:1")


class JsonlSource(Source):
    """A file of one JSON object a line, blank lines skipped.

    Args:
      path: the file.
      text, span, answer: see `records.Fields`.

    Raises:
      ConfigError: a format string is broken.
      Malformed: the file holds no record, or nothing of it can be read. On reading, a line is malformed that is not
        UTF-8, not a JSON object, lacks a field, or whose span is not in its text; and the rest of a damaged file.
    """

    def __init__(self, path: str | Path, text: str = "{text}", span: str = "", answer: str = ""):
        self.path, self.fields = str(path), Fields(text, span, answer)
        self._file: BinaryIO | None = None
        self._at = 0
        # Where the lines that hold something begin: random access for a few bytes a document.
        offsets, lines, offset, line, self._damage = [], [], 0, 0, None
        try:
            with open_file(self.path) as file:
                for line, raw in enumerate(file, 1):
                    if raw.removeprefix(BYTE_ORDER_MARK).strip():
                        offsets.append(offset)
                        lines.append(line)
                    offset += len(raw)
        except DamagedFile as error:
            self._damage = Malformed(f"{self.path}:{line + 1}", f"{reason_of(error)}, from this line on")
        if not lines:
            raise self._damage or Malformed(self.path, "holds no documents: give a file with one JSON object a line")
        self._offsets, self._lines = np.array(offsets, np.int64), np.array(lines, np.int64)
        self.length = len(lines) + (self._damage is not None)

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        for i in range(start, stop):
            if i == len(self._lines):
                yield self._damage
                continue
            place = f"{self.path}:{self._lines[i]}"
            try:
                raw = self._line(int(self._offsets[i]))
                yield self.fields.document(parse(decode(raw, self.path, int(self._lines[i])), place), i, place)
            except Malformed as malformed:
                yield malformed
            except DamagedFile as error:
                self.close()
                yield Malformed(place, reason_of(error))
        if stop == self.length:
            self.close()

    def _line(self, offset: int) -> bytes:
        """The line there. Compressed files are read forwards and, to go back, from the start again."""
        compressed = self.path.endswith(COMPRESSED)
        if self._file is not None and compressed and offset < self._at:
            self.close()
        if self._file is None:
            self._file, self._at = open_file(self.path), 0
        if not compressed:
            if offset != self._at:
                self._file.seek(offset)
        else:
            while self._at < offset:
                self._at += len(self._file.read(min(SKIP_BYTES, offset - self._at))) or offset - self._at
        raw = self._file.readline()
        self._at = offset + len(raw)
        return raw

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}


class DamagedFile(Exception):
    """Compressed bytes that cannot be decompressed."""


def reason_of(error: Exception) -> str:
    """What a library says of bytes that it cannot read, on one line."""
    return f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"


class _Decompressed(io.RawIOBase):
    """What decompression gives, in small steps: all that is good before a damage comes out first."""

    def __init__(self, file, below: BinaryIO):
        self._file, self._below = file, below

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import gzip

        try:
            data = self._file.read1(min(len(buffer), STEP_BYTES))
        except Exception as error:  # EOFError, gzip's, zlib's and zstd's own
            if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise  # of the storage below
            raise DamagedFile(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        super().close()
        self._file.close()
        self._below.close()


def open_file(path: str) -> BinaryIO:
    """The bytes of a file, decompressed by its suffix.

    Raises:
      ConfigError: a package is missing.
      OSError: what the file system says.
    """
    raw = filesystem(path).open(path, "rb") if URL.match(path) else open(path, "rb")  # noqa: SIM115  # the caller closes it
    if path.endswith(".gz"):
        import gzip

        return io.BufferedReader(_Decompressed(gzip.GzipFile(fileobj=raw), raw))
    if path.endswith(".zst"):
        return io.BufferedReader(_Decompressed(_zstd(path).ZstdFile(raw), raw))
    return raw


def _zstd(path: str):
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise ConfigError(f"{path} needs a package: pip install 'rlp_jax[zstd]'") from None
    return zstd


def filesystem(url: str):
    """fsspec's file system of a URL.

    Raises:
      ConfigError: it is of no known kind, or a package is missing.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError:
        package = {"gs": "'rlp_jax[gcs]'", "gcs": "'rlp_jax[gcs]'", "s3": "s3fs"}.get(scheme)
        advice = f"pip install {package}" if package else f"the one that fsspec needs for {scheme}://"
        raise ConfigError(f"data.sources: {url} needs a package: {advice}") from None
    except ValueError as error:
        raise ConfigError(f"data.sources: {url}: {' '.join(str(error).split())}") from None


def format_of(path: str) -> str | None:
    """The suffix of `FORMATS` that a file's name has, without compression and number; None: another file."""
    name = SHARD.sub("", path)
    if name.endswith(COMPRESSED):
        name = name[: name.rindex(".")]
        return next((suffix for suffix in (LINES, TEXT) if name.endswith(suffix)), None)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def list_files(path: str) -> list[str] | None:
    """The files that a path, a pattern or a directory means, in order of name; None: there is nothing.

    Of a directory, those of `FORMATS`, also below it; perhaps none.
    """
    if not URL.match(path):
        local = Path(path)
        if local.is_dir():
            return [str(file) for file in sorted(local.rglob("*")) if format_of(str(file)) and file.is_file()]
        if local.is_file():
            return [str(local)]
        import glob

        return sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file()) or None
    store = filesystem(path)
    if any(letter in path for letter in "*?["):
        found = [name for name in store.glob(path) if store.isfile(name)]
    elif store.isdir(path):
        return sorted(store.unstrip_protocol(name) for name in store.find(path) if format_of(name))
    else:
        found = [path] if store.exists(path) else []
    return sorted(store.unstrip_protocol(name) for name in found) or None


def stamp(path: str) -> str:
    """What tells a file from its other versions without reading it: size and time of change, or what its store says."""
    if URL.match(path):
        return str(filesystem(path).ukey(path))
    status = Path(path).stat()
    return f"{status.st_size} {status.st_mtime_ns}"
