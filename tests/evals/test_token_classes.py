# SPDX-License-Identifier: Apache-2.0
"""Classes of tokens by hand, under a tokenizer of bytes, one of words and one that drops a text's first space."""

import json

import pytest
import tokenizers
from tiny_run import byte_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from rlp_jax.config import ConfigError
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.evals.token_classes import CLASSES, builtin_class, classify, read_rules, surfaces


def of_vocabulary(*pieces, **kinds):
    backend = tokenizers.Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    backend.pre_tokenizer = kinds["split"]
    if "decoder" in kinds:
        backend.decoder = kinds["decoder"]
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("surface", "before", "wanted"),
    [
        ("The", "", "word start"),
        (" cat", "The", "word start"),
        ("cat", "a ", "word start"),
        ("(cat", "a", "word start"),
        ("ing", "do", "word continuation"),
        ("'s", "it", "word continuation"),
        ("s", "it'", "word continuation"),
        ("s", " '", "word start"),
        ("x", "2", "word continuation"),
        ("é", "caf", "word continuation"),
        ("本", "日", "word continuation"),
        ("ab", "_", "word start"),
        (" 12", "is", "number"),
        ("7", "6", "number"),
        ("3rd", " ", "number"),
        ("٣", "", "number"),
        (".", "end", "punctuation"),
        (" =", "e", "punctuation"),
        ("€", "", "punctuation"),
        (").\n", "x", "punctuation"),
        ("\n\n", ".", "newline"),
        (" \r\n", ".", "newline"),
        ("  ", "x", "space"),
        ("\t", "", "space"),
        ("", "x", "other"),
        ("\ufffd", "x", "other"),
    ],
)
def test_by_hand(surface, before, wanted):
    assert builtin_class(surface, before) == wanted and wanted in CLASSES


def test_surfaces_join_to_the_text():
    text = "A cat's 2 lives.\n\nOK"
    tokenizer = byte_tokenizer()
    parts = surfaces(tokenizer.encode(text), tokenizer)
    assert parts == list(text)
    start, more, space, number = "word start", "word continuation", "space", "number"
    assert classify(parts) == [
        start, space, start, more, more, "punctuation", more, space, number, space, start, more, more, more, more,
        "punctuation", "newline", "newline", start, more,
    ]  # fmt: skip
    euro = surfaces(tokenizer.encode("a€b"), tokenizer)
    assert euro[0] == "a" and euro[-1] == "b" and len(euro) == 5
    assert set(classify(euro)[1:4]) <= {"other", "punctuation"}


def test_words_and_dropped_spaces():
    words = of_vocabulary("?", "a", "flip", "=", ".", split=pre_tokenizers.WhitespaceSplit())
    parts = surfaces(words.encode("a flip = a .\n"), words)
    assert parts == ["a", " flip", " =", " a", " ."]
    assert classify(parts) == ["word start", "word start", "punctuation", "word start", "punctuation"]
    sentencepiece = of_vocabulary(
        "?", "▁a", "b", "▁9", split=pre_tokenizers.Metaspace(split=False), decoder=decoders.Metaspace()
    )
    assert sentencepiece.decode([1]) == "a"  # the first space is gone
    parts = surfaces([1, 2, 1, 3], sentencepiece)
    assert parts == ["a", "b", " a", " 9"]
    assert classify(parts) == ["word start", "word continuation", "word start", "number"]


def test_rules_come_first(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"answer": r"(?<== )\S+", "state": r"\b[ab]\b", "wide": "flip ="}))
    rules = read_rules(path)
    parts = ["a", " flip", " =", " b", " .", " a"]
    assert classify(parts, rules) == ["state", "wide", "wide", "answer", "punctuation", "state"]
    # A match of the space before a token is none of the token.
    path.write_text(json.dumps({"gap": " "}))
    assert classify(["a", " b", " "], read_rules(path)) == ["word start", "word start", "gap"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "classes.json: "),
        ("[]", "expected an object"),
        ('{"a": 1}', "expected an object"),
        ('{"a": "("}', "no regular expression"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rules(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_rules(tmp_path / "none.json")
