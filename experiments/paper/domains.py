# SPDX-License-Identifier: Apache-2.0
"""The study's six corpora: plain documents, problems, thoughts of mixed quality, and the tokenizer of them all.

Question-and-answer corpora (`arithmetic`, `compose`, `pointers`) are lines with exactly one "=" each, before a one-word
answer. General text (`textbook`, `story`, `crawl`) has no "=" anywhere; a passage of the first two ends with a word
that its text gives away to whoever works it out. Every such line or passage is a `Problem`; `crawl` has none itself.

Questions are split by a hash of their text: 1/16 are for testing, 1/16 for validation, and the rest for everything
else, pretraining included, so that no examined question stands in any text that a model has read.

Everything is a function of the random generator that is passed in.
"""

import bisect
import dataclasses
import itertools
import pathlib
import zlib
from collections.abc import Callable

import numpy as np

from experiments.paper import arithmetic, crawl, pointers, story
from experiments.paper.chains import EMPTY, Chain, Problem
from experiments.tiny_base import word_tokenizer
from rlp_jax.data import compose
from rlp_jax.data.compose import CLOSE, INSTRUCTION, OPEN  # noqa: F401, the template of the whole study

QA = ("arithmetic", "compose", "pointers")
GENERAL = ("textbook", "story", "crawl")
CORPORA = QA + GENERAL
MATH = ("arithmetic", "textbook")
REASONING = ("compose", "pointers", "story")
BENCHMARKS = MATH + REASONING  # `crawl` has no problems

# Shares of the bases' thoughts, as the quickstart's.
THOUGHT_MIX = {"right": 0.25, "wrong": 0.50, "irrelevant": 0.10, "random": 0.10, "empty": 0.05}
FIRST_MIX = {"right": 0.80, "wrong": 0.10, "irrelevant": 0.04, "random": 0.04, "empty": 0.02}  # early in pretraining

DOCUMENT_TOKENS = 40  # the longest document
LONG_DOCUMENT_TOKENS = 128
THOUGHT_TOKENS = 15  # the longest thought, closing tag included
# Where RLP thinks: at answers, and in general text at the word that tells what the text before it decides.
SPAN_PATTERN = r"(?<== )\S+|(?<=so x is )\S+|(?<= is in )\S+"
ANYWHERE_PATTERN = r"(?m)(?<== )\S+|^[^=\n]+$"  # at answers, and in general text at every token

WORDS = tuple(
    dict.fromkeys(
        (*compose.WORDS, *arithmetic.WORDS, *pointers.WORDS, *story.WORDS, *crawl.WORDS)  # a word's place is its number
    )
)
TOKENIZER = word_tokenizer((OPEN, CLOSE), WORDS)

# Words that stand for a state in a random thought: before its last step, and at its end.
STATES = {
    "arithmetic": (arithmetic.DIGITS, arithmetic.DIGITS),
    "compose": (compose.STATES, compose.STATES),
    "pointers": (pointers.NODES, pointers.NODES),
    "textbook": (arithmetic.DIGITS, arithmetic.DIGITS),
    "story": (story.NAMES, story.ROOMS),
}
LINES = {"arithmetic": 3, "compose": 4, "pointers": 2, "textbook": 2, "story": 1}  # a document's, at most


@dataclasses.dataclass(frozen=True)
class Written:
    """A document and the problems in it: (characters before the answer, problem), the answer after one space more."""

    text: str
    problems: tuple[tuple[int, Problem], ...]


def _compose(rng: np.random.Generator) -> Problem:
    (line,) = compose.random_lines(rng, 1, compose.TRAIN_STEPS)
    right, wrong = (
        Chain(tuple(compose.walk(line.start, operations)), operations)
        for operations in (line.operations, line.operations[::-1])
    )
    return Problem("compose", line.question(), line.answer, right, wrong)


GENERATORS: dict[str, Callable[[np.random.Generator], Problem]] = {
    "arithmetic": arithmetic.arithmetic,
    "compose": _compose,
    "pointers": pointers.pointers,
    "textbook": arithmetic.textbook,
    "story": story.story,
}


