# SPDX-License-Identifier: Apache-2.0
"""Answers in text: brackets, spaces, thoughts that are not over, and where a response may be cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlp_jax.baselines.answers import first_answer, last_answer, whole_answers
from rlp_jax.config import GRPOConfig

BOXED = GRPOConfig()
ANYWHERE = GRPOConfig(answer_after="")
WORDS = GRPOConfig(answer_open="", answer_close=" .")


@pytest.mark.parametrize(
    ("text", "fields", "answer"),
    [
        (r"so</think> \boxed{ dog}", BOXED, " dog"),
        (r"so</think> \boxed{dog } is it", BOXED, "dog "),
        (r"</think>\boxed{\frac{1}{2^{n}}}", BOXED, r"\frac{1}{2^{n}}"),
        (r"</think>\boxed{a} no, \boxed{b}", BOXED, "b"),
        (r"</think>\boxed{a} no, \boxed{b", BOXED, None),
        (r"</think>\boxed{\frac{1}{2}", BOXED, None),
        (r"</think>\boxed{}", BOXED, ""),
        (r"</think>boxed{a}", BOXED, None),
        (r"\boxed{thought}</think> nothing", BOXED, None),
        (r"\boxed{thought}</think> \boxed{b}", BOXED, "b"),
        (r"\boxed{never closed", BOXED, None),
        (r"\boxed{a} no closing tag", BOXED, None),
        (r"\boxed{a} no closing tag", ANYWHERE, "a"),
        ("", ANYWHERE, None),
        ("c flip b </think> b .", WORDS, " b"),
        ("c flip b </think> b . d swap = . .", WORDS, " b"),
        ("c flip b </think> b", WORDS, None),
        ("c flip b .", WORDS, None),
        ("</think>(f(x)) and more)", GRPOConfig(answer_open="(", answer_close=")"), "f(x)"),
    ],
)
def test_the_last_answer(text, fields, answer):
    assert last_answer(text, fields) == answer


def letters(ids):
    return "".join(map(chr, ids))


def test_a_response_is_cut_where_its_first_answer_closes():
    text = r"\boxed{t}</think> \boxed{{a}}, or \boxed{b}"
    assert first_answer([ord(x) for x in text], letters, BOXED) == ("{a}", text.index(","))
    assert first_answer([ord(x) for x in text[:-30]], letters, BOXED) is None
    assert first_answer([], letters, BOXED) is None


def test_the_token_that_closes_may_hold_more():
    pieces = ["</think>", r"\boxed", "{", " dog", "}.\n", "}"]
    assert first_answer(range(6), lambda ids: "".join(pieces[i] for i in ids), BOXED) == (" dog", 5)


@given(st.lists(st.sampled_from(["<think>", "</think>", r"\boxed{", "{", "}", "a"]), max_size=12))
@settings(deadline=None)
def test_what_is_cut_off_changes_nothing_before_it(pieces):
    tokens = list(range(len(pieces)))

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    closed = [bool(whole_answers(decode(tokens[:n]), BOXED)[0]) for n in range(len(tokens) + 1)]
    assert closed == sorted(closed)
    found = first_answer(tokens, decode, BOXED)
    assert (found is None) == (not closed[-1])
    if found:
        assert found[1] == closed.index(True)
        assert last_answer(decode(tokens[: found[1]]), BOXED) == found[0]
