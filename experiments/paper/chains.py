# SPDX-License-Identifier: Apache-2.0
"""What all domains of the study share: a problem and the chains of steps that work it out, rightly or wrongly."""

import dataclasses
import itertools
from typing import NamedTuple


class Chain(NamedTuple):
    """States, one more than steps; a step's words stand between the states before and after it."""

    states: tuple[str, ...]
    steps: tuple[str, ...]

    def words(self) -> str:
        """The chain as a thought's text: state, step, state, step, ..., state. The empty chain says nothing."""
        if not self.states:
            return ""
        steps = zip(self.steps, self.states[1:], strict=True)
        return " ".join((self.states[0], *itertools.chain.from_iterable(steps)))


EMPTY = Chain((), ())


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, its one-word answer, and two procedures: the right one, and a wrong one that looks as good.

    `question` is the text up to the answer, its last word included, without a space after it; the text goes on with
    " ANSWER .". The last state of `right` is the answer; that of `wrong` is only by chance.
    """

    corpus: str
    question: str
    answer: str
    right: Chain
    wrong: Chain

    @property
    def thought(self) -> str:
        return self.right.words()

    def line(self) -> str:
        return f"{self.question} {self.answer} ."

    def judge(self, thought: str) -> str:
        """Which procedure a thought's text followed: "right", "wrong", "empty" or "other"."""
        thought = " ".join(thought.split())
        if not thought:
            return "empty"
        return {self.right.words(): "right", self.wrong.words(): "wrong"}.get(thought, "other")