def split_of(question: str) -> str:
    """ "train", "validation" or "test", by the question's text alone."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(question.encode()) % 16, "train")


def problem(corpus: str, rng: np.random.Generator, split: str = "train") -> Problem:
    """A problem of a split.

    Raises:
      KeyError: a corpus without problems.
    """
    generate = GENERATORS[corpus]
    while True:
        drawn = generate(rng)
        if split_of(drawn.question) == split:
            return drawn


def document(corpus: str, rng: np.random.Generator, lines: int | None = None) -> Written:
    """A document of a corpus.

    Args:
      lines: question-and-answer lines or passages; of `crawl`, lines of about 30 words. None: as many as make a
        document of 24 to 40 tokens.
    """
    if lines is None and corpus != "crawl":
        lines = LINES[corpus]
        limit = DOCUMENT_TOKENS
    else:
        limit = DOCUMENT_TOKENS * (lines or 1)
    while True:
        parts = [_line(corpus, rng) for _ in range(lines or 1)]
        if sum(len(text.split()) for text, _ in parts) <= limit:
            break
    text, problems = "", []
    for line, asked in parts:
        problems += [(len(text) + offset, item) for offset, item in asked]
        text += line + "\n"
    return Written(text, tuple(problems))


def document_text(corpus: str, rng: np.random.Generator, lines: int | None = None) -> str:
    """The text of `document`, each line closed by a line break."""
    return document(corpus, rng, lines).text


def long_document(corpus: str, rng: np.random.Generator) -> Written:
    """A document of as many lines as fit into `LONG_DOCUMENT_TOKENS`."""
    text, problems, left = "", [], LONG_DOCUMENT_TOKENS
    while True:
        line, asked = _line(corpus, rng)
        left -= len(line.split())
        if left < 0:
            return Written(text, tuple(problems))
        problems += [(len(text) + offset, item) for offset, item in asked]
        text += line + "\n"


def _line(corpus: str, rng: np.random.Generator) -> tuple[str, list[tuple[int, Problem]]]:
    if corpus != "crawl":
        item = problem(corpus, rng)
        return item.line(), [(len(item.question), item)]
    words = int(rng.integers(30, DOCUMENT_TOKENS + 1))
    if rng.random() < 0.5:
        item = problem("textbook", rng)
        text, offset = crawl.around(rng, item, words)
        return text, [(offset, item)]
    strays = problem(("story", "textbook")[rng.integers(2)], rng).question.split(" . ")[:-1]
    return crawl.interleave(rng, [f"{stray} ." for stray in strays], words), []


def mixed_thoughts(
    rng: np.random.Generator, item: Problem, mix: dict[str, float] = THOUGHT_MIX
) -> list[tuple[str, Chain, float]]:
    """Three thoughts on a problem, as (kind, chain, share): the right one, the wrong one, and one of the other kinds.

    The shares are those of `mix`, the last one's that of all other kinds together: weighted by them, the three
    stand for thoughts drawn from the mix. "irrelevant" works out another problem, "random" puts random states between
    the steps of another one, "empty" says nothing.
    """
    others = {kind: share for kind, share in mix.items() if kind not in ("right", "wrong")}
    bounds = list(itertools.accumulate(others.values()))
    kind = list(others)[bisect.bisect(bounds, rng.random() * bounds[-1])]
    return [
        ("right", item.right, mix["right"]),
        ("wrong", item.wrong, mix["wrong"]),
        (kind, _beside_the_point(rng, kind, item.corpus), bounds[-1]),
    ]


def _beside_the_point(rng: np.random.Generator, kind: str, corpus: str) -> Chain:
    if kind == "empty":
        return EMPTY
    other = problem(corpus, rng).right
    if kind == "irrelevant":
        return other
    inner, last = STATES[corpus]
    states = [*(inner[rng.integers(len(inner))] for _ in other.steps), last[rng.integers(len(last))]]
    return Chain(tuple(states), other.steps)


def ordinary_thought(rng: np.random.Generator, corpus: str, before: str) -> tuple[str, Chain]:
    """A thought where general text goes on with nothing to be worked out: (kind, chain).

    Half of them are empty. The others work out what the text has told so far, and where that is nothing, a passage of
    their own.
    """
    if rng.random() < 0.5:
        return "empty", EMPTY
    words = before.split()
    if corpus == "crawl":
        corpus = ("textbook", "story")[rng.integers(2)]
    chains = (story.last_mover(words),) if corpus == "story" else arithmetic.so_far(words)  # so_far: (right, wrong)
    told = chains[0] if rng.random() < 1 / 3 else chains[-1]
    return ("told", told) if told.states else ("irrelevant", problem(corpus, rng).right)


def write_data(folder: pathlib.Path, seed: int = 0) -> None:
    """Writes the study's files into a folder, see `data_files`."""
    from experiments.paper import data_files  # it imports this module

    data_files.write_data(folder, seed)
