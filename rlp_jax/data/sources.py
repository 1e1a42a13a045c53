"""Where documents come from: .jsonl and .txt files, directories of them, and built-in generators.

A source is a random-access sequence: `len(source)`, `source[i] -> Document`. Opening one reads no more than is needed
to know how many documents there are; a broken record is reported, with its line, when it is read.
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.documents import Document

GENERATED_DOCUMENTS = 8192  # of a generator named without a number


def _compose(seed: int, size: int):
    from rlp_jax.data.compose import ComposeSource

    return ComposeSource(seed, size)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors open UTF-8 files with it

# name: (seed, number of documents) -> source
GENERATORS: dict[str, Callable[[int, int], Sequence[Document]]] = {"compose": _compose}
REASONING_GYM = "reasoning_gym/"  # before the name of one of that package's datasets


def open_sources(config: DataConfig, seed: int) -> list[Sequence[Document]]:
    """Open `config.sources`: paths of .jsonl and .txt files or of directories of them (read in order of name), and
    generators by name, with a number of documents if wanted ("compose:1000", "reasoning_gym/chain_sum:1000").

    Raises:
      ConfigError: no source, an unknown name or kind of file, a missing or empty file, or a broken template.
    """
    if not config.sources:
        raise ConfigError(f"data.sources is empty: name .jsonl or .txt files, or one of {', '.join(GENERATORS)}")
    sources = []
    for source in config.sources:
        name, _, size = source.partition(":")
        if name in GENERATORS:
            sources.append(GENERATORS[name](seed, _size(source, size)))
        elif name.startswith(REASONING_GYM):
            from rlp_jax.data.reasoning_gym import ReasoningGymSource

            sources.append(ReasoningGymSource(name.removeprefix(REASONING_GYM), seed, _size(source, size)))
        else:
            sources.extend(_open_path(Path(source), config))
    return sources


class TextSource:
    """One .txt file, one document, all of it a span.

    Raises:
      ConfigError: on reading, an empty file or bytes that are not UTF-8.
    """

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Document:
        if i != 0:
            raise IndexError(f"{self.path}: document {i} of 1")
        text = _decode(self.path.read_bytes(), self.path, 1).replace("\r\n", "\n")
        if not text.strip():
            raise ConfigError(f"{self.path} is empty: give a file with text in it, or leave it out")
        return Document(text, ((0, len(text)),), 0, f"{self.path}:1")


class JsonlSource:
    """One .jsonl file, one JSON object a line, blank lines skipped.

    Args:
      path: the file.
      text: format string over a record's fields, "{question}\\n{answer}".
      answer: likewise; what a response is checked against.
      span: likewise; the part of the text that positions of mode "span" come from, "" for all of it. Where the format
        string `span` is a part of the format string `text`, that part of every document (each time, if it is there more
        than once); else the last place where the formatted span stands in the formatted text.

    Raises:
      ConfigError: the file holds no record, or a format string is broken; on reading, a line that is not UTF-8, not a
        JSON object, lacks a field, or whose span is not in its text.
    """

    def __init__(self, path: Path, text: str = "{text}", span: str = "", answer: str = ""):
        self.path, self.text, self.span, self.answer = path, text, span, answer
        check_template("data.text", text, needs_field=True)
        check_template("data.span", span)
        check_template("data.answer", answer)
        self._before_span = _prefixes(text, span)
        # Byte offsets of the lines that hold something: random access for a few bytes a document.
        offsets, lines, offset = [], [], 0
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if raw.removeprefix(BYTE_ORDER_MARK).strip():
                    offsets.append(offset)
                    lines.append(line)
                offset += len(raw)
        if not lines:
            raise ConfigError(f"{path} holds no documents: give a file with one JSON object a line")
        self._offsets, self._lines = np.array(offsets, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: document {i} of {len(self)}")
        line = int(self._lines[i])
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[i]))
            raw = file.readline()
        place = f"{self.path}:{line}"
        record = _parse(_decode(raw, self.path, line), place)
        text = _format(self.text, record, place)
        return Document(text, self._spans(text, record, place), i, place, _format(self.answer, record, place))

    def _spans(self, text: str, record: dict, place: str) -> tuple[tuple[int, int], ...]:
        if not self.span:
            return ((0, len(text)),)
        span = _format(self.span, record, place)
        if self._before_span:
            starts = [len(_format(prefix, record, place)) for prefix in self._before_span]
        else:
            starts = [text.rfind(span)]
            if starts[0] < 0:
                raise ConfigError(f"{place}: data.span gives {span[:60]!r}, which is not in the document's text")
        return tuple((start, start + len(span)) for start in starts if span)


def read_records(path: Path) -> Iterator[tuple[dict, str]]:
    """The records of a .jsonl file, each with its place, "file:line"; blank lines are skipped.

    Raises:
      ConfigError: a line that is not UTF-8 or not a JSON object.
    """
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.removeprefix(BYTE_ORDER_MARK).strip():
                yield _parse(_decode(raw, path, line), f"{path}:{line}"), f"{path}:{line}"


class _RecordFormatter(string.Formatter):
    """str.format over a JSON record that says which field is missing, and puts no null, list or object into a text."""

    def get_field(self, field_name: str, args, kwargs: dict):
        name = re.split(r"[.\[]", field_name, maxsplit=1)[0]
        if name not in kwargs:
            raise ConfigError(f"no field {name!r}, the fields are {', '.join(map(repr, kwargs)) or 'none'}")
        try:
            value, _ = super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError, AttributeError):
            raise ConfigError(f"no {field_name!r} in field {name!r}") from None
        if not isinstance(value, str | int | float):
            kind = {dict: "an object", list: "a list", type(None): "null"}.get(type(value), "neither")
            raise ConfigError(f"field {field_name!r} is {kind}, expected text or a number")
        return value, name


def _format(template: str, record: dict, place: str) -> str:
    try:
        text = _RecordFormatter().vformat(template, (), record)
        text.encode()  # JSON can spell half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: \\u{ord(text[error.start]):04x} is half of a character: repair the text") from None
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    return text


def check_template(field: str, template: str, needs_field: bool = False) -> None:
    """Check a format string over a record's fields.

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


