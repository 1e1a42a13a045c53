# SPDX-License-Identifier: Apache-2.0
"""The judge on pairs written by hand (answers.jsonl), and on responses whose answer is known."""

import json
from pathlib import Path

import pytest

from rlp_jax.evals.verify import extract_choice, extract_math, last_boxed, same_answer

pytest.importorskip("math_verify", reason="pip install 'rlp_jax[eval]'")

PAIRS = [
    json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]
KNOWN = [pair for pair in PAIRS if "disagrees" in pair]
KINDS = sorted({pair["kind"] for pair in PAIRS})


def test_there_are_enough_pairs_of_both_kinds():
    assert len(PAIRS) >= 200 and len({(pair["expected"], pair["given"]) for pair in PAIRS}) == len(PAIRS)
    assert sum(not pair["same"] for pair in PAIRS) >= 60
    assert len(KNOWN) <= len(PAIRS) // 20 and all(pair["disagrees"] for pair in KNOWN)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs(kind):
    wrong = [
        (pair["expected"], pair["given"], pair["same"])
        for pair in PAIRS
        if pair["kind"] == kind and "disagrees" not in pair
        if same_answer(pair["expected"], pair["given"]) != pair["same"]
    ]
    assert wrong == []


def test_known_disagreements_are_still_there():
    """One that is gone is no longer known: its reason goes from the file."""
    assert [pair for pair in KNOWN if same_answer(pair["expected"], pair["given"]) == pair["same"]] == []


def test_the_expected_answer_is_always_right():
    assert [pair["expected"] for pair in PAIRS if not same_answer(pair["expected"], pair["expected"])] == []


def test_tolerance_is_for_decimals_alone():
    assert same_answer("1.60", "1.61", 0.01) and not same_answer("1.60", "1.62", 0.01)
    assert same_answer("4.5e33", "4.48 \\times 10^{33}", 0.01) and not same_answer("4.5e33", "4.4e33", 0.01)
    assert not same_answer("\\sqrt{2}", "\\sqrt{2.001}", 0.01)
    assert not same_answer("1.60", "1.61")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so \\boxed{5}.", "5"),
        ("\\boxed{1} and then \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\boxed{1} but \\boxed{2", "1"),
        ("\\fbox{7}", "7"),
        ("\\boxed{\\left\\{ x \\mid x > 0 \\right\\}}", "\\left\\{ x \\mid x > 0 \\right\\}"),
        ("nothing", None),
        ("\\boxed{}", ""),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("response", "number", "answer"),
    [
        (" He has 3 + 4 = 7 apples. The answer is 7.", True, "7"),
        (" The answer is $1,234.50. So 5", True, "$1,234.50"),
        ("\nFinal Answer: The final answer is $\\frac{1}{2}$. ", False, "$\\frac{1}{2}$"),
        ("Answer: 12\nBecause of 3.", True, "12"),
        ("**Answer:** 12", True, "12"),
        ("The answer is 3. No, wait, the answer is 4.", True, "4"),
        ("the answer is 3, in a box \\boxed{4}", True, "4"),
        ("3 + 4 = <<3+4=7>>7\n#### 7", True, "7"),
        ("It makes 3 apples and 17 pears", True, "17"),
        ("It makes 1,250.", True, "1,250"),
        ("The answer is 7 apples in 2 days.", True, "7"),
        ("The answer is 7 apples in 2 days.", False, "7 apples in 2 days"),
        ("The answer is 3 or 4.", True, "3 or 4"),
        ("The answer to the question is 5.", False, "5"),
        ("It makes 3 apples", False, None),
        ("no idea", True, None),
        ("The answer is", True, None),
        ("", True, None),
    ],
)
def test_answers_in_responses(response, number, answer):
    assert extract_math(response, number) == answer


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (" Acids donate protons. The answer is (C).", "C"),
        ("the answer is B", "B"),
        ("The answer is (A). No: the answer is (D).", "D"),
        ("So it is heat.\nAnswer: B", "B"),
        ("**Answer: C**", "C"),
        ("**Answer:** (C)", "C"),
        ("the correct answer is option D.", "D"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{(A)}}", "A"),
        ("B. Momentum", "B"),
        ("(C) because", "C"),
        ("(C), because", "C"),
        ("D", "D"),
        ("the answer is Acid", None),
        ("The answer is E.", None),
        ("A force is a push", None),
        ("I think so", None),
        ("Answer: A car", "A"),
        ("", None),
    ],
)
def test_letters_in_responses(response, letter):
    assert extract_choice(response, "ABCD") == letter
