# SPDX-License-Identifier: Apache-2.0
"""What kind of text a token is, by its characters alone, so that it means the same under every tokenizer.

A token's surface is what it adds to the text before it: decoding is the only thing asked of a tokenizer. The built-in
classes are those of `CLASSES`; a user's file of regular expressions over the document's text goes before them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rlp_jax.config import ConfigError

CLASSES = ("word start", "word continuation", "number", "punctuation", "newline", "space", "other")

Rules = tuple[tuple[str, re.Pattern], ...]


def surfaces(tokens: Sequence[int], tokenizer) -> list[str]:
    """What each token adds to the text. Joined they are the text as the tokenizer decodes it.

    A token is decoded beside the one before it, as many tokenizers drop or add spaces at a text's start. One that is
    part of a character only gives what decoding makes of it, usually U+FFFD, or nothing.
    """
    result = []
    for i, token in enumerate(tokens):
        alone = tokenizer.decode([token])
        if i == 0:
            result.append(alone)
            continue
        before = tokenizer.decode([tokens[i - 1]])
        both = tokenizer.decode([tokens[i - 1], token])
        result.append(both[len(before) :] if both.startswith(before) else alone)
    return result


def builtin_class(surface: str, before: str) -> str:
    """One of CLASSES.

    - whitespace alone: "newline" where it holds a line's end, else "space".
    - any digit: "number".
    - any letter: "word continuation" where its first letter directly follows a letter or digit, an apostrophe between
      them or not (it's), else "word start".
    - any other visible character: "punctuation". What is left (parts of a character, nothing): "other".

    Args:
      before: the text before the token; its last two characters decide.
    """
    if surface and not surface.strip():
        return "newline" if "\n" in surface or "\r" in surface else "space"
    if any(character.isdigit() for character in surface):
        return "number"
    letter = next((i for i, character in enumerate(surface) if character.isalpha()), None)
    if letter is not None:
        continued = re.search(r"[^\W_]['’]?$", before[-2:] + surface[:letter])
        return "word continuation" if continued else "word start"
    return "punctuation" if surface.replace("\ufffd", "").strip() else "other"


def classify(parts: Sequence[str], rules: Rules = ()) -> list[str]:
    """The class of each token of a document.

    Args:
      parts: of `surfaces`.
      rules: of `read_rules`; the first rule with a match that shares a character with the token decides, whitespace
        around the token left out. Tokens of no match have their built-in class.
    """
    text = "".join(parts)
    matched: list[str | None] = [None] * len(text)  # by character, the first rule
    for name, pattern in reversed(rules):
        for match in pattern.finditer(text):
            matched[match.start() : match.end()] = [name] * (match.end() - match.start())
    result, start = [], 0
    for part in parts:
        end = start + len(part)
        core = range(start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip()))
        by_rule = [matched[i] for i in (core if len(core) else range(start, end)) if matched[i] is not None]
        names = [name for name, _ in rules if name in by_rule]
        result.append(names[0] if names else builtin_class(part, text[max(start - 2, 0) : start]))
        start = end
    return result


def read_rules(path: Path) -> Rules:
    """Classes of a user: a JSON object, name to regular expression, in order of precedence.

    Raises:
      ConfigError: not such a file, or an expression that is none.
    """
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--classes {path}: {' '.join(str(error).split())}") from None
    if not isinstance(named, dict) or not named or not all(isinstance(value, str) for value in named.values()):
        raise ConfigError(f"--classes {path}: expected an object of names and regular expressions")
    rules = []
    for name, expression in named.items():
        try:
            rules.append((name, re.compile(expression)))
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"--classes {path}: {name} is {expression!r}, no regular expression: {error}") from None
    return tuple(rules)
