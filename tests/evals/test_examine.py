# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation of a tiny model: what is recorded, that a killed one goes on, and what is refused."""

import dataclasses
import json

import jax
import pytest
from reference import rough_params
from tiny_run import LLAMA, byte_tokenizer

from rlp_jax.config import ConfigError, SuiteConfig, Template
from rlp_jax.data.template import template_tokens
from rlp_jax.evals import examine
from rlp_jax.evals.examine import Examinee, fingerprint, judge, run_task
from rlp_jax.evals.tasks import TASKS, Problem
from rlp_jax.models.transformer import LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = SuiteConfig(shots=0, max_tokens=6, samples=2, temperature=0.9, thought_tokens=4, batch=4)
TASK = TASKS["mmlu"]
PROBLEMS = [
    Problem(n, f"What comes after {n}?", "B", (str(n), str(n + 1), "nothing"), "counting") for n in range(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def examinee():
    model = LanguageModel(dataclasses.replace(LLAMA, max_positions=512))
    params = rough_params(model)
    tokenizer = byte_tokenizer()
    template = template_tokens(Template(instruction="Think.\n", open="<", close=">"), tokenizer)
    return Examinee(model, params, tokenizer, template, fingerprint(params))


def quiet(text):
    pass


def test_records(examinee, tmp_path):
    path, said = tmp_path / "records" / "mmlu.jsonl", []
    records = run_task(examinee, TASK, PROBLEMS, SETTINGS, path, said.append)
    assert [record["id"] for record in records] == list(range(5))
    assert said[-1] == "mmlu: 5 of 5" and len(said) == 3  # 2 problems with 2 samples each at a time
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["settings"]["max_tokens"] == 6 and sorted(lines[1:], key=lambda row: row["id"]) == records
    for record in records:
        assert record["subject"] == "counting" and len(record["samples"]) == 2
        for response in (record["greedy"], *record["samples"]):
            assert 1 <= response["tokens"] <= 6 and response["stopped"] == (response["tokens"] < 6)
            assert response["correct"] == (response["extracted"] == "B") and "thought" not in response


def test_a_killed_evaluation_goes_on(examinee, tmp_path, monkeypatch):
    """Whole records are kept, the torn one is made again, and the responses are those of one never killed."""
    whole = run_task(examinee, TASK, PROBLEMS, SETTINGS, tmp_path / "whole.jsonl", quiet)
    data = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    asked, judged = [], examine.Asker._judged

    def counted(self, one, response, thought):
        asked.append(one.problem.id)
        return judged(self, one, response, thought)

    monkeypatch.setattr(examine.Asker, "_judged", counted)
    for cut, left in ((0, 5), (ends[0] - 3, 5), (ends[0], 5), (ends[2] + 11, 3), (len(data) - 1, 1), (len(data), 0)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(data[:cut])
        asked.clear()
        assert run_task(examinee, TASK, PROBLEMS, SETTINGS, path, quiet) == whole
        assert len(asked) == 3 * left
    path = tmp_path / "fewer.jsonl"
    assert run_task(examinee, TASK, PROBLEMS[:2], SETTINGS, path, quiet) == whole[:2]
    asked.clear()
    assert run_task(examinee, TASK, PROBLEMS, SETTINGS, path, quiet) == whole and len(asked) == 9
    assert run_task(examinee, TASK, PROBLEMS[:1], SETTINGS, path, quiet) == whole[:1]


def test_thinking_first(examinee, tmp_path):
    thinking = dataclasses.replace(SETTINGS, think=True)
    records = run_task(examinee, TASK, PROBLEMS, thinking, tmp_path / "mmlu.jsonl", quiet)
    responses = [response for record in records for response in (record["greedy"], *record["samples"])]
    assert all(1 <= response["thought_tokens"] <= 4 and ">" not in response["thought"] for response in responses)
    assert all(len(response["thought"]) <= 4 for response in responses)
    plain = run_task(examinee, TASK, PROBLEMS, SETTINGS, tmp_path / "plain.jsonl", quiet)
    assert [record["greedy"]["response"] for record in records] != [record["greedy"]["response"] for record in plain]
    fewer = dataclasses.replace(thinking, batch=2)
    again = run_task(examinee, TASK, PROBLEMS[3:], fewer, tmp_path / "again.jsonl", quiet)
    assert again == records[3:]


def test_what_is_refused(examinee, tmp_path):
    path = tmp_path / "mmlu.jsonl"
    run_task(examinee, TASK, PROBLEMS[:1], SETTINGS, path, quiet)
    before = path.read_bytes()

    def refused(message, task=TASK, problems=PROBLEMS[:1], settings=SETTINGS, who=examinee):
        with pytest.raises(ConfigError, match=message):
            run_task(who, task, problems, settings, path, quiet)
        assert path.read_bytes() == before

    refused(r"other settings: max_tokens \(6 there, 7 here\)", settings=dataclasses.replace(SETTINGS, max_tokens=7))
    refused(r"thought_tokens \(None there, 4 here\)", settings=dataclasses.replace(SETTINGS, think=True))
    refused("weights", who=examinee._replace(weights="another"))
    refused("problem 0 is another one there", problems=[PROBLEMS[1]._replace(id=0)])
    refused("problem 0 needs prompt .* the model's context holds 512", settings=dataclasses.replace(SETTINGS, shots=5))
    path.write_text("[1]\n")
    before = path.read_bytes()
    refused(r"mmlu.jsonl:1: not a record")


def test_the_fingerprint_sees_a_small_step(examinee):
    moved = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), examinee.params)
    assert fingerprint(moved) != examinee.weights == fingerprint(examinee.params)


def test_verdicts():
    choice = Problem(0, "", "B", ("a", "b"), "")
    assert judge(TASKS["mmlu"], choice, "The answer is (B).") == {
        "response": "The answer is (B).", "extracted": "B", "correct": True,
    }  # fmt: skip
    assert not judge(TASKS["mmlu"], choice, "The answer is (A).")["correct"]
    assert judge(TASKS["mmlu"], choice, "The answer is (C).")["extracted"] is None  # there are two
    assert judge(TASKS["gsm8k"], Problem(0, "", "18", (), ""), "no idea")["extracted"] is None


def test_verdicts_in_mathematics():
    pytest.importorskip("math_verify", reason="pip install 'rlp_jax[eval]'")
    problem = Problem(0, "", "1.60", (), "")
    assert judge(TASKS["minerva"], problem, "The final answer is $1.61$. ")["correct"]
    assert not judge(TASKS["math500"], problem, "The final answer is $1.61$. ")["correct"]
    assert judge(TASKS["gsm8k"], problem._replace(answer="1,200"), "He pays $1200")["correct"]
