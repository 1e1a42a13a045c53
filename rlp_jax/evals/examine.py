# SPDX-License-Identifier: Apache-2.0
"""A model sits a benchmark: every problem asked, every response judged and recorded.

A model may think first (`think`): the thought's instruction stands before the prompt, its opening tag after it, and the
response follows the closing tag, as in training. Without, which is the default, a model is asked as any base model is
and reasons in its response: base model, continued pretraining and RLP then answer the same prompt, which the paper's
tables need. The paper does not say how its prompts are worded.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rlp_jax.config import ConfigError, MeshConfig, SuiteConfig
from rlp_jax.data.documents import stable_hash
from rlp_jax.data.template import TemplateTokens
from rlp_jax.evals import verify
from rlp_jax.evals.generation import GREEDY, Decoder, Sampled, common, decode, finish, stop_table
from rlp_jax.evals.records import Record, Records
from rlp_jax.evals.tasks import LETTERS, Problem, Task, prompt
from rlp_jax.models.transformer import LanguageModel, Params


class Examinee(NamedTuple):
    """A model with what it takes to ask it. weights: a fingerprint of the parameters. mesh: see `Decoder`."""

    model: LanguageModel
    params: Params
    tokenizer: Any
    template: TemplateTokens
    weights: str
    mesh: MeshConfig = MeshConfig()


def fingerprint(params: Params) -> str:
    """Of the parameters, from the first values of every leaf: what one optimizer step changes."""
    leaves = jax.tree.leaves(params)
    first = [np.asarray(leaf[(0,) * (leaf.ndim - 1)][:256], np.float32).tobytes().hex() for leaf in leaves]
    return f"{stable_hash('weights', ' '.join(first)):016x}"


def run_task(
    examinee: Examinee,
    task: Task,
    problems: Sequence[Problem],
    settings: SuiteConfig,
    path: Path,
    say: Callable[[str], None],
) -> list[Record]:
    """Asks every problem that has no record in the file yet, and returns the records of all, in order.

    Args:
      path: of the records; each is written with its batch.
      say: told how far it is.

    Raises:
      ConfigError: a prompt that leaves no room for its response, or a file of other problems or settings.
    """
    if not task.is_choice:
        verify.check_installed()
    asked = [Asked(examinee, task, problem, settings) for problem in problems]
    for one in asked:
        one.check_room(examinee, settings, task)
    with Records(path, deciding(examinee, task, settings), say) as records:
        done = {row["id"]: row for row in records.rows}
        for one in asked:
            if one.problem.id in done and done[one.problem.id].get("prompt") != one.identity:
                raise ConfigError(f"{path}: problem {one.problem.id} is another one there: choose another --out")
        left = sorted((one for one in asked if one.problem.id not in done), key=lambda one: len(one.tokens))
        if left:
            # Of all problems, answered or not: what a killed evaluation still asks is read as it would have been.
            ask = Asker(examinee, task, settings, common([one.tokens for one in asked]))
            at_once = max(1, settings.batch // max(1, settings.samples))
            for start in range(0, len(left), at_once):
                records.add(ask(left[start : start + at_once]))
                say(f"{task.name}: {len(records.rows)} of {max(len(asked), len(done))}")
        done = {row["id"]: row for row in records.rows}
    return [done[problem.id] for problem in problems]


def deciding(examinee: Examinee, task: Task, settings: SuiteConfig) -> Record:
    """What decides the records of a task."""
    decided = {
        "task": task.name,
        "weights": examinee.weights,
        "shots": task.shots if settings.shots is None else settings.shots,
        "max_tokens": settings.max_tokens,
        "samples": settings.samples,
    }
    if settings.samples:
        decided |= {"temperature": settings.temperature, "seed": settings.seed}
    if settings.think:
        decided |= {"thought_tokens": settings.thought_tokens, "template": [list(part) for part in examinee.template]}
    return decided


class Asked:
    """A problem with its prompt: `tokens` as the model reads them, `identity` a hash of the text."""

    def __init__(self, examinee: Examinee, task: Task, problem: Problem, settings: SuiteConfig):
        text, self.stop = prompt(task, problem, settings.shots)
        template = examinee.template
        before = template.context if settings.think else template.plain
        after = template.open if settings.think else ()
        self.problem, self.identity = problem, f"{stable_hash('prompt', text):016x}"
        self.tokens = [*before, *examinee.tokenizer.encode(text), *after]

    def check_room(self, examinee: Examinee, settings: SuiteConfig, task: Task) -> None:
        """Raises ConfigError where prompt and response do not fit into the model's context."""
        parts = {"prompt": len(self.tokens), "response": settings.max_tokens}
        if settings.think:
            parts |= {"thought": settings.thought_tokens, "closing tag": len(examinee.template.close)}
        if sum(parts.values()) > examinee.model.config.max_positions:
            listed = " + ".join(f"{name} {count}" for name, count in parts.items())
            raise ConfigError(
                f"{task.name}: problem {self.problem.id} needs {listed} tokens, the model's context holds "
                f"{examinee.model.config.max_positions}: lower --shots or --max-tokens"
            )


