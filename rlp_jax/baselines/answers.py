# SPDX-License-Identifier: Apache-2.0
"""Where a response's answer is: between tags, after its thought, brackets matched and spaces kept."""

import bisect
from collections.abc import Callable, Sequence

from rlp_jax.config import GRPOConfig

Decode = Callable[[list[int]], str]
PAIRS = {"{": "}", "(": ")", "[": "]"}  # brackets that nest inside an answer


def whole_answers(text: str, settings: GRPOConfig) -> tuple[list[str], bool]:
    """The answers of a response in order, and whether one more is opened and never closed.

    An answer is all that stands between `answer_open` and the `answer_close` that belongs to it: where the two are
    brackets, as in \\boxed{}, pairs inside are part of it. Nothing before `answer_after` counts.
    """
    start = text.find(settings.answer_after)
    if start < 0:
        return [], False
    start += len(settings.answer_after)
    found = []
    while (begin := text.find(settings.answer_open, start)) >= 0:
        begin += len(settings.answer_open)
        end = _close(text, begin, settings)
        if end < 0:
            return found, True
        found.append(text[begin:end])
        if not settings.answer_open:
            break
        start = end + len(settings.answer_close)
    return found, False


def _close(text: str, begin: int, settings: GRPOConfig) -> int:
    """Where the answer that begins there is closed, -1 where it is not."""
    opening, closing = settings.answer_open[-1:], settings.answer_close
    if PAIRS.get(opening) != closing:
        return text.find(closing, begin)
    depth = 1
    for at in range(begin, len(text)):
        depth += (text[at] == opening) - (text[at] == closing)
        if depth == 0:
            return at
    return -1


def last_answer(text: str, settings: GRPOConfig) -> str | None:
    """The content of a response's last answer; None where there is none or it is not closed."""
    found, unclosed = whole_answers(text, settings)
    return None if unclosed or not found else found[-1]


def first_answer(tokens: Sequence[int], decode: Decode, settings: GRPOConfig) -> tuple[str, int] | None:
    """The content of a response's first answer and how many tokens it takes to close it; None where none is closed.

    A response that is cut there afterwards is distributed as one that had been stopped there: what was sampled later
    does not change what came before.
    """
    tokens = list(tokens)

    def found(count: int) -> list[str]:
        return whole_answers(decode(tokens[:count]), settings)[0]

    answers = found(len(tokens))
    if not answers:
        return None
    count = bisect.bisect_left(range(len(tokens)), True, key=lambda n: bool(found(n)))
    return answers[0], count
