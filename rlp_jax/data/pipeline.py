# SPDX-License-Identifier: Apache-2.0
"""From sources to pieces of documents: read, tokenise, filter, cut, split. Everything follows from the files, the
config and the seed.

Documents are read and tokenised once, before training, by as many processes as `data.workers` says. Their pieces are
held in memory or kept in `data.cache`; `batches.py` then draws from them, wherever they lie.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlp_jax.config import ConfigError, DataConfig, PositionMode, SFTConfig
from rlp_jax.data import filters, stored
from rlp_jax.data.batches import Batch, TrainBatches, collate, heldout_batches, train_batches
from rlp_jax.data.documents import Document, Malformed, TokenizedDocument, answers, is_heldout, pieces_of, stable_hash
from rlp_jax.data.filters import Filtered
from rlp_jax.data.reading import Tokens, read_all
from rlp_jax.data.sources import open_each, stamps

__all__ = [
    "Batch",
    "Splits",
    "TrainBatches",
    "collate",
    "heldout_batches",
    "load_documents",
    "mixture",
    "train_batches",
]
FORMAT = 1  # of the cache
# Settings that do not decide which pieces there are.
BESIDE = ("weights", "workers", "prefetch", "cache", "sources")


class Splits(NamedTuple):
    """train: pieces in the order of the sources. heldout: pieces in the order of their ids, a random sample whatever
    the order of the sources. report: counts, see `load_documents`. filtered: what was left out, one by one. parts:
    training pieces of each of data.sources."""

    train: Sequence[TokenizedDocument]
    heldout: Sequence[TokenizedDocument]
    report: dict[str, int]
    filtered: Filtered
    parts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """What documents are read for; the fields are those of `load_documents`."""

    position_mode: PositionMode
    examples: SFTConfig | None
    questions: bool


def load_documents(
    config: DataConfig,
    tokenizer,
    seed: int,
    position_mode: PositionMode = "uniform",
    progress: Callable[[int, int | None], None] | None = None,
    examples: SFTConfig | None = None,
    questions: bool = False,
) -> Splits:
    """Read, tokenise, cut and split all documents.

    Args:
      config: what to read and how to cut it.
      tokenizer: see `rlp_jax.data.tokenizer`; no special token is added.
      seed: of the built-in generators. The split does not depend on it.
      position_mode: in mode "span", pieces without a span token are dropped: no position could be chosen in them.
      progress: called with (records read, records in all) after each; None: a streamed source does not say.
      examples: documents are prompts with responses, their spans. Dropped are those without a final answer, and those
        that do not fit into one piece: the end of a response alone is no example.
      questions: documents are questions (up to their span) with answers to check responses against. Dropped are those
        that do not fit into one piece.

    Returns:
      Splits, whose report counts: documents, duplicates (documents whose text came before), pieces, short (pieces
      dropped for having fewer than min_tokens), without_span (dropped in mode "span"), train, heldout (pieces kept in
      each split), heldout_unused (held-out pieces beyond heldout_documents), train_tokens, heldout_tokens; malformed
      where they are skipped; of examples without_answer and too_long, of questions and where long ones are dropped
      too_long, too. With `data.cache`, train lies there and is read as it is needed.

    Raises:
      ConfigError: a setting out of range, a source that cannot be read (the message names file and line), an example
        without a prompt, a question without an answer, or no example left.
    """
    _check(config)
    use = Use(position_mode, examples, questions)
    if not config.cache:
        train: list[TokenizedDocument] = []
        heldout, report, filtered, parts = _read(config, tokenizer, seed, use, train, progress)
        return Splits(train, heldout, report, filtered, parts)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in BESIDE}
    facts = [str(FORMAT), json.dumps(settings), repr(use), str(seed), tokenizer.fingerprint, *stamps(config)]
    key = stored.key_of(facts)
    with stored.building(Path(config.cache), key) as (directory, fill):
        if fill:
            with stored.PieceWriter(directory) as writer:
                heldout, report, filtered, parts = _read(config, tokenizer, seed, use, writer, progress)
                for piece in heldout:
                    writer.append(piece)
            filtered.save(directory / filters.FILE)
            stored.seal(directory, {"report": report, "parts": parts})
    return _stored(Path(config.cache) / key)


def _stored(directory: Path) -> Splits:
    about, pieces = stored.about(directory), stored.StoredPieces(directory)
    trained = about["report"]["train"]
    filtered = Filtered.load(directory / filters.FILE)
    heldout = list(pieces[trained:])
    return Splits(pieces[:trained], heldout, about["report"], filtered, tuple(about["parts"]))


def _read(
    config: DataConfig, tokenizer, seed: int, use: Use, train: Any, progress
) -> tuple[list[TokenizedDocument], dict[str, int], Filtered, tuple[int, ...]]:
    """Held-out pieces, report, what was left out, and training pieces a source; the last go to `train.append`."""
    entries = open_each(config, seed)
    lengths = [None if any(source.length is None for source in entry) else sum(map(len, entry)) for entry in entries]
    limited = [length if not config.documents else min(length or math.inf, config.documents) for length in lengths]
    total = None if None in lengths else sum(limited)
    report, filtered = collections.Counter(), Filtered()
    seen, kept = collections.Counter(), _Smallest(config.heldout_documents)
    read, parts, tokens = 0, [], 0
    for entry in entries:
        before = len(train)
        for found in read_all(entry, tokenizer, config.span_pattern, config.documents, config.workers):
            read += 1
            if progress is not None:
                progress(read, total)
            try:
                if isinstance(found, Malformed):
                    raise found
                report["documents"] += 1
                pieces = _pieces(found, config, use, seen, report, filtered)
            except Malformed as malformed:
                if config.malformed == "stop":
                    raise
                report["malformed"] += 1
                kind = "encoding" if malformed.encoding else "malformed"
                filtered.add(kind, malformed.place, malformed.reason, malformed.text)
                continue
            if is_heldout(found.document.text, config.heldout_fraction):
                kept.extend(pieces)
                continue
            for piece in pieces:
                train.append(piece)
                tokens += len(piece.tokens_T)
        parts.append(len(train) - before)
    heldout = kept.sorted()
    report["heldout_unused"] = kept.count - len(heldout)
    report["train"], report["train_tokens"] = len(train), tokens
    report["heldout"], report["heldout_tokens"] = len(heldout), sum(len(piece.tokens_T) for piece in heldout)
    if use.examples is not None and not len(train):
        raise ConfigError(
            f"none of {report['documents']} documents is left as a training example: {report['without_answer']} "
            f"without an answer (sft.answer_pattern is {use.examples.answer_pattern!r}), {report['too_long']} longer "
            f"than data.document_tokens, {config.document_tokens}"
        )
    names = ["documents", "duplicates", "pieces", "short", "without_span", "train", "heldout", "heldout_unused"]
    names += ["train_tokens", "heldout_tokens"] + (["malformed"] if config.malformed == "skip" else [])
    names += ["without_answer", "too_long"] if use.examples is not None else []
    names += ["too_long"] if use.questions or (config.long == "drop" and use.examples is None) else []
    return heldout, {name: int(report[name]) for name in names}, filtered, tuple(parts)


class _Smallest:
    """The pieces of the smallest ids, so many of them, of all that come."""

    def __init__(self, limit: int):
        self.count, self._limit, self._pieces = 0, limit, []

    def extend(self, pieces: list[TokenizedDocument]) -> None:
        self.count += len(pieces)
        self._pieces += pieces
        if len(self._pieces) > 2 * self._limit + 1000:
            self._pieces = self.sorted()

    def sorted(self) -> list[TokenizedDocument]:
        return sorted(self._pieces, key=lambda piece: (piece.id, piece.tokens_T.tobytes()))[: self._limit]


def _pieces(
    found: Tokens, config: DataConfig, use: Use, seen: collections.Counter, report: collections.Counter, filtered
) -> list[TokenizedDocument]:
    """The pieces of a document that are kept, everything else counted and listed. Raises Malformed."""
    document, text = found.document, found.document.text
    text_hash = stable_hash("copies", text)
    occurrence = seen[text_hash]
    seen[text_hash] += 1
    if occurrence:
        report["duplicates"] += 1
        filtered.add("copy" if config.copies == "drop" else "copy_kept", document.name, text=text)
        if config.copies == "drop":
            return []
    pieces = pieces_of(document, found.tokens_T, found.span_T, config.document_tokens, occurrence)
    whole = use.examples is not None or use.questions or config.long == "drop"
    if use.examples is not None and not _is_example(document, use.examples):
        report["without_answer"] += 1
        filtered.add("without_answer", document.name, text=text)
        return []
    answer = _answer(document) if use.questions else b""
    if len(pieces) > 1:
        filtered.add("too_long" if whole else "cut", document.name, f"{len(found.tokens_T)} tokens", text)
        if whole:
            report["too_long"] += 1
            return []
    kept = []
    for piece in pieces:
        report["pieces"] += 1
        length = len(piece.tokens_T)
        if length < config.min_tokens:
            report["short"] += 1
            filtered.add("short", piece.name, f"{length} tokens", text if len(pieces) == 1 else "")
        elif (use.position_mode == "span" or use.examples is not None) and not piece.span_T.any():
            report["without_span"] += 1
            filtered.add("without_span", piece.name, text=text if len(pieces) == 1 else "")
        else:
            kept.append(dataclasses.replace(piece, answer=answer) if answer else piece)
    if not pieces:  # an empty document
        filtered.add("short", document.name, "0 tokens")
    return kept


def _is_example(document: Document, settings: SFTConfig) -> bool:
    """Whether something can be learnt from a prompt with its response: it has a final answer where one is asked for."""
    if document.spans == ((0, len(document.text)),):
        raise ConfigError(
            f"{document.name}: all of the document is response: say which part is, for instance data.span='{{answer}}'"
        )
    return not settings.answer_pattern or answers(document, re.compile(settings.answer_pattern))


def _answer(document: Document) -> bytes:
    """What responses to a question are checked against. Raises Malformed."""
    answer = document.answer
    if not answer and document.spans and document.spans != ((0, len(document.text)),):
        start, end = document.spans[0]
        answer = document.text[start:end]
    if not answer.strip():
        reason = "no answer to check responses against: say where it stands, for instance data.answer='{answer}'"
        raise Malformed(document.name, reason, document.text)
    return answer.encode()


def mixture(config: DataConfig, parts: Sequence[int]) -> list[tuple[int, float]]:
    """What `train_batches` takes of weights and of how many training pieces each source has.

    Raises:
      ConfigError: a source with a weight has none.
    """
    if not config.weights:
        return []
    for source, count in zip(config.sources, parts, strict=True):
        if not count:
            raise ConfigError(f"data.weights: {source} gives no training document: leave it out")
    return list(zip(parts, config.weights, strict=True))


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
    if config.weights and len(config.weights) != len(config.sources):
        raise ConfigError(
            f"data.weights has {len(config.weights)} numbers and data.sources {len(config.sources)} sources: "
            "give one number a source, or none"
        )
    if not all(weight > 0 and math.isfinite(weight) for weight in config.weights):
        raise ConfigError(f"data.weights is {config.weights}: every weight must be positive and finite")
    for name in ("documents", "workers", "prefetch"):
        if getattr(config, name) < 0:
            raise ConfigError(f"data.{name} is {getattr(config, name)}: it must not be negative")
