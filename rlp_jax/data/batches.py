# SPDX-License-Identifier: Apache-2.0
"""Batches of documents, by random access through Grain: shuffled, repeated, mixed. An iterator's state is a number, so
that a resumed run reads on where it stopped.

A process reads the tokens of its own rows alone; order, padding and state are those of the whole batch.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import TokenizedDocument, stable_hash

Batch = dict[str, np.ndarray]


def collate(
    documents: Sequence[TokenizedDocument],
    document_tokens: int,
    pad_id: int,
    pad_multiple: int = 64,
    answer_bytes: int = 0,
    longest: int = 0,
) -> Batch:
    """Stack documents into a batch, padded on the right to a multiple of pad_multiple, at most document_tokens: few
    shapes for jit.

    Args:
      answer_bytes: room for the answers of questions; 0: the documents are none.
      longest: tokens of the batch's longest document, where these documents are but a part of it.

    Returns:
      `tokens_BT` int32, `length_B` int32, `span_BT` bool, `document_B` int64, `weight_B` float32 of ones; of questions
      `answer_BA` uint8 too, the answer's UTF-8 with zeros behind it.
    """
    longest = longest or max(len(document.tokens_T) for document in documents)
    padded = min(-(-longest // pad_multiple) * pad_multiple, document_tokens)
    length_B = np.array([len(document.tokens_T) for document in documents], np.int32)
    tokens_BT = np.full((len(documents), padded), pad_id, np.int32)
    span_BT = np.zeros((len(documents), padded), bool)
    for row, document in enumerate(documents):
        tokens_BT[row, : length_B[row]] = document.tokens_T
        span_BT[row, : length_B[row]] = document.span_T
    batch = {
        "tokens_BT": tokens_BT,
        "length_B": length_B,
        "span_BT": span_BT,
        "document_B": np.array([document.id for document in documents], np.int64),
        "weight_B": np.ones(len(documents), np.float32),
    }
    if answer_bytes:
        batch["answer_BA"] = np.zeros((len(documents), answer_bytes), np.uint8)
        for row, document in enumerate(documents):
            batch["answer_BA"][row, : len(document.answer)] = np.frombuffer(document.answer, np.uint8)
    return batch


class TrainBatches:
    """An endless iterator of batches; made by `train_batches`."""

    def __init__(self, dataset: grain.MapDataset, fingerprint: str, prefetch: int = 0):
        # Without a thread where nothing is made ahead: a batch is a few copies of arrays.
        options = grain.ReadOptions(num_threads=min(1, prefetch), prefetch_buffer_size=prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._fingerprint = fingerprint

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict:
        """Where the iterator stands, a JSON-serialisable value: goes into the checkpoint."""
        return {"documents": self._fingerprint, "grain": self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        """Go on from a state, forwards or backwards.

        Raises:
          ConfigError: the state belongs to other documents, another seed or another batch size.
        """
        if state["documents"] != self._fingerprint:
            raise ConfigError(
                "the checkpoint's data position belongs to other documents, another seed or batch size: "
                "restore the data files and settings of that run, or start a new run directory"
            )
        self._iterator.set_state(state["grain"])


def train_batches(
    documents: Sequence[TokenizedDocument],
    batch_documents: int,
    document_tokens: int,
    pad_id: int,
    seed: int,
    pad_multiple: int = 64,
    rows: Sequence[int] | None = None,
    mixture: Sequence[tuple[int, float]] = (),
    prefetch: int = 0,
) -> TrainBatches:
    """Endless batches of B documents: each epoch is another permutation of all documents, and batches run on from one
    epoch into the next, so none is left out.

    Args:
      documents: a sequence; one that knows its `ids`, `lengths` and `answer_bytes` is not read before its turn.
      mixture: (documents, weight) of each consecutive part of the documents. Parts are drawn in proportion to their
        weights, at an even pace, each in permutations of its own; a small part comes round again sooner. Empty: one
        part.
      prefetch: batches made ahead, in a thread.
      rows: of each batch, what this process reads; by default all. Order, padding and the iterator's state do not
        depend on it, so a run may go on with another number of processes.

    Raises:
      ConfigError: batch_documents is below 1, or there are fewer documents than that.
    """
    if batch_documents < 1:
        raise ConfigError(f"batch_documents is {batch_documents}: it must be at least 1")
    if len(documents) < batch_documents:
        raise ConfigError(
            f"batch_documents is {batch_documents} but data.sources give {len(documents)} training documents of at "
            "least data.min_tokens tokens: lower batch_documents or add documents"
        )
    ids, lengths, answer_bytes = _facts(documents)
    if mixture:
        parts, start = [], 0
        for number, (count, _) in enumerate(mixture):
            numbers = grain.MapDataset.source(range(start, start + count))
            parts.append(numbers.shuffle(stable_hash("shuffle", f"{seed} {number}") >> 32).repeat())
            start += count
        order = grain.MapDataset.mix(parts, [weight for _, weight in mixture])
    else:
        # Grain seeds epoch e with seed + e. Hashed, neighbouring seeds do not share epochs.
        order = grain.MapDataset.source(range(len(documents))).shuffle(stable_hash("shuffle", str(seed)) >> 32).repeat()

    def batch(numbers: Sequence[int]) -> Batch:
        own = numbers if rows is None else [numbers[row] for row in rows]
        longest = max(int(lengths[i]) for i in numbers)
        stacked = [documents[i] for i in own]
        return collate(stacked, document_tokens, pad_id, pad_multiple, answer_bytes, longest)

    # drop_remainder: nothing remains of an endless stream, and without it Grain rounds its length up in floating point,
    # which overflows for batches of one.
    dataset = order.batch(batch_documents, drop_remainder=True, batch_fn=batch)
    contents = " ".join(map(str, ids))
    mixed = " ".join(f"{count}:{weight!r}" for count, weight in mixture)
    fingerprint = stable_hash("documents", f"{seed} {batch_documents} {contents}" + (f" {mixed}" if mixed else ""))
    return TrainBatches(dataset, f"{fingerprint:016x}", prefetch)


def _facts(documents: Sequence[TokenizedDocument]) -> tuple[Sequence[int], Any, int]:
    """Ids, lengths in tokens, and bytes of the longest answer."""
    if hasattr(documents, "ids"):
        return documents.ids.tolist(), documents.lengths, documents.answer_bytes
    ids = [document.id for document in documents]
    return ids, [len(d.tokens_T) for d in documents], max(len(d.answer) for d in documents)


def heldout_batches(
    documents: Sequence[TokenizedDocument],
    batch_documents: int,
    limit: int,
    document_tokens: int,
    pad_id: int,
    pad_multiple: int = 64,
) -> list[Batch]:
    """The first `limit` documents in batches of B, in order. The last batch is filled up with documents that came
    before, of weight 0.

    Raises:
      ConfigError: there is no held-out document, or limit or batch_documents is below 1.
    """
    if limit < 1 or batch_documents < 1:
        raise ConfigError(
            f"eval.documents is {limit} and eval.batch_documents is {batch_documents}: both must be at least 1"
        )
    documents = documents[:limit]
    if not documents:
        raise ConfigError(
            "no document fell into the held-out split: raise data.heldout_fraction or add documents to data.sources"
        )
    batches = []
    for start in range(0, len(documents), batch_documents):
        rows = range(start, start + batch_documents)
        batch = collate([documents[row % len(documents)] for row in rows], document_tokens, pad_id, pad_multiple)
        batch["weight_B"] = np.array([row < len(documents) for row in rows], np.float32)
        batches.append(batch)
    return batches