class Asker:
    """Asks problems and judges the responses; programs are compiled once."""

    def __init__(self, examinee: Examinee, task: Task, settings: SuiteConfig, shared: int):
        self._examinee, self._task, self._settings, self._shared = examinee, task, settings, shared
        self._stop = prompt(task, Problem(0, "", "", (), ""), settings.shots)[1]
        self._ends_SV = stop_table(examinee.tokenizer, examinee.model.config.vocab_size, self._stop)

    def __call__(self, asked: Sequence[Asked]) -> list[Record]:
        greedy = self._responses(asked, 1, GREEDY)
        sampled = [[] for _ in asked]
        if self._settings.samples:
            sampled = self._responses(asked, self._settings.samples, self._settings.temperature)
        return [
            {
                "id": one.problem.id,
                "subject": one.problem.subject,
                "prompt": one.identity,
                "question": one.problem.question,
                "answer": one.problem.answer,
                "greedy": best[0],
                "samples": others,
            }
            for one, best, others in zip(asked, greedy, sampled, strict=True)
        ]

    def _responses(self, asked: Sequence[Asked], samples: int, temperature: float) -> list[list[Record]]:
        examinee, settings = self._examinee, self._settings
        keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), int(temperature > GREEDY)))
        ids = [int(one.identity, 16) >> 33 for one in asked]
        prompts = [one.tokens for one in asked]
        rows = max(1, settings.batch // max(1, settings.samples))
        decoder = Decoder(
            examinee.model, examinee.params, settings.max_tokens, temperature, self._ends_SV, rows=rows,
            mesh=examinee.mesh, shared=self._shared,
        )  # fmt: skip
        if not settings.think:
            responses = decode(decoder, prompts, ids, samples, keys[0])
            return [
                [self._judged(one, response, None) for response in of_one]
                for one, of_one in zip(asked, responses, strict=True)
            ]
        close = examinee.template.close
        thinker = decoder._replace(max_tokens=settings.thought_tokens, ends_SV=None, close=close)
        thoughts = decode(thinker, prompts, ids, samples, keys[0])
        flat = [
            (one, thought, identity, g)
            for one, identity, of_one in zip(asked, ids, thoughts, strict=True)
            for g, thought in enumerate(of_one)
        ]
        # Every thought makes a prompt of its own, so samples are rows here; a number of its own each, or equal thoughts
        # of one problem would have equal responses.
        whole = [[*one.tokens, *thought.tokens, *(() if thought.stopped else close)] for one, thought, _, _ in flat]
        own = [stable_hash("sample", f"{identity} {g}") >> 33 for _, _, identity, g in flat]
        responses = decode(decoder._replace(rows=rows * samples), whole, own, 1, keys[1])
        judged = [
            self._judged(one, response[0], thought)
            for (one, thought, _, _), response in zip(flat, responses, strict=True)
        ]
        return [judged[i * samples : (i + 1) * samples] for i in range(len(asked))]

    def _judged(self, one: Asked, response: Sampled, thought: Sampled | None) -> Record:
        text = finish(self._examinee.tokenizer, response, self._stop)
        record = judge(self._task, one.problem, text)
        record |= {"tokens": len(response.tokens), "stopped": response.stopped}
        if thought is not None:
            shown = thought.tokens[: len(thought.tokens) - len(self._examinee.template.close) * thought.stopped]
            record |= {"thought": self._examinee.tokenizer.decode(shown), "thought_tokens": len(thought.tokens)}
        return record


def judge(task: Task, problem: Problem, response: str) -> Record:
    """The answer found in a response, None where there is none, and whether it is right."""
    if task.is_choice:
        answer = verify.extract_choice(response, LETTERS[: len(problem.choices)])
        correct = answer == problem.answer
    else:
        answer = verify.extract_math(response, task.number)
        correct = answer is not None and verify.same_answer(problem.answer, answer, task.tolerance)
    return {"response": response, "extracted": answer, "correct": correct}
