# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: where a problem's parts stand in a record, and the prompt that asks it.

With worked examples before the question (`shots`), prompts have the forms that lm-eval and the papers use for base
models: GSM8K "Q: ... A: ... The answer is 5.", the other mathematics Minerva's "Final Answer: The final answer is ...",
multiple choice MMLU-Pro's "the answer is (X)". Without any they are the instructions that post-trained models are asked
with: \\boxed{} and "Answer: X". The worked examples are our own (exemplars.py), so figures stand beside published ones
without being comparable to the last digit.
"""

import dataclasses
import re
import string
from typing import Any, Literal, NamedTuple

from rlp_jax.config import ConfigError
from rlp_jax.data.documents import stable_hash
from rlp_jax.evals.exemplars import CHOICES, MATHEMATICS, WORD_PROBLEMS, Exemplar
from rlp_jax.evals.verify import last_boxed

LETTERS = string.ascii_uppercase


class Form(NamedTuple):
    """A prompt: `header`, then for each worked example `question` + `answer`, then `question` alone. A response ends
    where one of `stop` begins."""

    header: str
    question: str
    answer: str
    stop: tuple[str, ...]


FEW_SHOT = {
    "word problem": Form("", "Q: {question}\nA:", " {solution} The answer is {answer}.\n\n", ("\nQ:",)),
    "mathematics": Form(
        "",
        "Problem:\n{question}\n\nSolution:",
        "\n{solution}\nFinal Answer: The final answer is ${answer}$. I hope it is correct.\n\n",
        ("I hope it is correct", "\nProblem:"),
    ),
    "choice": Form(
        "The following are multiple choice questions (with answers). Think step by step and then finish your answer "
        'with "the answer is (X)" where X is the correct letter choice.\n\n',
        "Question:\n{question}\nOptions:\n{options}\nAnswer: Let's think step by step.",
        " {solution} The answer is ({answer}).\n\n",
        ("\nQuestion:",),
    ),
}
_BOXED = "Question: {question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\nAnswer:"
ZERO_SHOT = {
    "word problem": Form("", _BOXED, "", ("\nQuestion:",)),
    "mathematics": Form("", _BOXED, "", ("\nQuestion:",)),
    "choice": Form(
        "",
        "Question:\n{question}\nOptions:\n{options}\nThink step by step. The last line of your response should be "
        '"Answer: X", where X is the letter of the correct option.\nResponse:',
        "",
        ("\nQuestion:",),
    ),
}
EXEMPLARS = {"word problem": WORD_PROBLEMS, "mathematics": MATHEMATICS, "choice": CHOICES}

_QUESTION = ("problem", "question", "Question", "prompt")
_ANSWER = ("expected_answer", "answer", "reference_solution", "solution")
_SUBJECT = ("subject", "category", "type", "Subdomain", "source")


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      average: which of the paper's averages it belongs to.
      form: of its prompts.
      shots: worked examples before a question, where the user does not say.
      hub: Hugging Face dataset, its configuration and split.
      files: how the names of its files begin, for a directory of data.
      question, answer, choices, subject: spellings of the record's fields, the first that is there counts.
      number: the answer is a number, so that the last number of a response without a marked answer is taken for it.
      tolerance: of answers that are decimal numbers, relative.
    """

    name: str
    average: Literal["math", "science"]
    form: Literal["word problem", "mathematics", "choice"]
    shots: int
    hub: tuple[str, str | None, str]
    files: tuple[str, ...]
    question: tuple[str, ...] = _QUESTION
    answer: tuple[str, ...] = _ANSWER
    choices: tuple[str, ...] = ()
    subject: tuple[str, ...] = _SUBJECT
    number: bool = False
    tolerance: float = 0.0

    @property
    def is_choice(self) -> bool:
        return self.form == "choice"


_OPTIONS = {"choices": ("choices", "options"), "answer": ("answer", "answer_index", "label")}
TASKS = {
    task.name: task
    for task in (
        Task("gsm8k", "math", "word problem", 8, ("openai/gsm8k", "main", "test"), ("gsm8k",), number=True),
        Task("math500", "math", "mathematics", 4, ("HuggingFaceH4/MATH-500", None, "test"), ("math500", "math_500")),
        # The measurements among its answers are right within 1%, as in Minerva's own evaluation.
        Task("minerva", "math", "mathematics", 4, ("math-ai/minervamath", None, "test"), ("minerva",), tolerance=0.01),
        Task("amc23", "math", "mathematics", 4, ("math-ai/amc23", None, "test"), ("amc23",), number=True),
        Task("aime25", "math", "mathematics", 4, ("math-ai/aime25", None, "test"), ("aime25",), number=True),
        Task("mmlu", "science", "choice", 5, ("cais/mmlu", "all", "test"),
             ("mmlu_stem", "mmlu_test", "mmlu."), **_OPTIONS),
        Task("mmlu_pro", "science", "choice", 5, ("TIGER-Lab/MMLU-Pro", None, "test"), ("mmlu_pro",), **_OPTIONS),
        Task("gpqa_diamond", "science", "choice", 5, ("Idavidrein/gpqa", "gpqa_diamond", "train"), ("gpqa",),
             choices=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "choices", "options"),
             answer=("Correct Answer", "answer", "answer_index")),
    )
}  # fmt: skip