def _open_path(path: Path, config: DataConfig) -> list[Sequence[Document]]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".txt") and p.is_file())
        if not files:
            raise ConfigError(f"data.sources: {path} is a directory without .jsonl or .txt files")
        return [source for file in files for source in _open_path(file, config)]
    if path.suffix not in (".jsonl", ".txt"):
        kinds = f"a .jsonl or .txt file, a directory of them, or one of {', '.join(GENERATORS)}"
        raise ConfigError(f"data.sources: {str(path)!r} is none of {kinds}")
    if not path.is_file():
        raise ConfigError(f"data.sources: no file {path}")
    if path.suffix == ".txt":
        return [TextSource(path)]
    return [JsonlSource(path, config.text, config.span, config.answer)]


def _size(source: str, size: str) -> int:
    if not size:
        if source.endswith(":"):
            raise ConfigError(f"data.sources: {source!r} lacks the number of documents after the colon")
        return GENERATED_DOCUMENTS
    if not (size.isascii() and size.isdigit()) or int(size) < 1:
        raise ConfigError(f"data.sources: {source!r}: the number of documents must be a whole number above 0")
    return int(size)


def _decode(raw: bytes, path: Path, line: int) -> str:
    """UTF-8 text without a byte order mark; `line` is the line that raw starts at."""
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        byte = raw[error.start]
        raise ConfigError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8: convert the file to UTF-8") from None


def _parse(text: str, place: str) -> dict:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON: {error.msg} at column {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: cannot read this JSON: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(record).__name__}")
    return record
