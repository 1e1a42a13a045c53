# SPDX-License-Identifier: Apache-2.0
"""Records of every benchmark become problems, problems prompts; and what cannot be read is named."""

import json

import pytest

from rlp_jax.config import ConfigError
from rlp_jax.evals.exemplars import CHOICES
from rlp_jax.evals.problems import read_problems
from rlp_jax.evals.tasks import EXEMPLARS, LETTERS, TASKS, prompt, read_problem
from rlp_jax.evals.verify import extract_choice, extract_math, last_boxed

FOUR = ["amnion", "chorion", "allantois", "yolk sac"]
CHAT = "<｜begin▁of▁sentence｜>Please reason.<｜User｜>What is $1+1$?<｜Assistant｜>"


def read(name, record):
    return read_problem(TASKS[name], record, 3, "file:4")


@pytest.mark.parametrize(
    ("task", "record", "question", "answer"),
    [
        ("gsm8k", {"question": "How many?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}, "How many?", "18"),
        ("gsm8k", {"question": "How many?", "answer": "#### 1,200"}, "How many?", "1,200"),
        (
            "math500",
            {"idx": 0, "prompt": CHAT, "reference_solution": "It is \\boxed{3}.\n#### 2"},
            "What is $1+1$?",
            "2",
        ),
        ("math500", {"problem": "Q?", "solution": "so \\boxed{1}", "answer": "\\frac{1}{2}"}, "Q?", "\\frac{1}{2}"),
        ("minerva", {"problem": "Q?", "solution": "then $\\boxed{4.5e33} \\mathrm{ergs}$", "idx": 1}, "Q?", "4.5e33"),
        ("amc23", {"id": 0, "problem": "Q?", "question": "Q?", "answer": 27.0, "url": "u"}, "Q?", "27"),
        ("amc23", {"question": "Q?", "answer": -1.0}, "Q?", "-1"),
        ("aime25", {"problem": "Q?", "expected_answer": "70", "reference_solution": "\\boxed{71}"}, "Q?", "70"),
    ],
)
def test_mathematics(task, record, question, answer):
    problem = read(task, record)
    assert (problem.id, problem.question, problem.answer, problem.choices) == (3, question, answer, ())


@pytest.mark.parametrize(
    ("task", "record", "choices", "answer"),
    [
        ("mmlu", {"question": "Q?", "type": "biology", "choices": FOUR, "answer": 2}, FOUR, "C"),
        ("mmlu", {"question": "Q?", "subject": "biology", "choices": FOUR, "answer": "2"}, FOUR, "C"),
        ("mmlu_pro", {"question": "Q?", "options": FOUR, "answer": "D", "answer_index": 3}, FOUR, "D"),
        ("mmlu_pro", {"question": "Q?", "options": ["a", "N/A", "b"], "answer": "C"}, ["a", "b"], "B"),
        ("gpqa_diamond", {"question": "Q?", "choices": FOUR, "answer": "yolk sac"}, FOUR, "D"),
    ],
)
def test_choices(task, record, choices, answer):
    problem = read(task, record)
    assert (list(problem.choices), problem.answer) == (choices, answer)


def test_answers_that_stand_apart_are_shuffled_by_the_question():
    """GPQA: always the same order, and every letter is right equally often."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    counts = dict.fromkeys("ABCD", 0)
    for n in range(400):
        record = {"Question": f"Question {n}?", **dict(zip(names, FOUR, strict=True)), "Subdomain": "biology"}
        problem = read("gpqa_diamond", record)
        assert problem == read("gpqa_diamond", record) and sorted(problem.choices) == sorted(FOUR)
        assert problem.choices[LETTERS.index(problem.answer)] == "amnion"
        counts[problem.answer] += 1
    assert min(counts.values()) > 70  # 100 of 400 expected, standard deviation 8.7


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("gsm8k", {"text": "Q"}, "file:4: no question for gsm8k: expected a field 'problem' or 'question'"),
        ("gsm8k", {"question": "Q"}, "file:4: no answer for gsm8k"),
        ("gsm8k", {"question": " ", "answer": "1"}, "must be a text"),
        ("gsm8k", {"question": "Q", "answer": ["1"]}, "the answer is ['1'], expected a text or a number"),
        ("gsm8k", {"question": "Q", "answer": "####"}, "the answer is empty"),
        ("minerva", {"problem": "Q", "solution": "\\boxed{1"}, "is not closed"),
        ("mmlu", {"question": "Q", "answer": 1}, "no choices for mmlu: expected a field 'choices' or 'options'"),
        ("mmlu", {"question": "Q", "choices": FOUR, "answer": 4}, "the answer 4 is no letter, number or text of the 4"),
        ("mmlu", {"question": "Q", "choices": FOUR, "answer": True}, "the answer True is no letter"),
        ("mmlu", {"question": "Q", "choices": ["a"], "answer": 0}, "a list of 2 to 26"),
        ("mmlu", {"question": "Q", "choices": "abcd", "answer": 0}, "a list of 2 to 26"),
    ],
)
def test_records_that_cannot_be_used(task, record, message):
    with pytest.raises(ConfigError) as error:
        read(task, record)
    assert message in str(error.value)


@pytest.mark.parametrize("name", TASKS)
def test_prompts(name):
    task = TASKS[name]
    record = {"question": "What is {x}?", "answer": "1"} | ({"choices": FOUR} if task.is_choice else {})
    problem = read(name, record)
    for shots in (None, *range(len(EXEMPLARS[task.form]) + 1)):
        text, stop = prompt(task, problem, shots)
        assert "What is {x}?" in text and text == text.rstrip()  # a space at the end would be a token of its own
        number = task.shots if shots is None else shots
        assert sum(example.question in text for example in EXEMPLARS[task.form]) == number
        assert all(choice in text for choice in problem.choices)
        # A model that goes on with another question is stopped before it.
        again = text[text.index("What is {x}?") - 12 :]
        assert not number or any(string in again for string in stop)
    with pytest.raises(ConfigError, match="--shots is 9"):
        prompt(task, problem, 9)


def test_the_form_by_hand():
    choice = read("mmlu_pro", {"question": "Q?", "options": ["a", "b"], "answer": "A"})
    asked = "Question:\nQ?\nOptions:\nA. a\nB. b\nAnswer: Let's think step by step."
    text = prompt(TASKS["mmlu_pro"], choice, 1)[0]
    assert text.endswith("The answer is (B).\n\n" + asked) and text.startswith("The following are multiple choice")
    problem = read("gsm8k", {"question": "Q?", "answer": "1"})
    assert prompt(TASKS["gsm8k"], problem, 1)[0].endswith(" The answer is 19.\n\nQ: Q?\nA:")
    assert prompt(TASKS["gsm8k"], problem, 0) == (
        "Question: Q?\nPlease reason step by step, and put your final answer within \\boxed{}.\nAnswer:",
        ("\nQuestion:",),
    )
    problem = read("math500", {"problem": "Q?", "answer": "1"})
    text = prompt(TASKS["math500"], problem, 1)[0]
    assert text.endswith("The final answer is $(3,5)$. I hope it is correct.\n\nProblem:\nQ?\n\nSolution:")


@pytest.mark.parametrize("name", TASKS)
def test_the_answers_of_worked_examples_are_found(name):
    """What the few-shot form teaches is what the extraction looks for."""
    task = TASKS[name]
    for example in EXEMPLARS[task.form]:
        if task.is_choice:
            assert extract_choice(f"{example.solution} The answer is ({example.answer}).", "ABCD") == example.answer
        elif task.form == "word problem":
            assert extract_math(f" {example.solution} The answer is {example.answer}.", True) == example.answer
        else:
            response = f"\n{example.solution}\nFinal Answer: The final answer is ${example.answer}$. "
            assert extract_math(response) == f"${example.answer}$"
    assert all(example.answer in LETTERS[: len(example.choices)] for example in CHOICES)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sources(tmp_path):
    rows = [{"question": f"Q{n}", "answer": str(n)} for n in range(5)]
    file = write(tmp_path / "gsm8k_test.jsonl", rows)
    write(tmp_path / "mmlu_pro.jsonl", [])
    task = TASKS["gsm8k"]
    assert [problem.answer for problem in read_problems(task, str(file))] == list("01234")
    assert read_problems(task, str(tmp_path), 2) == read_problems(task, str(file))[:2]
    for data, message in [
        (tmp_path / "none.jsonl", "no file or directory"),
        (write(tmp_path / "rows.csv", rows), "is no .jsonl file"),
        (write(tmp_path / "empty.jsonl", []), "holds no problem for gsm8k"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_problems(task, str(data))
    with pytest.raises(ConfigError, match=r"should hold one .jsonl file for aime25.*found none"):
        read_problems(TASKS["aime25"], str(tmp_path))
    write(tmp_path / "gsm8k_train.jsonl", rows)
    with pytest.raises(ConfigError, match=r"found gsm8k_test.jsonl, gsm8k_train.jsonl"):
        read_problems(task, str(tmp_path))
    (tmp_path / "broken.jsonl").write_text('{"question": "Q"\n')
    with pytest.raises(ConfigError, match=r"broken.jsonl:1: not JSON"):
        read_problems(task, str(tmp_path / "broken.jsonl"))


def test_boxed_solutions_are_read_to_the_last_box():
    assert last_boxed("\\boxed{1} = \\boxed{2}") == "2"
