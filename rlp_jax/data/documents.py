# SPDX-License-Identifier: Apache-2.0
"""A document, its tokens, and the hash that decides what depends on a document's text."""

import dataclasses
import hashlib
import re
from typing import NamedTuple

import numpy as np

from rlp_jax.config import ConfigError

FIRST_CHARACTERS = 80  # of a text, to recognise it by


class Malformed(ConfigError):
    """A record that gives no document.

    Attributes:
      place: where it stands: "file:line".
      reason: what is wrong with it, one line.
      text: its first characters.
      encoding: whether bytes or characters are wrong rather than what they say.
    """

    def __init__(self, place: str, reason: str, text: str = "", encoding: bool = False):
        super().__init__(f"{place}: {reason}")
        self.place, self.reason, self.text, self.encoding = place, reason, text[:FIRST_CHARACTERS], encoding

    def __reduce__(self):  # it comes back from reading processes
        return Malformed, (self.place, self.reason, self.text, self.encoding)


class Document(NamedTuple):
    """A text as a source gives it.

    text: characters.
    spans: (start, end) character ranges that positions of mode "span" come from.
    id: its number within its source.
    name: where it stands: "file:line", or the generator and number.
    answer: what a response to it is checked against, where its source says so.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    id: int
    name: str
    answer: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A piece of a document, ready for a batch.

    tokens_T: [T] int32, no special tokens.
    span_T: [T] bool, tokens that overlap one of the document's spans.
    id: from the document's text and the piece's place in it, in [0, 2**31) so that jax keeps it whole without 64-bit
      integers. The same whatever the order of files and documents.
    name: the document's, with "#2" for its second piece and so on.
    answer: of a question, UTF-8.
    """

    tokens_T: np.ndarray
    span_T: np.ndarray
    id: int
    name: str
    answer: bytes = b""


def stable_hash(purpose: str, text: str) -> int:
    """64 bits that are the same in every process, unlike `hash`. Different purposes (at most 16 bytes) are
    independent."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little")


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a text belongs to the held-out split: by its hash, so that copies of it stay on one side."""
    return stable_hash("heldout", text) < fraction * 2**64


def narrow_spans(document: Document, pattern: re.Pattern) -> Document:
    """The document with the pattern's matches within its spans as its spans. An empty match stands for the character
    after it, so that "(?m)^" is the first character of each line. ^ and look-behinds see the text before a span."""
    spans = []
    for start, end in document.spans:
        matches = (match.span() for match in pattern.finditer(document.text, start, end))
        spans.extend((first, max(last, first + 1)) for first, last in matches if first < end)
    return document._replace(spans=tuple(spans))


def answers(document: Document, pattern: re.Pattern) -> bool:
    """Whether one of the document's spans, as a text of its own, holds a match."""
    return any(pattern.search(document.text[start:end]) for start, end in document.spans)


def tokenize(document: Document, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The document's tokens, [T] int32, and which of them overlap its spans, [T] bool."""
    text, spans = document.text, document.spans
    if not spans or spans == ((0, len(text)),):
        tokens_T = np.array(tokenizer.encode(text), np.int32)
        return tokens_T, np.full(len(tokens_T), bool(spans))
    ids, offsets = tokenizer.encode_with_offsets(text)
    start_T, end_T = np.array(offsets, np.int64).reshape(-1, 2).T
    span_T = np.zeros(len(ids), bool)
    for start, end in spans:
        span_T |= (start_T < end) & (end_T > start)
    return np.array(ids, np.int32), span_T


def cut(document: Document, tokenizer, document_tokens: int, occurrence: int = 0) -> list[TokenizedDocument]:
    """The document as consecutive pieces of at most document_tokens tokens; together they are all of it.

    Args:
      occurrence: how many documents of the same text came before, so that copies get ids of their own.
    """
    return pieces_of(document, *tokenize(document, tokenizer), document_tokens, occurrence)


def pieces_of(
    document: Document, tokens_T: np.ndarray, span_T: np.ndarray, document_tokens: int, occurrence: int = 0
) -> list[TokenizedDocument]:
    """`cut` of a document whose tokens are known, as `tokenize` gives them."""
    pieces = []
    for number, start in enumerate(range(0, len(tokens_T), document_tokens)):
        piece = slice(start, start + document_tokens)
        identity = stable_hash("piece", f"{number} {occurrence} {document.text}") >> 33
        name = document.name if number == 0 else f"{document.name}#{number + 1}"
        pieces.append(TokenizedDocument(tokens_T[piece], span_T[piece], identity, name))
    return pieces
