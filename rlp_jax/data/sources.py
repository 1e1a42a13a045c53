# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: `data.sources`, one string a source.

    documents.jsonl  notes.txt  data/*.jsonl.gz  corpus/  shards/*.parquet  x.array_record
    gs://bucket/data/*.jsonl.zst             whatever fsspec opens
    hf:NAME:CONFIG:SPLIT  tfds:NAME:SPLIT    datasets by name, see hub.py
    compose:1000  reasoning_gym/chain_sum    generators, with a number of documents if wanted

Directories and patterns are read in order of name. A broken record is reported, with its line, when it is read.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.columns import ArrayRecordSource, ParquetSource
from rlp_jax.data.documents import Document, Malformed
from rlp_jax.data.files import (
    ARRAY_RECORD,
    FORMATS,
    LINES,
    TABLE,
    TEXT,
    Damaged,
    JsonlSource,
    Source,
    TextSource,
    format_of,
    list_files,
    open_file,
    stamp,
)
from rlp_jax.data.hub import HUGGING_FACE, TFDS, open_hugging_face, open_tfds
from rlp_jax.data.records import BYTE_ORDER_MARK, Fields, decode, parse

GENERATED_DOCUMENTS = 8192  # of a generator named without a number


def _compose(seed: int, size: int):
    from rlp_jax.data.compose import ComposeSource

    return ComposeSource(seed, size)


# name: (seed, number of documents) -> source
GENERATORS: dict[str, Callable[[int, int], Sequence[Document]]] = {"compose": _compose}
REASONING_GYM = "reasoning_gym/"  # before the name of one of that package's datasets


FILES: dict[str, Callable[..., Source]] = {LINES: JsonlSource, TABLE: ParquetSource, ARRAY_RECORD: ArrayRecordSource}
KINDS = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"


class Generated(Source):
    """A generator's documents."""

    def __init__(self, documents: Sequence[Document]):
        self.documents, self.length = documents, len(documents)

    def read(self, start: int, stop: int) -> Iterator[Document | Malformed]:
        return (self.documents[i] for i in range(start, stop))


def open_sources(config: DataConfig, seed: int) -> list[Source]:
    """`open_each`, all of them after one another."""
    return [source for sources in open_each(config, seed) for source in sources]


def open_each(config: DataConfig, seed: int) -> list[list[Source]]:
    """Open `config.sources`.

    Returns:
      For each of them its sources, one a file.

    Raises:
      ConfigError: no source, an unknown name or kind of file, a missing file, or a broken template; what is malformed
        of a file as a whole (it is empty, or no parquet file), unless config.malformed is "skip".
    """
    if not config.sources:
        raise ConfigError(f"data.sources is empty: name {KINDS}s, or one of {', '.join(GENERATORS)}")
    return [_open(source, config, seed) for source in config.sources]


def _open(source: str, config: DataConfig, seed: int) -> list[Source]:
    name, _, size = source.partition(":")
    if name in GENERATORS:
        return [Generated(GENERATORS[name](seed, _size(source, size)))]
    if name.startswith(REASONING_GYM):
        from rlp_jax.data.reasoning_gym import ReasoningGymSource

        return [Generated(ReasoningGymSource(name.removeprefix(REASONING_GYM), seed, _size(source, size)))]
    for prefix, open_dataset in ((HUGGING_FACE, open_hugging_face), (TFDS, open_tfds)):
        if source.startswith(prefix):
            fields = Fields(config.text, config.span, config.answer)
            return [_or_damaged(config, lambda open_=open_dataset, fields=fields: open_(source, fields))]
    files = list_files(source)
    if not files:
        if files is not None:
            raise ConfigError(f"data.sources: {source} is a directory without a {KINDS}")
        if format_of(source) is None and not any(letter in source for letter in "*?["):
            raise ConfigError(
                f"data.sources: {source!r} is none of a {KINDS}, a directory of them, or one of {', '.join(GENERATORS)}"
            )
        raise ConfigError(f"data.sources: no file {source}")
    return [_or_damaged(config, lambda file=file: _open_file(file, config)) for file in files]


def stamps(config: DataConfig) -> list[str]:
    """What tells the present contents of the sources from others, without reading them."""
    facts = []
    for source in config.sources:
        files = [] if source.startswith((HUGGING_FACE, TFDS)) else list_files(source) or []
        facts += [source, *(f"{file} {stamp(file)}" for file in files)]
        if source.startswith((HUGGING_FACE, TFDS)):
            (dataset,) = _open(source, dataclasses.replace(config, malformed="skip"), 0)
            length = "" if dataset.length is None else str(dataset.length)
            facts.append(f"{getattr(getattr(dataset, 'examples', None), '_fingerprint', '')} {length}")
    return facts


def _open_file(path: str, config: DataConfig) -> Source:
    kind = format_of(path)
    if kind is None:
        raise ConfigError(
            f"data.sources: {path!r} is none of a {KINDS}, a directory of them, or one of {', '.join(GENERATORS)}"
        )
    return TextSource(path) if kind == TEXT else FILES[kind](path, config.text, config.span, config.answer)


def _or_damaged(config: DataConfig, open_source: Callable[[], Source]) -> Source:
    try:
        return open_source()
    except Malformed as malformed:
        if config.malformed == "stop":
            raise
        return Damaged(malformed)


def read_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a .jsonl file, each with its place, "file:line"; blank lines are skipped.

    Raises:
      ConfigError: a line that is not UTF-8 or not a JSON object.
    """
    with open_file(str(path)) as file:
        for line, raw in enumerate(file, 1):
            if raw.removeprefix(BYTE_ORDER_MARK).strip():
                yield parse(decode(raw, str(path), line), f"{path}:{line}"), f"{path}:{line}"


def _size(source: str, size: str) -> int:
    if not size:
        if source.endswith(":"):
            raise ConfigError(f"data.sources: {source!r} lacks the number of documents after the colon")
        return GENERATED_DOCUMENTS
    if not (size.isascii() and size.isdigit()) or int(size) < 1:
        raise ConfigError(f"data.sources: {source!r}: the number of documents must be a whole number above 0")
    return int(size)
