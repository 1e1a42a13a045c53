# SPDX-License-Identifier: Apache-2.0
"""Chains of arithmetic modulo 10, worked from left to right: as lines with "=", and in a textbook's prose.

    3 + 4 * 7 - 5 = 4 .
    x is 3 . add 4 . times 7 . minus 5 . so x is 4 .

Multipliers are 3, 7 and 9, which have inverses modulo 10: every step keeps all of its state, so that nothing about the
end can be told from a part of the chain. No operand comes twice in a line. Both corpora are worked out in the same
notation, `3 + 4 7 * 7 9 - 5 4`; the wrong procedure applies the operations from the last to the first.
"""

import numpy as np

from experiments.paper.chains import EMPTY, Chain, Problem

DIGITS = "0123456789"
OPERANDS = {"+": "1234", "-": "1234", "*": "379"}
PROSE = {"+": "add", "-": "minus", "*": "times"}
STEPS = (3, 4)  # operations a line, fewest and most
WORDS = (*DIGITS, *OPERANDS, *PROSE.values(), "x", "is", "so")

Operation = tuple[str, str]


def apply(state: str, operation: Operation) -> str:
    """One step, a digit to a digit."""
    symbol, operand = operation[0], int(operation[1])
    value = int(state)
    return str({"+": value + operand, "-": value - operand, "*": value * operand}[symbol] % 10)


def chain(start: str, operations: tuple[Operation, ...]) -> Chain:
    states = [start]
    for operation in operations:
        states.append(apply(states[-1], operation))
    return Chain(tuple(states), tuple(f"{symbol} {operand}" for symbol, operand in operations))


def arithmetic(rng: np.random.Generator, steps: tuple[int, int] = STEPS) -> Problem:
    start, operations = _draw(rng, steps)
    question = " ".join((start, *(f"{symbol} {operand}" for symbol, operand in operations), "="))
    return _problem("arithmetic", question, start, operations)


def textbook(rng: np.random.Generator, steps: tuple[int, int] = STEPS) -> Problem:
    start, operations = _draw(rng, steps)
    sentences = (f"x is {start} .", *(f"{PROSE[symbol]} {operand} ." for symbol, operand in operations), "so x is")
    return _problem("textbook", " ".join(sentences), start, operations)


def so_far(words: list[str]) -> tuple[Chain, Chain]:
    """What a textbook's text has told when it stops anywhere: (right, wrong) over the steps that are complete.

    Nothing before "x is DIGIT ." of the last passage counts; both chains are empty where there is none.
    """
    starts = [i for i in range(len(words) - 3) if _opens(words, i)]
    if not starts:
        return EMPTY, EMPTY
    symbols = {word: symbol for symbol, word in PROSE.items()}
    i = starts[-1] + 4
    start, operations = words[i - 2], []
    while i + 2 < len(words) and words[i] in symbols and words[i + 2] == ".":
        operations.append((symbols[words[i]], words[i + 1]))
        i += 3
    return chain(start, tuple(operations)), chain(start, tuple(operations[::-1]))


def _opens(words: list[str], i: int) -> bool:
    told = words[i : i + 2] == ["x", "is"] and words[i + 2] in DIGITS and words[i + 3] == "."
    return told and (i == 0 or words[i - 1] != "so")


def _draw(rng: np.random.Generator, steps: tuple[int, int]) -> tuple[str, tuple[Operation, ...]]:
    """A multiplication and a sum or difference at least: else the order of the steps would not matter."""
    count, operations = int(rng.integers(steps[0], steps[1] + 1)), []
    while len(operations) < count:
        symbol = "+-*"[rng.integers(3)]
        operand = OPERANDS[symbol][rng.integers(len(OPERANDS[symbol]))]
        if all(operand != other for _, other in operations):
            operations.append((symbol, operand))
        if len(operations) == count and len({symbol == "*" for symbol, _ in operations}) == 1:
            operations.clear()
    return DIGITS[rng.integers(10)], tuple(operations)


def _problem(corpus: str, question: str, start: str, operations: tuple[Operation, ...]) -> Problem:
    right, wrong = chain(start, operations), chain(start, operations[::-1])
    return Problem(corpus, question, right.states[-1], right, wrong)
