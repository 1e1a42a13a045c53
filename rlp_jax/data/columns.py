# SPDX-License-Identifier: Apache-2.0
"""Tables (parquet) and ArrayRecord files as sources of documents."""

import json
from collections.abc import Iterator
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import Document, Malformed
from rlp_jax.data.files import URL, Source, open_file, reason_of
from rlp_jax.data.records import Fields, decode, parse


class ParquetSource(Source):
    """A parquet file, one document a row (extra: parquet). Only the columns that the format strings name are read, and
    one group of rows is held at a time.

    Raises:
      ConfigError: the package is missing, or a column that the format strings name.
      Malformed: no parquet file, or one without rows. On reading, every row of a damaged group is malformed.
    """

    def __init__(self, path: str, text: str = "{text}", span: str = "", answer: str = ""):
        self.path, self.fields = path, Fields(text, span, answer)
        self._file, self._group = None, (-1, None)
        metadata, names = self._open().metadata, self._file.schema_arrow.names
        self.close()
        missing = [name for name in self.fields.names if name not in names]
        if missing:
            raise ConfigError(f"{path}: no column {missing[0]!r}, the columns are {', '.join(map(repr, names))}")
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self.length = self._starts[-1]
        if not self.length:
            raise Malformed(path, "holds no documents: give a file with rows in it")

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        for i in range(start, stop):
            place = f"{self.path}:{i + 1}"
            try:
                yield self.fields.document(self._row(i), i, place)
            except Malformed as malformed:
                yield malformed
            except Exception as error:  # the library raises many kinds
                if isinstance(error, ConfigError):
                    raise
                yield Malformed(place, reason_of(error))
        if stop == self.length:
            self.close()

    def _row(self, i: int) -> dict[str, Any]:
        group, table = self._group
        if not (group >= 0 and self._starts[group] <= i < self._starts[group + 1]):
            import bisect

            group = bisect.bisect_right(self._starts, i) - 1
            table = self._open().read_row_group(group, columns=list(self.fields.names), use_threads=False)
            self._group = group, table
        return table.slice(i - self._starts[group], 1).to_pylist()[0]

    def _open(self):
        if self._file is None:
            try:
                import pyarrow.parquet
            except ImportError:
                raise ConfigError(f"{self.path} needs a package: pip install 'rlp_jax[parquet]'") from None
            bytes_ = open_file(self.path)
            try:
                self._file = pyarrow.parquet.ParquetFile(bytes_)
            except Exception as error:  # the library raises many kinds
                bytes_.close()
                raise Malformed(self.path, f"no parquet file: {reason_of(error)}") from None
            self._bytes = bytes_
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._bytes.close()
        self._file, self._group = None, (-1, None)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_bytes": None, "_group": (-1, None)}


class ArrayRecordSource(Source):
    """An ArrayRecord file, one document a record: a JSON object, or a serialised tf.train.Example as
    tensorflow-datasets writes it (a feature of one value is that value, another a list).

    Raises:
      ConfigError: the package is missing.
      Malformed: no such file, or one without records. On reading, a record that is neither.
    """

    def __init__(self, path: str, text: str = "{text}", span: str = "", answer: str = ""):
        self.path, self.fields = path, Fields(text, span, answer)
        self._reader = None
        self.length = self._open().num_records()
        self.close()
        if not self.length:
            raise Malformed(path, "holds no documents: give a file with records in it")

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        for i in range(start, stop):
            place = f"{self.path}:{i + 1}"
            try:
                raw = self._open().read([i])[0]
                yield self.fields.document(example(raw, place), i, place)
            except Malformed as malformed:
                yield malformed
            except RuntimeError as error:  # of the reader, which then reads no more
                self.close()
                yield Malformed(place, reason_of(error))
        if stop == self.length:
            self.close()

    def _open(self):
        if self._reader is None:
            try:
                from array_record.python.array_record_module import ArrayRecordReader
            except ImportError:
                raise ConfigError(f"{self.path} needs a package: pip install array_record") from None
            local = self.path
            if URL.match(local):  # the reader knows files alone
                import fsspec

                local = fsspec.open_local(f"simplecache::{local}")
            reader = ArrayRecordReader(local)
            if not reader.ok():
                try:  # the reader says why only when it is asked for a record
                    reader.read([0])
                    reason = "cut off"
                except RuntimeError as error:
                    reason = reason_of(error)
                raise Malformed(self.path, f"no ArrayRecord file: {reason}")
            self._reader = reader
        return self._reader

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_reader": None}


def example(raw: bytes, place: str) -> dict[str, Any]:
    """The fields of a record of bytes: a JSON object or a tf.train.Example. Raises Malformed."""
    if raw[:1] == b"{":  # an Example begins with a line feed
        return parse(decode(raw, place, None), place)
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(raw).features.feature
    except (DecodeError, RuntimeWarning):
        features = {}
    if not features:
        shown = raw[:200].decode(errors="replace")
        raise Malformed(place, "neither a JSON object nor a tf.train.Example", shown)
    fields = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        fields[name] = values[0] if len(values) == 1 else values
    return fields


def write_array_record(path: str, records) -> None:
    """Writes records, mappings of JSON values, as an ArrayRecord file of JSON objects."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(path, "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()
