# SPDX-License-Identifier: Apache-2.0
"""The quickstart's documents: chains of known functions, where the answer needs several dependent steps.

There are eight states, a to h, and ten operations, each a fixed permutation of the states. A line names a start, the
operations to apply in that order, and where one ends:

    c flip turn swap = e .

A document holds several such lines. No step is hard once the tables of `OPERATIONS` are known, yet every step needs the
one before it, so a small network cannot see the answer at once: on this text the plain prediction stays at chance.

`thinking` adds what the base model of the quickstart was pretrained on besides plain documents: thoughts of mixed
quality, one before an answer. Most follow a wrong but plausible procedure, the operations from last to first; the
right procedure is a minority; the rest are beside the point. The answer after any of them is the text's true one, so
what a model can learn from such text is to trust a thought exactly if its steps are right. RLP never sees these.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from rlp_jax.data.documents import Document

STATES = "abcdefgh"
# operation: where a, b, ... h go. None fixes a state and no two agree on more than one; together they generate every
# permutation, so a product of a few has no shortcut.
OPERATIONS = {
    "flip": "bghcdefa",
    "swap": "dchefabg",
    "turn": "gcdbaehf",
    "spin": "hdagfbec",
    "jump": "bfehcgad",
    "slide": "fagehbcd",
    "roll": "chfbgdea",
    "twist": "efbahcdg",
    "push": "dabgchfe",
    "pull": "egahbdcf",
}
INSTRUCTION = "Think first ."  # opens every thinking document and no plain one
OPEN, CLOSE = "<think>", "</think>"
WORDS = (*STATES, *OPERATIONS, "=", ".", "Think", "first")

# Shares of the base model's thoughts.
THOUGHT_MIX = {"right": 0.25, "backwards": 0.50, "irrelevant": 0.10, "random": 0.10, "empty": 0.05}

LINES = 3  # a document
TRAIN_STEPS = (3, 5)  # operations a line, both ends included: what RLP trains on
LONG_STEPS = (6, 7)  # longer chains: in the base model's pretraining, never in RLP's


@dataclasses.dataclass(frozen=True)
class Line:
    """A start and the operations to apply to it in order."""

    start: str
    operations: tuple[str, ...]

    @property
    def answer(self) -> str:
        return walk(self.start, self.operations)[-1]

    def question(self) -> str:
        return " ".join((self.start, *self.operations, "="))

    def thought(self, backwards: bool = False) -> str:
        """The chain worked out: the start, then each operation and the state it leads to."""
        operations = self.operations[::-1] if backwards else self.operations
        return narrate(operations, walk(self.start, operations))


class ComposeSource:
    """Plain documents, `size` of them, a pure function of (seed, index, the other arguments).

    Args:
      seed: another seed, other documents.
      size: how many.
      steps: fewest and most operations a line.
      lines: lines a document; the first tokens of their answers are the document's spans.

    Raises:
      ValueError: size or lines below 1, or a range of steps that is empty or not within 2 to 10.
    """

    def __init__(self, seed: int, size: int, steps: tuple[int, int] = TRAIN_STEPS, lines: int = LINES):
        if size < 1 or lines < 1:
            raise ValueError(f"compose: size is {size} and lines is {lines}, both must be at least 1")
        if not 2 <= steps[0] <= steps[1] <= len(OPERATIONS):
            raise ValueError(f"compose: steps is {steps}, expected (fewest, most) from 2 to {len(OPERATIONS)}")
        self.seed, self.size, self.steps, self.lines = seed, size, steps, lines

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < self.size:
            raise IndexError(f"compose: document {i} of {self.size}")
        rng = np.random.default_rng((self.seed, i, *self.steps, self.lines))
        return render(random_lines(rng, self.lines, self.steps), i)

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(self.size))


def walk(start: str, operations: tuple[str, ...]) -> list[str]:
    """The start and the states after each operation."""
    return list(itertools.accumulate(operations, lambda s, name: OPERATIONS[name][STATES.index(s)], initial=start))


def narrate(operations: tuple[str, ...], states: list[str]) -> str:
    """States, one more than operations, with the operations between them."""
    steps = zip(operations, states[1:], strict=True)
    return " ".join((states[0], *itertools.chain.from_iterable(steps)))


def random_lines(rng: np.random.Generator, lines: int, steps: tuple[int, int]) -> list[Line]:
    """Lines with uniform starts, lengths and operations, no operation twice in a line: so the two procedures part at
    the first step."""
    names = list(OPERATIONS)
    result = []
    for _ in range(lines):
        count = int(rng.integers(steps[0], steps[1] + 1))
        operations = tuple(names[k] for k in rng.permutation(len(names))[:count])
        result.append(Line(STATES[rng.integers(len(STATES))], operations))
    return result


def render(lines: list[Line], number: int = 0) -> Document:
    """The plain document of some lines; its spans are the answers."""
    text, spans = "", []
    for line in lines:
        text += line.question() + " "
        spans.append((len(text), len(text) + len(line.answer)))
        text += f"{line.answer} .\n"
    return Document(text=text, spans=tuple(spans), id=number, name=f"compose/{number}")


def read(text: str) -> list[Line]:
    """The lines of a plain document's text, an unfinished last one too. The inverse of `render`.

    Raises:
      ValueError: a line that is not `state operation ... = ...`.
    """
    lines = []
    for words in (line.split() for line in text.splitlines()):
        if not words:
            continue
        end = words.index("=") if "=" in words else len(words)
        start, operations = words[0], tuple(words[1:end])
        if start not in STATES or not set(operations) <= set(OPERATIONS):
            raise ValueError(f"compose: {' '.join(words)!r} is not a line of states and operations")
        lines.append(Line(start, operations))
    return lines


def thinking(rng: np.random.Generator, lines: list[Line], steps: tuple[int, int]) -> list[tuple[str, str]]:
    """A thought of mixed quality for each line: (kind, thought), kinds drawn from `THOUGHT_MIX`.

    "right" and "backwards" work out the line; "irrelevant" works out another line, "random" strings operations and
    states together, "empty" says nothing.
    """
    kinds, bounds = list(THOUGHT_MIX), list(itertools.accumulate(THOUGHT_MIX.values()))
    return [_thought(rng, kinds[bisect.bisect(bounds, rng.random() * bounds[-1])], line, steps) for line in lines]


def _thought(rng: np.random.Generator, kind: str, line: Line, steps: tuple[int, int]) -> tuple[str, str]:
    if kind in ("right", "backwards"):
        return kind, line.thought(backwards=kind == "backwards")
    if kind == "irrelevant":
        return kind, random_lines(rng, 1, steps)[0].thought()
    if kind == "random":
        other = random_lines(rng, 1, steps)[0]
        states = [STATES[k] for k in rng.integers(len(STATES), size=len(other.operations) + 1)]
        return kind, narrate(other.operations, states)
    return kind, ""


def judge(thought: str, line: Line) -> str:
    """Which procedure a thought followed on this line: "right", "backwards", "empty" or "other"."""
    words = thought.split()
    if not words:
        return "empty"
    for kind, backwards in (("right", False), ("backwards", True)):
        if words == line.thought(backwards).split():
            return kind
    return "other"
