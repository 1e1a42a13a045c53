# SPDX-License-Identifier: Apache-2.0
"""Noise: sentences of a simple grammar, with what has strayed in from the textbook and the stories between them.

    the red fox sees a boat . Ann goes to hall . a king likes the old lamp . x is 3 . add 4 . the cat hides . ...

Half of the documents hold a whole passage of the textbook, which is all there is to think about.
"""

import numpy as np

from experiments.paper.chains import Problem

ARTICLES = ("the", "a")
ADJECTIVES = ("red", "old", "tall", "wet", "lazy", "blue")
NOUNS = ("fox", "cat", "king", "boat", "lamp", "tree", "bird", "coat")
TRANSITIVE = ("sees", "likes", "finds", "paints")
INTRANSITIVE = ("hides", "sings", "waits")
WORDS = (*ARTICLES, *ADJECTIVES, *NOUNS, *TRANSITIVE, *INTRANSITIVE)


def sentence(rng: np.random.Generator) -> str:
    """Four to eight words and a full stop."""
    subject, verb = _noun_phrase(rng), rng.random()
    if verb < 0.25:
        return f"{subject} {_one(rng, INTRANSITIVE)} ."
    return f"{subject} {_one(rng, TRANSITIVE)} {_noun_phrase(rng)} ."


def interleave(rng: np.random.Generator, strays: list[str], limit: int) -> str:
    """Noise with the strays in their order between it, up to `limit` words in all; strays that no longer fit go."""
    sentences, left = [], limit
    strays = list(strays)
    while True:
        stray = bool(strays) and rng.random() < 0.4
        new = strays.pop(0) if stray else sentence(rng)
        left -= len(new.split())
        if left < 0:
            return " ".join(sentences)
        sentences.append(new)


def around(rng: np.random.Generator, problem: Problem, limit: int) -> tuple[str, int]:
    """A whole passage with noise before and after it, at most `limit` words: (text, characters before its answer)."""
    passage = problem.line()
    left = limit - len(passage.split())
    before, after = [], []
    while True:
        new = sentence(rng)
        left -= len(new.split())
        if left < 0:
            break
        (before if rng.random() < 0.5 else after).append(new)
    text = " ".join((*before, passage, *after))
    return text, len(" ".join((*before, problem.question)))


def _noun_phrase(rng: np.random.Generator) -> str:
    adjective = f"{_one(rng, ADJECTIVES)} " if rng.random() < 0.5 else ""
    return f"{_one(rng, ARTICLES)} {adjective}{_one(rng, NOUNS)}"


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]
