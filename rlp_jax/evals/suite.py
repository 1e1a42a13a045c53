# SPDX-License-Identifier: Apache-2.0
"""A benchmark's score: means over problems, and the averages of the paper (arXiv 2510.01265, section 4).

For every problem there is one greedy response and, where asked for, k sampled ones. "greedy" and "pass@1" are means
over problems, pass@1 of each problem's mean over its k samples; standard errors are those of a mean over problems.

    Math Avg        mean of pass@1 (the paper: k = 8) over GSM8K, MATH500, Minerva, AMC23 and, where evaluated, AIME25
    Science Avg     mean of greedy over MMLU, MMLU-Pro, GPQA-Diamond
    Science Avg@1   mean of pass@1 (the paper: k = 4) over the same
    Overall         mean of the three
"""

import math
from collections.abc import Sequence

import numpy as np

from rlp_jax.evals.records import Record

MATH = ("gsm8k", "math500", "minerva", "amc23")  # and aime25
SCIENCE = ("mmlu", "mmlu_pro", "gpqa_diamond")


def summarise(records: Sequence[Record]) -> Record:
    """Means over problems with their standard errors, from a task's records.

    Returns:
      problems; greedy, pass@1 (None without samples) and their `_se`, in percent; samples a problem; answered and
      stopped (shares of all responses), tokens (mean of a response).
    """
    greedy = [float(row["greedy"]["correct"]) for row in records]
    sampled = [np.mean([sample["correct"] for sample in row["samples"]]) for row in records if row["samples"]]
    responses = [response for row in records for response in (row["greedy"], *row["samples"])]
    return {
        "problems": len(records),
        "samples": len(records[0]["samples"]),
        "greedy": 100 * float(np.mean(greedy)),
        "greedy_se": standard_error(greedy),
        "pass@1": 100 * float(np.mean(sampled)) if sampled else None,
        "pass@1_se": standard_error(sampled) if sampled else None,
        "answered": float(np.mean([response["extracted"] is not None for response in responses])),
        "stopped": float(np.mean([response["stopped"] for response in responses])),
        "tokens": float(np.mean([response["tokens"] for response in responses])),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, in percent; None for a single value."""
    if len(values) < 2:
        return None
    return 100 * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def averages(results: dict[str, Record]) -> Record:
    """The paper's averages, in percent, with standard errors of independent tasks; None where a task or the samples
    that one needs are missing."""
    math_tasks = [*MATH, *(["aime25"] if "aime25" in results else [])]
    parts = {
        "math_avg": _mean(results, math_tasks, "pass@1"),
        "science_avg": _mean(results, SCIENCE, "greedy"),
        "science_avg@1": _mean(results, SCIENCE, "pass@1"),
    }
    means = [mean for mean, _ in parts.values()]
    overall = None if None in means else sum(means) / len(means)
    named = {name: mean for name, (mean, _) in parts.items()}
    return named | {f"{name}_se": error for name, (_, error) in parts.items()} | {"overall": overall}


def _mean(results: dict[str, Record], tasks: Sequence[str], figure: str) -> tuple[float | None, float | None]:
    rows = [results[task] for task in tasks if task in results]
    if len(rows) < len(tasks) or any(row[figure] is None for row in rows):
        return None, None
    errors = [row[f"{figure}_se"] for row in rows]
    error = None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(rows)
    return sum(row[figure] for row in rows) / len(rows), error
