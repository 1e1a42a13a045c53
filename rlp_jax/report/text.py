# SPDX-License-Identifier: Apache-2.0
"""Untrusted text on a page. A model writes what it likes: markup, control characters, halves of characters.

Escaping is the template's and JSON's business. Here is what escaping does not do: characters that a reader could not
see, or that would move others about, are shown by their number.
"""

import json
import re
from typing import Any

# Controls but tab and newline, lone surrogates, marks and overrides of direction, line and paragraph separator, the
# byte order mark. Joiners stay: words of some scripts are spelt with them.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]"
)
# What ends a script element or starts a comment in it, and what is no character of JavaScript's lines.
RISKY = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def visible(value: Any) -> str:
    """The text with ⟨U+202E⟩ for a character that cannot be seen; "" for None."""
    return "" if value is None else UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", str(value))


def script_json(value: Any) -> str:
    """JSON on one line, in ASCII, that may stand in a script element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escaped in RISKY.items():
        text = text.replace(character, escaped)
    return text
