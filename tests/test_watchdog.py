# SPDX-License-Identifier: Apache-2.0
"""Who is to blame when a run in several processes stands still: reports with times of our own making."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlp_jax.watchdog import LOST, Judge, Report, Verdict, of_runtime

ROOT = Path(__file__).parents[1]
NAMES = ["process 0 on a", "process 1 on b", "process 2 on c"]


def course(*rounds):
    """The verdict after each round of (time, reports)."""
    judge = Judge(NAMES, silent=10, stalled=100)
    return [judge.verdict(dict(enumerate(reports)), time) for time, reports in rounds]


def beating(time, *turns):
    return time, [Report(int(time), turn, f"phase {turn}") for turn in turns]


def test_all_is_well_while_everyone_beats_and_moves():
    assert course(*(beating(8 * t, t, t, t) for t in range(50))) == [None] * 50


def test_a_silent_process_is_named_and_only_it():
    reports = [(8 * t, [Report(t, 1, "x"), Report(t, 1, "x"), Report(min(t, 2), 1, "x")]) for t in range(6)]
    *before, last = course(*reports[:5])
    assert before == [None, None, None, None]  # 8 seconds without a beat are no death
    assert last == Verdict(LOST, "process 2 on c: no sign of life for 10 seconds")


def test_a_process_that_never_reported_is_dead_too():
    judge = Judge(NAMES, silent=10, stalled=100)
    rounds = [judge.verdict({0: Report(t, 1, "x"), 1: Report(t, 1, "x")}, 8.0 * t) for t in range(3)]
    assert rounds[:2] == [None, None] and rounds[2].message.startswith("process 2 on c:")


def test_the_process_that_is_behind_hangs_not_those_that_wait_for_it():
    rounds = [beating(8 * t, 5, 5, 5 if t < 2 else 6) for t in range(20)]
    found = [verdict for verdict in course(*rounds) if verdict]
    assert found[0] == Verdict(LOST, "process 0 on a, process 1 on b: nothing finished for 100 seconds after phase 5")
    one_behind = [beating(8 * t, 4 if t < 1 else 5, 5, 4) for t in range(20)]
    (first, *_) = [verdict for verdict in course(*one_behind) if verdict]
    assert first.message.startswith("process 2 on c: nothing finished for 100 seconds after phase 4")


def test_a_slow_phase_is_no_hang():
    assert course(*(beating(8 * t, t // 12, t // 12, t // 12) for t in range(60))) == [None] * 60


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_process_that_failed_takes_the_others_with_it_by_its_own_code(code):
    failed = Report(3, 1, "x", [code, "model does not exist"])
    (verdict,) = course((0.0, [Report(3, 1, "x"), failed, Report(3, 1, "x")]))
    assert verdict == Verdict(code, "process 1 on b failed: model does not exist")


@pytest.mark.parametrize(
    ("error", "whether"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:28331: Connection reset by peer"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), True),
        (ValueError("steps is -1: write a positive number"), False),
        (OSError(2, "No such file or directory", "UNKNOWN"), False),
        (ValueError("what is UNKNOWN: this"), False),
    ],
)
def test_what_the_runtime_says_is_known_by_its_status_code(error, whether):
    assert of_runtime(error) is whether


def test_what_jax_raises_is_known_in_a_first_call_and_in_those_that_take_the_short_way():
    program = """
import jax
jax.config.update("jax_cpu_enable_async_dispatch", False)
from rlp_jax.watchdog import of_runtime
works = [True] * {works}
def planted(x):
    works.pop()
    return x
call = jax.jit(lambda x: jax.pure_callback(planted, x, x))
try:
    for _ in range(3):
        jax.block_until_ready(call(jax.numpy.ones(())))
except Exception as error:
    print(type(error).__name__, of_runtime(error))
"""
    for works, kind in ((0, "JaxRuntimeError"), (2, "ValueError")):
        command = [sys.executable, "-c", program.format(works=works)]
        said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert said.stdout == f"{kind} True\n", said.stderr[-2000:]
