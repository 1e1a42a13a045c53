# SPDX-License-Identifier: Apache-2.0
"""Questions of reasoning-gym (extra: reasoning_gym): about a hundred generators, each with a scorer of its own.

A question's answer here is where it comes from (dataset, seed, size, index): whoever scores a response generates the
same question again, with everything that its scorer wants to know.
"""

import functools
import json
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import Document


class ReasoningGymSource:
    """`size` questions of one dataset, a pure function of name, seed and size.

    Raises:
      ConfigError: the package is missing, or it has no such dataset.
    """

    def __init__(self, name: str, seed: int, size: int):
        self.name, self.seed, self.size = name, seed, size
        self._questions = open_dataset(name, seed, size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < self.size:
            raise IndexError(f"reasoning_gym/{self.name}: document {i} of {self.size}")
        text = self._questions[i]["question"].strip() + "\n"
        return Document(text, ((0, len(text)),), i, f"reasoning_gym/{self.name}/{i}", self._place(i))

    def _place(self, i: int) -> str:
        return json.dumps([self.name, self.seed, self.size, i])


@functools.cache
def open_dataset(name: str, seed: int, size: int) -> Any:
    """One of the package's datasets, questions by index.

    Raises:
      ConfigError: the package is missing, or it has no such dataset.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            f"data.sources names reasoning_gym/{name}, which needs a package: pip install 'rlp_jax[reasoning_gym]'"
        ) from None
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size)
    except ValueError as error:
        raise ConfigError(f"data.sources: reasoning_gym/{name}: {error}") from None


def score(answer: str | None, place: str) -> float:
    """The package's score of an answer to the question of that place, 0 to 1."""
    name, seed, size, i = json.loads(place)
    questions = open_dataset(name, seed, size)
    return float(questions.score_answer(answer=answer, entry=questions[i]))
