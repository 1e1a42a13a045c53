# SPDX-License-Identifier: Apache-2.0
"""Scores and averages worked out by hand."""

import pytest

from rlp_jax.evals.suite import averages, standard_error, summarise


def record(greedy, samples=(), extracted="1", tokens=10):
    def response(correct):
        return {"correct": correct, "extracted": extracted, "stopped": correct, "tokens": tokens}

    return {"greedy": response(greedy), "samples": [response(correct) for correct in samples]}


def test_a_summary_by_hand():
    records = [
        record(True, (True, True)), record(False, (True, False)), record(True, (False, False), extracted=None),
        record(False, (False, True), tokens=20),
    ]  # fmt: skip
    summary = summarise(records)
    assert (summary["problems"], summary["samples"], summary["greedy"], summary["pass@1"]) == (4, 2, 50.0, 50.0)
    # greedy 1, 0, 1, 0: variance 1/3 over 4 problems; pass@1 1, 1/2, 0, 1/2: variance 1/6
    assert summary["greedy_se"] == pytest.approx(100 * (1 / 12) ** 0.5)
    assert summary["pass@1_se"] == pytest.approx(100 * (1 / 24) ** 0.5)
    assert summary["answered"] == 9 / 12 and summary["stopped"] == 6 / 12 and summary["tokens"] == 12.5


def test_without_samples_and_with_one_problem():
    summary = summarise([record(True)])
    assert summary["pass@1"] is None and summary["pass@1_se"] is None
    assert summary["greedy"] == 100.0 and summary["greedy_se"] is None
    assert standard_error([3.0]) is None


def score(greedy, pass_at_1, error=1.0):
    return {"greedy": greedy, "greedy_se": error, "pass@1": pass_at_1, "pass@1_se": error}


MATH = {"gsm8k": score(0, 10), "math500": score(0, 20), "minerva": score(0, 30), "amc23": score(0, 60, 2.0)}
SCIENCE = {"mmlu": score(40, 30), "mmlu_pro": score(20, 10), "gpqa_diamond": score(30, 20)}


def test_the_papers_averages():
    result = averages(MATH | SCIENCE)
    # mathematics by pass@1: 120 / 4; science by greedy 90 / 3 and by pass@1 60 / 3; overall their mean
    assert (result["math_avg"], result["science_avg"], result["science_avg@1"]) == (30.0, 30.0, 20.0)
    assert result["overall"] == pytest.approx(80 / 3)
    assert result["math_avg_se"] == pytest.approx((1 + 1 + 1 + 4) ** 0.5 / 4)
    assert result["science_avg_se"] == pytest.approx(3**0.5 / 3)
    assert averages(MATH | SCIENCE | {"aime25": score(0, 5)})["math_avg"] == 25.0


def test_an_average_needs_all_its_tasks_and_its_samples():
    result = averages(SCIENCE | {"gsm8k": score(0, 10)})
    assert result["math_avg"] is None and result["overall"] is None and result["science_avg"] == 30.0
    result = averages({**MATH, **SCIENCE, "mmlu": score(40, None)})
    assert result["science_avg@1"] is None and result["science_avg"] == 30.0 and result["overall"] is None
