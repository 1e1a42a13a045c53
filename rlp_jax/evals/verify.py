# SPDX-License-Identifier: Apache-2.0
"""Judging a response: what its answer is, and whether that answer is right.

Mathematics is judged by math-verify (extra: eval), which parses both answers with sympy. What it reads wrongly is
first written in a form that it reads rightly (`normalise`); numbers are compared exactly without it. Multiple choice
is the letter and nothing else.
"""

import importlib.util
import logging
import re
import threading
from fractions import Fraction

from rlp_jax.config import ConfigError

SECONDS = 5  # for one parse or comparison by sympy
LONGEST = 400  # characters of an answer that is parsed: final answers are short, and sympy's time grows fast


def check_installed() -> None:
    """Raises ConfigError where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("answers in mathematics are judged by math-verify: pip install 'rlp_jax[eval]'")


def last_boxed(text: str) -> str | None:
    """What stands in the last whole \\boxed{} or \\fbox{} of a text, braces matched; None where there is none."""
    for found in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for at in range(found.end(), len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[found.end() : at].strip()
    return None


_MARK = re.compile(r"(?:answer\b[^.\n]{0,60}?(?:\bis\b|:|=)\s*:?|####)\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
_COUNTED = re.compile(r"(-?[$€£]?\d[\d,]*(?:\.\d+)?)\s+(?!(?:or|and|percent)\b)[A-Za-z]")  # "7 apples in 2 days"
_NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?")


def extract_math(response: str, number: bool = False) -> str | None:
    """The answer of a response, None where it gives none: the last \\boxed{}; else what follows the last "answer is",
    "Answer:" or "####", up to the end of the sentence; else, for tasks whose answers are numbers, the last number."""
    boxed = last_boxed(response)
    if boxed:
        return boxed
    for mark in reversed(list(_MARK.finditer(response))):
        sentence = _SENTENCE_END.split(response[mark.end() :].strip().strip("*"), maxsplit=1)[0]
        if answer := sentence.strip().strip("*").strip():
            counted = _COUNTED.match(answer) if number else None
            return counted.group(1) if counted else answer
    numbers = _NUMBER.findall(response) if number else []
    return numbers[-1] if numbers else None


def extract_choice(response: str, letters: str) -> str | None:
    """The letter of a response, None where it gives none: the last \\boxed{X}, "answer is (X)" or "Answer: X"; else the
    first thing the response says, where that is a letter alone ("B.", "(C) because")."""
    letter = rf"\**\s*\(?(?:\\text\{{)?\(?([{letters}])(?![A-Za-z'])"
    boxed = last_boxed(response)
    if boxed and (found := re.match(letter, boxed)):
        return found.group(1)
    marked = re.findall(rf"(?i:answer)\**\s*(?:(?i:is)|:)\s*:?\s*(?:(?i:option|choice)\s+)?\$?{letter}", response)
    if marked:
        return marked[-1]
    found = re.match(rf"\s*\**\(?([{letters}])(?:[).:,]|\s*\Z|\s*\n)", response)
    return found.group(1) if found else None


def same_answer(expected: str, given: str, tolerance: float = 0.0) -> bool:
    """Whether an answer is the expected one, in another spelling perhaps. Units are not compared.

    Args:
      tolerance: relative, of decimal numbers and of nothing else: |given - expected| <= tolerance |expected|.
    """
    if len(given) > LONGEST:
        return False
    expected, given = normalise(expected), normalise(given)
    if not given:
        return False
    if _compact(expected) == _compact(given):
        return True
    if _IN_BASE.fullmatch(expected) or _IN_BASE.fullmatch(given):
        return False  # the same number in another base is another answer
    numbers = _number(expected), _number(given)
    if None not in numbers:
        return abs(numbers[0] - numbers[1]) <= Fraction(tolerance) * abs(numbers[0])
    return not _explodes(given) and _verified(expected, given)


def _verified(expected: str, given: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs a traceback for what it cannot parse
    # Its time limit is a signal, which only the main thread gets.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None

    def parsed(text: str) -> list:
        # Of what is no LaTeX and no arithmetic either, the second would take any number that it finds.
        arithmetic = (ExprExtractionConfig(),) if re.fullmatch(r"[\d\s.,%()+*/^-]+", text) else ()
        return parse(f"${text}$", (LatexExtractionConfig(), *arithmetic), parsing_timeout=seconds)

    pair = [parsed(expected), parsed(given)]
    if re.match(r"[\[(]", expected) and re.search(r"[<>]|\\[lg]eq?(?![A-Za-z])", given):
        pair.reverse()  # math-verify compares a condition with an interval only if the condition is the expected one
    return bool(verify(*pair, timeout_seconds=seconds))


# A unit follows a value: in a font for text, or in words. A word of fewer than three letters is a unit only if it is a
# known one, as it may be a product of variables; so is any word without a space before it.
_TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
_POWER = r"(?:\s*\^\s*(?:\d|\{\d\}))?"
_TEXT_UNIT = re.compile(rf"(?<=\S)\s*{_TEXT}{_POWER}$")
_SHORT_UNIT = r"(?:mm|cm|km|mg|kg|ml|ft|in|hr|min|sec|mph|am|pm|dollars|cents)\b"
_WORD_UNIT = re.compile(
    r"(?<=[\d}])(?: (?!(?:sqrt|log|sin|cos|tan|and)\b)[A-Za-z]{3,}| [mgslJNhVWKLA]\b| ?"
    rf"{_SHORT_UNIT})(?:[ /]+[A-Za-z]+)*{_POWER}$"
)
_SPELLINGS = (
    (r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])", ""),
    (r"(?<=\d)\\[!,;:] ?(?=\d{3}(?!\d))|\\!", ""),
    (r"\\[,;: ]|~|\\(?:quad|qquad)(?![A-Za-z])", " "),
    (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
    (r"\\\$|[$€£]", ""),
    (r"\{,\}", ","),
    ("[−–]", "-"),
    ("[×]", r"\\times "),
    ("[·]", r"\\cdot "),
    ("π", r"\\pi "),
    ("∞", r"\\infty "),
    ("∪", r"\\cup "),
    ("≤", r"\\le "),
    ("≥", r"\\ge "),
    ("°", r"^\\circ"),
    (r"√\s*(\d+|\{[^{}]*\}|\([^()]*\))", r"\\sqrt{\1}"),
    (r"(?<!\\)sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\})", r"\\sqrt{\1\2}"),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"\\%", "%"),
    (r"\s+", " "),
)


def normalise(answer: str) -> str:
    """One spelling of what is written in many: sizes of brackets, spaces, fonts, currency signs, symbols, thousands
    separators; and without the unit of a value."""
    for mark in (r"\(", r"\)", r"\[", r"\]"):
        answer = answer.replace(mark, "")
    for pattern, replacement in _SPELLINGS:
        answer = re.sub(pattern, replacement, answer)
    answer = answer.strip().strip("*").rstrip(".").strip()
    answer = _TEXT_UNIT.sub("", answer)
    answer = " ".join(re.sub(_TEXT, r" \1 ", answer).split())
    answer = _WORD_UNIT.sub("", answer)
    answer = re.sub(r"^([+-]?)(\d+) (\d+)/(\d+)$", r"\1(\2+\\frac{\3}{\4})", answer)  # a mixed number
    if r"\begin" in answer:  # math-verify loses quotients that are written so in a matrix
        answer = re.sub(r"(?<![\w}])(\d+)/(\d+)", r"\\frac{\1}{\2}", answer)
    if re.search(r"[()\[\]{}]|,\s", answer):  # commas between the parts of something
        return answer
    return re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda found: found.group().replace(",", ""), answer)


def _compact(answer: str) -> str:
    """Without the spaces that say nothing and the braces of a subscript; words in lower case."""
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"_\{(\w+)\}", r"_\1", answer))
    answer = re.sub(r"^\((.)\)$", r"\1", answer)
    return answer.lower() if re.fullmatch(r"[A-Za-z,.'-]{2,}\d*", answer) else answer


_IN_BASE = re.compile(r"[0-9A-F]+_(?:\d+|\{\d+\})")
_MANTISSA = r"([+-]?(?:\d+\.?\d*|\.\d+))"
_DECIMAL = re.compile(_MANTISSA + r"(?:[eE]([+-]?\d{1,3}))?")
_POWER_OF_TEN = re.compile(rf"(?:{_MANTISSA}\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*\{{?\s*([+-]?\d{{1,3}})\s*\}}?")


def _number(answer: str) -> Fraction | None:
    """The value of a decimal number, in scientific notation perhaps."""
    found = _DECIMAL.fullmatch(answer) or _POWER_OF_TEN.fullmatch(answer)
    if found is None:
        return None
    return Fraction(found.group(1) or 1) * Fraction(10) ** int(found.group(2) or 0)


_TOO_LARGE = (
    r"\^\s*\{?[^{}^]*\^|\*\*[^*]*\*\*",  # a power of a power
    r"(?:\^|\*\*)\s*\{?\s*\(?[+-]?\d{5,}",
    r"\d{4,}\s*!|[)}!]\s*!",
    r"binom.*\d{5,}",
)


def _explodes(answer: str) -> bool:
    """Whether sympy might compute a number too large for memory: no time limit stops that, it is one instruction."""
    return any(re.search(pattern, answer) for pattern in _TOO_LARGE)
