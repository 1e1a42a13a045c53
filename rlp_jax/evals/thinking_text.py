# SPDX-License-Identifier: Apache-2.0
"""Thoughts for a reader at a console: plain lines, and tokens tinted by what they gain.

Thoughts are what a model wrote: control characters in them are shown, not sent to the terminal.
"""

import unicodedata

import numpy as np
from rich.text import Text

from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.evals.think import Thinking

PREFIX_CHARACTERS = 200
FULL_TINT = 2.0  # nats; what is more looks the same


def describe(thinking: Thinking, tokenizer: Tokenizer) -> str:
    """All thoughts with their gains, as plain text."""
    head = [place(thinking, tokenizer)]
    if thinking.target:
        target = tokenizer.decode(thinking.target)
        head.append(f"the text goes on with {target!r}: {thinking.s_ema:+.3f} nats a token without a thought")
    thoughts = (
        f"\n{title(thinking, g)}\n{printable(tokenizer.decode(thought))}" for g, thought in enumerate(thinking.thoughts)
    )
    return "\n".join([*head, *thoughts])


def place(thinking: Thinking, tokenizer: Tokenizer) -> str:
    """Where in the text the thoughts stand."""
    before = tokenizer.decode(thinking.tokens[: thinking.position])[-PREFIX_CHARACTERS:]
    return f"before token {thinking.position} of {len(thinking.tokens)}: ...{before!r}"


def title(thinking: Thinking, g: int) -> str:
    """The line above thought g."""
    gain = "" if thinking.gain_G is None else f"gain {thinking.gain_G[g]:+.3f}, "
    end = "" if thinking.stopped_G[g] else ", cut at the cap"
    return f"[{g + 1}] {gain}{thinking.length_G[g]} tokens{end}"


def best_first(thinking: Thinking) -> list[int]:
    """The thoughts by their gain, the largest first; as they were drawn where there is none."""
    if thinking.gain_G is None:
        return list(range(len(thinking.thoughts)))
    return [int(g) for g in np.argsort(-thinking.gain_G, kind="stable")]


def tinted(pieces: list[str], values: np.ndarray) -> Text:
    """Tokens over colours: green where a value is positive, red where it is negative, stronger for larger ones."""
    text = Text()
    for piece, value in zip(pieces, values, strict=True):
        text.append(printable(piece), style=_style(float(value)))
    return text


def token_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The text that each token adds. A character cut into several tokens comes with the last of them."""
    texts, said = [], ""
    for i in range(len(tokens)):
        whole = tokenizer.decode(tokens[: i + 1])
        if whole.endswith("\ufffd") and i + 1 < len(tokens):
            texts.append("")
            continue
        texts.append(whole[len(said) :])
        said = whole
    return texts


def printable(text: str) -> str:
    """The text with control characters, but for line ends and tabs, written as escapes."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c for c in text
    )


def _style(value: float) -> str:
    share = min(abs(value) / FULL_TINT, 1.0)
    if not share > 0.02:
        return ""
    fade = round(235 - 160 * share)
    return f"black on rgb({fade},235,{fade})" if value > 0 else f"black on rgb(235,{fade},{fade})"