class Problem(NamedTuple):
    """One question of a benchmark.

    id: its number in the source. answer: a text, for multiple choice a letter. choices: their texts.
    """

    id: int
    question: str
    answer: str
    choices: tuple[str, ...]
    subject: str


def read_problem(task: Task, record: dict[str, Any], number: int, place: str) -> Problem:
    """A problem from a record.

    Args:
      number: of the record in its source.
      place: "file:line", for messages.

    Raises:
      ConfigError: a field that is missing or unusable; the message names place and field.
    """
    question = _field(task, record, "question", place)
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{place}: the question of a {task.name} record must be a text, found {question!r}")
    subject = next((str(record[name]) for name in task.subject if record.get(name) is not None), "")
    answer = _field(task, record, "answer", place)
    question = _without_chat(question).strip()
    if not task.is_choice:
        return Problem(number, question, _gold(answer, place), (), subject)
    choices, answer = _options(task, record, answer, question, place)
    return Problem(number, question, answer, choices, subject)


def prompt(task: Task, problem: Problem, shots: int | None = None) -> tuple[str, tuple[str, ...]]:
    """The text that asks a problem, and the strings that end a response.

    Args:
      shots: worked examples before it, at most `len(EXEMPLARS[task.form])`; None: as usual for the task.

    Raises:
      ConfigError: more worked examples than there are.
    """
    shots, exemplars = task.shots if shots is None else shots, EXEMPLARS[task.form]
    if not 0 <= shots <= len(exemplars):
        raise ConfigError(f"--shots is {shots}: {task.name} has 0 to {len(exemplars)} worked examples")
    form = (FEW_SHOT if shots else ZERO_SHOT)[task.form]
    text = form.header
    for example in exemplars[:shots]:
        text += _ask(form, example)
        text += form.answer.format(solution=example.solution, answer=example.answer)
    return text + _ask(form, problem), form.stop


def _ask(form: Form, item: Problem | Exemplar) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return form.question.format(question=item.question, options=options)


def _field(task: Task, record: dict, part: str, place: str) -> Any:
    names = getattr(task, part)
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ConfigError(
        f"{place}: no {part} for {task.name}: expected a field {' or '.join(map(repr, names))}, "
        f"found {', '.join(map(repr, record)) or 'none'}"
    )


def _without_chat(question: str) -> str:
    """The user's turn of a prompt that is wrapped in DeepSeek's chat markers, else the text as it is."""
    turn = re.search(r"<｜User｜>(.*?)(?:<｜Assistant｜>|\Z)", question, re.DOTALL)
    return turn.group(1) if turn else question


def _gold(answer: Any, place: str) -> str:
    """The final answer alone: of a worked solution what stands after its last "####", else in its last \\boxed{}."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ConfigError(f"{place}: the answer is {answer!r}, expected a text or a number")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer)
    if "####" in text:
        text = text.rpartition("####")[2]
    elif "\\boxed" in text or "\\fbox" in text:
        boxed = last_boxed(text)
        if boxed is None:
            raise ConfigError(f"{place}: the solution's last \\boxed{{}} is not closed")
        text = boxed
    if not text.strip():
        raise ConfigError(f"{place}: the answer is empty")
    return text.strip()


def _options(task: Task, record: dict, answer: Any, question: str, place: str) -> tuple[tuple[str, ...], str]:
    """The choices in the order they are shown, and the letter of the right one.

    Where a record names the right and the wrong answers apart (GPQA), the order is a shuffle by the question's hash:
    the same in every run, and no letter is right more often.
    """
    if "Correct Answer" in task.answer and "Correct Answer" in record:
        wrong = [str(record[name]).strip() for name in task.choices if name.startswith("Inc") and record.get(name)]
        options = [(str(answer).strip(), True), *((text, False) for text in wrong)]
        options.sort(key=lambda option: stable_hash("choices", f"{question}\n{option[0]}"))
        right = [correct for _, correct in options].index(True)
        return tuple(text for text, _ in options), LETTERS[right]
    choices = _field(task, record, "choices", place)
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ConfigError(f"{place}: the choices must be a list of 2 to {len(LETTERS)}, found {choices!r:.80}")
    texts = [str(choice).strip() for choice in choices]
    right = _index(answer, texts)
    if right is None:
        raise ConfigError(f"{place}: the answer {answer!r} is no letter, number or text of the {len(texts)} choices")
    # MMLU-Pro fills its lists up with "N/A".
    kept = [i for i, text in enumerate(texts) if text != "N/A" or i == right]
    return tuple(texts[i] for i in kept), LETTERS[kept.index(right)]


def _index(answer: Any, texts: list[str]) -> int | None:
    """Which choice an answer means: its number from 0, its letter, or its text."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, str):
        answer = answer.strip()
        if len(answer) == 1 and answer in LETTERS[: len(texts)]:
            return LETTERS.index(answer)
        if answer in texts:
            return texts.index(answer)
        answer = int(answer) if answer.isascii() and answer.isdigit() else None
    return answer if isinstance(answer, int) and 0 <= answer < len(texts) else None
