# SPDX-License-Identifier: Apache-2.0
"""Does a thought give the answer away? What it quotes of the text around its position, and the thought without that.

A correct piece of reasoning ends with the answer too, so none of this says that a thought cheats. Each rate stands
beside that of another document's thought at the same position, which quotes by chance alone.

Tokens are compared by their text without the spaces around it ("9" and " 9" are the same word). A run of the target is
its first token and as many of the following ones as the thought goes on with.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

NEIGHBOURS = 3  # tokens right after the target, and last ones of the prefix


class Words:
    """Token ids as what is compared: the text of each without spaces around it, or all of it where it is nothing else.
    A token that decodes to no text of its own stays its id."""

    def __init__(self, tokenizer):
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, tokens: Sequence[int]) -> list[Hashable]:
        return [self._word(int(token)) for token in tokens]

    def _word(self, token: int) -> Hashable:
        if token not in self._known:
            text = self._tokenizer.decode([token])
            whole = text if "\ufffd" not in text else ""
            self._known[token] = whole.strip() or whole or token
        return self._known[token]


class Quotes(NamedTuple):
    """What one thought quotes.

    target: the first scored token. whole: all scored tokens in a row. ahead: the NEIGHBOURS tokens after them in a row;
    None where the document ends before. behind: the last NEIGHBOURS tokens of the prefix in a row; None where it is
    shorter. bare: the thought is not empty and holds nothing but scored tokens.
    """

    target: bool
    whole: bool
    ahead: bool | None
    behind: bool | None
    bare: bool


def find_quotes(thought: Sequence[Hashable], document: Sequence[Hashable], position: int, horizon: int) -> Quotes:
    """Args:
    thought: words of the thought, without tags.
    document: words of all of the document.
    position, horizon: the scored tokens are document[position : position + horizon].
    """
    end = position + horizon
    target = document[position:end]
    ahead, behind = document[end : end + NEIGHBOURS], document[max(position - NEIGHBOURS, 0) : position]
    return Quotes(
        target=target[0] in thought,
        whole=_holds(thought, target),
        ahead=_holds(thought, ahead) if len(ahead) == NEIGHBOURS else None,
        behind=_holds(thought, behind) if len(behind) == NEIGHBOURS else None,
        bare=bool(thought) and set(thought) <= set(target),
    )


def is_known(document: Sequence[Hashable], position: int) -> bool:
    """Whether the first scored token stands in the prefix already, where a thought can have it from."""
    return document[position] in document[:position]


def quoted_places(thought: Sequence[Hashable], target: Sequence[Hashable]) -> list[int]:
    """Places in the thought of every run of the target, ascending."""
    places, i = [], 0
    while i < len(thought):
        n = 0
        while n < len(target) and i + n < len(thought) and thought[i + n] == target[n]:
            n += 1
        places.extend(range(i, i + n))
        i += max(n, 1)
    return places


def without(tokens: Sequence[int], places: Sequence[int]) -> list[int]:
    """The tokens that stand elsewhere."""
    removed = set(places)
    return [token for i, token in enumerate(tokens) if i not in removed]


def other_places(length: int, places: Sequence[int], seed: Sequence[int]) -> list[int] | None:
    """As many places of the thought again, drawn from the others: what removing tokens costs whatever they are. None
    where there are fewer others.

    Args:
      length: of the thought.
      seed: decides the draw.
    """
    left = sorted(set(range(length)) - set(places))
    if len(left) < len(places):
        return None
    drawn = np.random.default_rng(list(seed)).permutation(len(left))[: len(places)]
    return sorted(left[i] for i in drawn)


def _holds(thought: Sequence[Hashable], run: Sequence[Hashable]) -> bool:
    n = len(run)
    return any(list(thought[i : i + n]) == list(run) for i in range(len(thought) - n + 1))
