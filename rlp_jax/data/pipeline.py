"""From sources to batches: tokenise, cut, split, shuffle, batch. Everything follows from the files, the config and the
seed, and an iterator's state is a few numbers, so that a resumed run reads on where it stopped.

Documents are tokenised once, before training. Grain then shuffles, repeats and batches them by random access.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from rlp_jax.config import ConfigError, DataConfig, PositionMode, SFTConfig
from rlp_jax.data.documents import Document, TokenizedDocument, answers, cut, is_heldout, narrow_spans, stable_hash
from rlp_jax.data.sources import open_sources

Batch = dict[str, np.ndarray]


class Splits(NamedTuple):
    """train: pieces in the order of the sources. heldout: pieces in the order of their ids, a random sample whatever
    the order of the sources. report: counts, see `load_documents`."""

    train: list[TokenizedDocument]
    heldout: list[TokenizedDocument]
    report: dict[str, int]


def load_documents(
    config: DataConfig,
    tokenizer,
    seed: int,
    position_mode: PositionMode = "uniform",
    progress=None,
    examples: SFTConfig | None = None,
    questions: bool = False,
) -> Splits:
    """Read, tokenise, cut and split all documents.

    Args:
      config: what to read and how to cut it.
      tokenizer: see `rlp_jax.data.tokenizer`; no special token is added.
      seed: of the built-in generators. The split does not depend on it.
      position_mode: in mode "span", pieces without a span token are dropped: no position could be chosen in them.
      progress: called with (documents read, documents in all) after each document.
      examples: documents are prompts with responses, their spans. Dropped are those without a final answer, and those
        that do not fit into one piece: the end of a response alone is no example.
      questions: documents are questions (up to their span) with answers to check responses against. Dropped are those
        that do not fit into one piece.

    Returns:
      Splits, whose report counts: documents, duplicates (documents whose text came before), pieces, short (pieces
      dropped for having fewer than min_tokens), without_span (dropped in mode "span"), train, heldout (pieces kept in
      each split), heldout_unused (held-out pieces beyond heldout_documents), train_tokens, heldout_tokens; of examples
      without_answer and too_long, of questions too_long, too.

    Raises:
      ConfigError: a setting out of range, a source that cannot be read (the message names file and line), an example
        without a prompt, a question without an answer, or no example left.
    """
    _check(config)
    pattern = re.compile(config.span_pattern) if config.span_pattern else None
    sources = open_sources(config, seed)
    total = sum(len(source) for source in sources)
    report = collections.Counter(documents=total)
    seen = collections.Counter()
    train, heldout = [], []
    read = 0
    for source in sources:
        for i in range(len(source)):
            document = source[i]
            text_hash = stable_hash("copies", document.text)
            occurrence = seen[text_hash]
            seen[text_hash] += 1
            report["duplicates"] += occurrence > 0
            split = heldout if is_heldout(document.text, config.heldout_fraction) else train
            narrowed = document if pattern is None else narrow_spans(document, pattern)
            pieces = cut(narrowed, tokenizer, config.document_tokens, occurrence)
            if examples is not None:
                pieces = _of_example(document, pieces, examples, report)
            if questions:
                pieces = _of_question(document, pieces, report)
            for piece in pieces:
                report["pieces"] += 1
                if len(piece.tokens_T) < config.min_tokens:
                    report["short"] += 1
                elif (position_mode == "span" or examples is not None) and not piece.span_T.any():
                    report["without_span"] += 1
                else:
                    split.append(piece)
            read += 1
            if progress is not None:
                progress(read, total)
    heldout.sort(key=lambda piece: (piece.id, piece.tokens_T.tobytes()))
    kept = heldout[: config.heldout_documents]
    report["heldout_unused"] = len(heldout) - len(kept)
    for name, pieces in (("train", train), ("heldout", kept)):
        report[name] = len(pieces)
        report[f"{name}_tokens"] = sum(len(piece.tokens_T) for piece in pieces)
    if examples is not None and not train:
        raise ConfigError(
            f"none of {total} documents is left as a training example: {report['without_answer']} without an answer "
            f"(sft.answer_pattern is {examples.answer_pattern!r}), {report['too_long']} longer than "
            f"data.document_tokens, {config.document_tokens}"
        )
    names = ["documents", "duplicates", "pieces", "short", "without_span", "train", "heldout", "heldout_unused"]
    names += ["train_tokens", "heldout_tokens"] + (["without_answer", "too_long"] if examples is not None else [])
    names += ["too_long"] if questions else []
    return Splits(train, kept, {name: int(report[name]) for name in names})


def _of_example(
    document: Document, pieces: list[TokenizedDocument], settings: SFTConfig, report: collections.Counter
) -> list[TokenizedDocument]:
    """The piece that a prompt with its response is, or none, counted, where nothing can be learnt from it."""
    if document.spans == ((0, len(document.text)),):
        raise ConfigError(
            f"{document.name}: all of the document is response: say which part is, for instance data.span='{{answer}}'"
        )
    if settings.answer_pattern and not answers(document, re.compile(settings.answer_pattern)):
        report["without_answer"] += 1
    elif len(pieces) > 1:
        report["too_long"] += 1
    else:
        return pieces
    return []


def _of_question(
    document: Document, pieces: list[TokenizedDocument], report: collections.Counter
) -> list[TokenizedDocument]:
    """The piece that a question is, with its answer, or none, counted, where it does not fit into one."""
    answer = document.answer
    if not answer and document.spans and document.spans != ((0, len(document.text)),):
        start, end = document.spans[0]
        answer = document.text[start:end]
    if not answer.strip():
        raise ConfigError(
            f"{document.name}: no answer to check responses against: say where it stands, for instance "
            "data.answer='{answer}'"
        )
    if len(pieces) > 1:
        report["too_long"] += 1
        return []
    return [dataclasses.replace(piece, answer=answer.encode()) for piece in pieces]


def collate(
    documents: Sequence[TokenizedDocument],
    document_tokens: int,
    pad_id: int,
    pad_multiple: int = 64,
    rows: Sequence[int] | None = None,
    answer_bytes: int = 0,
) -> Batch:
    """Stack documents into a batch, padded on the right to a multiple of pad_multiple, at most document_tokens: few
    shapes for jit.

    Args:
      documents: of the whole batch, which decides the padding.
      rows: stack only these of them, by default all.
      answer_bytes: room for the answers of questions; 0: the documents are none.

    Returns:
      `tokens_BT` int32, `length_B` int32, `span_BT` bool, `document_B` int64, `weight_B` float32 of ones; of questions
      `answer_BA` uint8 too, the answer's UTF-8 with zeros behind it.
    """
    longest = max(len(document.tokens_T) for document in documents)
    padded = min(-(-longest // pad_multiple) * pad_multiple, document_tokens)
    documents = documents if rows is None else [documents[row] for row in rows]
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

    def __init__(self, dataset: grain.MapDataset, fingerprint: str):
        # No threads: a batch is a few copies of arrays in memory.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
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
) -> TrainBatches:
    """Endless batches of B documents: each epoch is another permutation of all documents, and batches run on from one
    epoch into the next, so none is left out.

    Args:
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
    # Grain seeds epoch e with seed + e. Hashed, neighbouring seeds do not share epochs.
    shuffle_seed = stable_hash("shuffle", str(seed)) >> 32
    answer_bytes = max(len(document.answer) for document in documents)
    repeated = grain.MapDataset.source(documents).shuffle(shuffle_seed).repeat()
    # drop_remainder: nothing remains of an endless stream, and without it Grain rounds its length up in floating point,
    # which overflows for batches of one.
    dataset = repeated.batch(
        batch_documents,
        drop_remainder=True,
        batch_fn=lambda batch: collate(batch, document_tokens, pad_id, pad_multiple, rows, answer_bytes),
    )
    contents = " ".join(str(document.id) for document in documents)
    fingerprint = stable_hash("documents", f"{seed} {batch_documents} {contents}")
    return TrainBatches(dataset, f"{fingerprint:016x}")


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


def _check(config: DataConfig) -> None:
    if config.document_tokens < 1:
        raise ConfigError(f"data.document_tokens is {config.document_tokens}: it must be at least 1")
    if not 1 <= config.min_tokens <= config.document_tokens:
        raise ConfigError(
            f"data.min_tokens is {config.min_tokens}: it must be from 1 to data.document_tokens, "
            f"which is {config.document_tokens}"
        )
    if not 0 <= config.heldout_fraction < 1:
        raise ConfigError(f"data.heldout_fraction is {config.heldout_fraction}: it must be at least 0 and below 1")
    try:
        re.compile(config.span_pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"data.span_pattern is {config.span_pattern!r}, no regular expression: {error}") from None
    if config.heldout_documents < 0:
        raise ConfigError(f"data.heldout_documents is {config.heldout_documents}: it must be at least 0")
