# SPDX-License-Identifier: Apache-2.0
"""Sources read and tokenised in order, in this process or, through Grain, in several.

What comes out does not depend on how many there are: work is dealt in chunks of consecutive records, and chunks come
back in order. Reading processes are started afresh ("spawn") and import this package alone, never the program that
started them: so they work from a script without a main guard, from a notebook and from the console script.
"""

import contextlib
import re
import sys
import types
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from rlp_jax.data.documents import Document, Malformed, narrow_spans, tokenize
from rlp_jax.data.files import Source

CHUNK = 64  # records
AHEAD = 4  # chunks that a process may be ahead


class Tokens(NamedTuple):
    """A document as it stood in its source, and the tokens of it: [T] int32, and which overlap its spans, [T] bool."""

    document: Document
    tokens_T: np.ndarray
    span_T: np.ndarray


class Read:
    """What a chunk gave; not a tree that Grain would take apart."""

    def __init__(self, results: list[Tokens | Malformed]):
        self.results = results


class ReadChunk:
    """Reads and tokenises a chunk of records."""

    def __init__(self, sources: Sequence[Source], tokenizer, span_pattern: str):
        self._sources, self._tokenizer, self._pattern = sources, tokenizer, span_pattern
        self._last: Source | None = None

    def __call__(self, chunk: tuple[int, int, int]) -> Read:
        number, start, stop = chunk
        source = self._sources[number]
        if self._last is not None and self._last is not source:
            self._last.close()
        self._last = source
        return Read([self.tokens(document) for document in source.read(start, stop)])

    def tokens(self, document: Document | Malformed) -> Tokens | Malformed:
        if isinstance(document, Malformed):
            return document
        narrowed = narrow_spans(document, re.compile(self._pattern)) if self._pattern else document
        return Tokens(document, *tokenize(narrowed, self._tokenizer))


def read_all(
    sources: Sequence[Source], tokenizer, span_pattern: str, limit: int, workers: int
) -> Iterator[Tokens | Malformed]:
    """Every record of these sources, in order.

    Args:
      sources: of one entry of data.sources.
      tokenizer: see `rlp_jax.data.tokenizer`.
      span_pattern: see `DataConfig`.
      limit: of records of all these sources together, 0: all.
      workers: processes; 0: this one reads. A source that only reads from the front is read by this one.
    """
    read = ReadChunk(sources, tokenizer, span_pattern)
    left = limit or sys.maxsize
    chunks: list[tuple[int, int, int]] = []
    for number, source in enumerate(sources):
        if source.length is None:
            yield from _in_order(read, chunks, workers)
            chunks = []
            for document in source.read(0, left):
                left -= 1
                yield read.tokens(document)
        else:
            stop = min(source.length, left)
            left -= stop
            chunks += [(number, start, min(start + CHUNK, stop)) for start in range(0, stop, CHUNK)]
    yield from _in_order(read, chunks, workers)


def _in_order(read: ReadChunk, chunks: list[tuple[int, int, int]], workers: int) -> Iterator[Tokens | Malformed]:
    workers = min(workers, len(chunks))
    if not workers:
        for chunk in chunks:
            yield from read(chunk).results
        return
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(chunks).map(read).to_iter_dataset(options)
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD))
    if not flags.FLAGS.is_parsed():  # Grain reads flags of absl, which only programs made for it parse
        flags.FLAGS.mark_as_parsed()
    iterator = iter(dataset)
    try:
        while True:
            with without_main():
                try:
                    chunk = next(iterator)
                except StopIteration:
                    return
            yield from chunk.results
    finally:
        iterator.close()


@contextlib.contextmanager
def without_main():
    """Hides the running program from processes that are started meanwhile: they would import it again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
