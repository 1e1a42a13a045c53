# SPDX-License-Identifier: Apache-2.0
"""From a record, a mapping of fields, to a document: format strings over its fields.

A record is a line of JSON, a row of a table, an example of a dataset. Whatever is wrong with one is a `Malformed` that
names its place.
"""

import json
import re
import string
from collections.abc import Mapping
from typing import Any

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import Document, Malformed

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors open UTF-8 files with it


class Fields:
    """What of a record makes a document.

    Args:
      text: format string over a record's fields, "{question}\\n{answer}".
      span: likewise; the part of the text that positions of mode "span" come from, "" for all of it. Where the format
        string `span` is a part of the format string `text`, that part of every document (each time, if it is there more
        than once); else the last place where the formatted span stands in the formatted text.
      answer: likewise; what a response is checked against.

    Raises:
      ConfigError: a format string is broken.
    """

    def __init__(self, text: str = "{text}", span: str = "", answer: str = ""):
        self.text, self.span, self.answer = text, span, answer
        names = check_template("data.text", text, needs_field=True)
        names += check_template("data.span", span) + check_template("data.answer", answer)
        self.names = tuple(dict.fromkeys(re.split(r"[.\[]", name, maxsplit=1)[0] for name in names))
        self._before_span = _prefixes(text, span)

    def document(self, record: Mapping[str, Any], i: int, place: str) -> Document:
        """The document of a record, number i of its source. Raises Malformed."""
        text = _format(self.text, record, place)
        return Document(text, self._spans(text, record, place), i, place, _format(self.answer, record, place))

    def _spans(self, text: str, record: Mapping[str, Any], place: str) -> tuple[tuple[int, int], ...]:
        if not self.span:
            return ((0, len(text)),)
        span = _format(self.span, record, place)
        if self._before_span:
            starts = [len(_format(prefix, record, place)) for prefix in self._before_span]
        else:
            starts = [text.rfind(span)]
            if starts[0] < 0:
                raise Malformed(place, f"data.span gives {span[:60]!r}, which is not in the document's text", text)
        return tuple((start, start + len(span)) for start in starts if span)


class _NotUTF8(ConfigError):
    pass


class _RecordFormatter(string.Formatter):
    """str.format over a record that says which field is missing, and puts no null, list or object into a text."""

    def get_field(self, field_name: str, args, kwargs: Mapping[str, Any]):
        name = re.split(r"[.\[]", field_name, maxsplit=1)[0]
        if name not in kwargs:
            raise ConfigError(f"no field {name!r}, the fields are {', '.join(map(repr, kwargs)) or 'none'}")
        try:
            value, _ = super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError, AttributeError):
            raise ConfigError(f"no {field_name!r} in field {name!r}") from None
        if isinstance(value, bytes):  # tables and examples hold text as bytes
            value = decode(value, None)
        if not isinstance(value, str | int | float):
            kind = {dict: "an object", list: "a list", type(None): "null"}.get(type(value), "neither")
            raise ConfigError(f"field {field_name!r} is {kind}, expected text or a number")
        return value, name


def _format(template: str, record: Mapping[str, Any], place: str) -> str:
    try:
        text = _RecordFormatter().vformat(template, (), record)
        text.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        reason = f"\\u{ord(text[error.start]):04x} is half of a character: repair the text"
        raise Malformed(place, reason, text.encode(errors="replace").decode(), encoding=True) from None
    except (ValueError, OverflowError, MemoryError) as error:
        shown = str(record)[:200].encode(errors="replace").decode()
        raise Malformed(place, str(error), shown, isinstance(error, _NotUTF8)) from None
    return text


def check_template(field: str, template: str, needs_field: bool = False) -> list[str]:
    """Check a format string over a record's fields.

    Returns:
      The fields that it names.

    Raises:
      ConfigError: unbalanced braces, braces without a name, or no field where one is needed.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"{field} is {template!r}: {error}; write {{name}} for a field") from None
    if any(name == "" or name.isdigit() for name in names):
        raise ConfigError(f"{field} is {template!r}: write the name of a field between the braces")
    if needs_field and not names:
        raise ConfigError(f"{field} is {template!r}, which names no field: write {{name}} for a field")
    return names


def _prefixes(text: str, span: str) -> list[str]:
    """What stands in the format string `text` before each occurrence of the format string `span`: formatted, it is as
    long as the place where the span starts."""
    prefixes, at = [], text.find(span) if span else -1
    while at >= 0:
        try:
            for part in (text[:at], text[at + len(span) :]):
                check_template("", part)
            prefixes.append(text[:at])
        except ConfigError:
            pass  # the occurrence begins or ends inside a field's braces
        at = text.find(span, at + len(span))
    return prefixes


def decode(raw: bytes, path: str | None, line: int | None = 1) -> str:
    """UTF-8 text without a byte order mark.

    Args:
      path: where it stands, for the error; None: a part of a record.
      line: that raw starts at; None: path says enough.

    Raises:
      Malformed: bytes that are not UTF-8; a plain ConfigError without a path.
    """
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        reason = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        if path is None:
            raise _NotUTF8(reason) from None
        before = raw.count(b"\n", 0, error.start)
        place = path if line is None else f"{path}:{line + before}"
        start = raw.rfind(b"\n", 0, error.start) + 1
        shown = raw[start : start + 200].decode(errors="replace")
        raise Malformed(place, f"{reason}: convert the file to UTF-8", shown, encoding=True) from None


def parse(text: str, place: str) -> dict[str, Any]:
    """The JSON object that a text holds. Raises Malformed."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise Malformed(place, f"not JSON: {error.msg} at column {error.pos + 1}", text) from None
    except (ValueError, RecursionError) as error:
        raise Malformed(place, f"cannot read this JSON: {error}", text) from None
    if not isinstance(record, dict):
        raise Malformed(place, f"expected a JSON object, found {type(record).__name__}", text)
    return record
