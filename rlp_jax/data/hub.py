# SPDX-License-Identifier: Apache-2.0
"""Hugging Face datasets (extra: hf) and datasets of tensorflow-datasets as sources of documents.

    hf:NAME:CONFIG:SPLIT             a dataset of the hub or a local directory of parquet or json files; CONFIG may be
                                     empty, SPLIT is "train" by default and may be a part: train[:1000]
    hf:NAME:CONFIG:SPLIT:streaming   read from the front while it is fetched, nothing is stored
    tfds:NAME/CONFIG:SPLIT           prepared in the directory that TFDS_DATA_DIR names, or a directory by its path

No code of a dataset is run: those that need a loading script are refused by the library itself.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import Document, Malformed
from rlp_jax.data.files import Source, reason_of
from rlp_jax.data.records import Fields, decode

HUGGING_FACE, TFDS = "hf:", "tfds:"
STREAMING = "streaming"


class DatasetSource(Source):
    """A dataset that gives its examples by number.

    Args:
      examples: `len(examples)`, `examples[i]` a mapping of fields.
      name: as in data.sources, for places.
      fields: what of an example makes a document.
    """

    def __init__(self, examples: Any, name: str, fields: Fields):
        self.examples, self.name, self.fields, self.length = examples, name, fields, len(examples)
        if not self.length:
            raise Malformed(name, "holds no documents")

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        for i in range(start, stop):
            place = f"{self.name}:{i + 1}"
            try:
                example = self.examples[i]
            except Exception as error:  # libraries and stores raise many kinds
                yield Malformed(place, reason_of(error))
                continue
            yield self._document(example, i, place)

    def _document(self, example: Mapping[str, Any], i: int, place: str) -> Document | Malformed:
        try:
            return self.fields.document(example, i, place)
        except Malformed as malformed:
            return malformed


class StreamedSource(DatasetSource):
    """A dataset that is fetched from the front; how many examples it has is known at its end."""

    length = None

    def __init__(self, examples: Any, name: str, fields: Fields):
        self.examples, self.name, self.fields = examples, name, fields

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        """Ends early where there are no more."""
        if start >= stop:
            return
        rest = self.examples.skip(start) if start else self.examples
        for i, example in enumerate(rest, start):
            yield self._document(example, i, f"{self.name}:{i + 1}")
            if i + 1 == stop:
                return


class WrittenSource(DatasetSource):
    """A dataset of `rlp_documents`: documents as they were, with spans, answers and places."""

    def _document(self, example: Mapping[str, Any], i: int, place: str) -> Document | Malformed:
        try:
            text, spans = decode(example["text"], place, None), example["spans"]
            marked = tuple((int(a), int(b)) for a, b in zip(spans["start"], spans["end"], strict=True))
            name = decode(example["place"], place, None)
            return Document(text, marked, i, name, decode(example["answer"], place, None))
        except Malformed as malformed:
            return malformed
        except (KeyError, TypeError, ValueError) as error:
            return Malformed(place, f"not a document of rlp_documents: {reason_of(error)}")


def open_hugging_face(source: str, fields: Fields) -> Source:
    """The source that "hf:..." names.

    Raises:
      ConfigError: no such dataset, it cannot be had, or the package is missing.
    """
    # A split may hold colons within brackets.
    parts = re.split(r":(?![^\[]*\])", source.removeprefix(HUGGING_FACE))
    name, config, split, mode = (parts + [""] * 4)[:4]
    if not name or len(parts) > 4 or mode not in ("", STREAMING):
        raise ConfigError(f"data.sources: {source!r}: write hf:NAME:CONFIG:SPLIT, and :{STREAMING} behind it if wanted")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data.sources: {source} needs a package: pip install 'rlp_jax[hf]'") from None
    try:
        examples = datasets.load_dataset(name, config or None, split=split or "train", streaming=mode == STREAMING)
    except Exception as error:  # the library and those below it raise many kinds
        raise ConfigError(f"data.sources: {source} cannot be had: {reason_of(error)}") from None
    missing = [field for field in fields.names if examples.column_names and field not in examples.column_names]
    if missing:
        columns = ", ".join(map(repr, examples.column_names))
        raise ConfigError(f"{source}: no column {missing[0]!r}, the columns are {columns}")
    return (StreamedSource if mode else DatasetSource)(examples, source, fields)


def open_tfds(source: str, fields: Fields) -> Source:
    """The source that "tfds:..." names, read with `tfds.data_source`.

    Raises:
      ConfigError: no such dataset or split, or it is not prepared as ArrayRecord files.
    """
    name, _, split = source.removeprefix(TFDS).partition(":")
    if not name or not split:
        raise ConfigError(f"data.sources: {source!r}: write tfds:NAME/CONFIG:SPLIT, for instance tfds:pg19:train")
    import tensorflow_datasets as tfds

    try:
        if (Path(name) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name)
        examples = builder.as_data_source(split)
    except Exception as error:  # the library raises many kinds, some with every dataset it knows
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"data.sources: {source} cannot be had: {reason_of(ValueError(reason))} (TFDS_DATA_DIR names the directory "
            "of datasets, which must hold it with file_format='array_record')"
        ) from None
    kind = WrittenSource if builder.name == "rlp_documents" else DatasetSource
    return kind(examples, source, fields)
