# SPDX-License-Identifier: Apache-2.0
"""A run in two real processes of four devices each: the numbers of one process with eight, a process that is killed,
and going on with another number of processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from eight_devices import COMPILER
from tiny_run import compilation, tiny_config

from rlp_jax.config import ConfigError, EvalConfig, MeshConfig, to_json
from rlp_jax.data.documents import TokenizedDocument
from rlp_jax.data.pipeline import train_batches
from rlp_jax.distributed import fetch, join, own_rows
from rlp_jax.watchdog import LOST

TESTS = Path(__file__).parent
TIMINGS = ("seconds", "per_s", "goodput")
SILENT = 5  # seconds
# What Python prints is the standard output here; what the collectives of jax 0.10 print, a thread over the other,
# goes where errors do.
PROGRAM = """
import os, pathlib, signal, sys, time
sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from rlp_jax import cli, distributed
from importlib import import_module
train = import_module("rlp_jax.train")
{planted}
sys.exit(cli.main({argv!r}))
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Model, documents and the experiment: its mesh puts rows, and halves of every matrix, into both processes."""
    root = tmp_path_factory.mktemp("processes")
    config = tiny_config(
        root, steps=4, mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        eval=EvalConfig(every=2, documents=6, batch_documents=4, group_size=2),
    )  # fmt: skip
    lines = ["from rlp_jax.settings import from_json", f"config = lambda: from_json({to_json(config)!r}, '')"]
    (root / "experiment.py").write_text("\n".join(lines))
    return root


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(root, run_dir, processes, plant=None, *arguments):
    """`rlp train` in so many processes of eight devices together; `plant` = (process, source) runs in one first."""
    coordinator, started = f"127.0.0.1:{free_port()}", []
    for i in range(processes):
        own = ["--processes", str(processes), "--process-id", str(i), "--coordinator", coordinator]
        argv = ["train", str(root / "experiment.py"), "--run-dir", str(root / run_dir), *arguments]
        argv += own if processes > 1 else []
        planted = plant[1] if plant and plant[0] == i else ""
        program = PROGRAM.format(planted=planted, argv=argv)
        settings = compilation(root / "cache") | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": 8 // processes,
            "RLP_SILENT_SECONDS": SILENT,
        }
        env = os.environ | {name: str(value) for name, value in settings.items()}
        env["XLA_FLAGS"] = COMPILER  # the number of devices is set above
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=env, cwd=TESTS.parent, **pipes))
    return started


def finish(started, timeout=600):
    """(exit code, stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, said, strict=True)]


def after_step(step, process, what):
    """The process does this when the step is computed: before its row is logged, so nobody is at an agreed point."""
    return (
        process,
        f"""
tick = distributed.Team.tick
turns = []
def planted(team, phase):
    tick(team, phase)
    turns.append(phase)
    if turns.count("learn") == {step} and phase == "learn":
        {what}
distributed.Team.tick = planted
""",
    )


def rows(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def untimed(run_dir):
    return [
        {key: value for key, value in row.items() if not any(timing in key for timing in TIMINGS)}
        for row in rows(run_dir, "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def one(root):
    """The same run in one process."""
    ((code, _, stderr),) = finish(start(root, "one", 1))
    assert code == 0, stderr[-3000:]
    return root / "one"


def assert_same_run(ours, theirs):
    """Thoughts to the letter, numbers to 1e-5: the two differ in the order in which sums over devices are taken.

    Rewards are differences of log-probabilities of 5 nats: 1e-5 of those. A gradient is a sum of advantages,
    differences of rewards that are thousandths here: 1e-6 nats are a larger share of it."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        mine, other = (untimed(x) if name == "metrics.jsonl" else rows(x, name) for x in (ours, theirs))
        assert [list(row) for row in mine] == [list(row) for row in other]
        for row, expected in zip(mine, other, strict=True):
            for key, value in expected.items():
                if key in ("warnings", "logprob_gap"):  # the gap is itself the rounding between two programs
                    continue
                rtol = 1e-6 / expected["reward_std"] if key == "grad_norm" else 1e-5
                np.testing.assert_allclose(row[key], value, rtol=rtol, atol=5e-5, err_msg=f"{name} {row['step']} {key}")
    mine, other = (rows(x, "thoughts.jsonl") for x in (ours, theirs))
    assert [(r["step"], r["document"], r["prefix"], [t["text"] for t in r["thoughts"]]) for r in mine] == [
        (r["step"], r["document"], r["prefix"], [t["text"] for t in r["thoughts"]]) for r in other
    ]


def test_two_processes_give_the_numbers_of_one(root, one):
    first, second = finish(start(root, "two", 2, None, "--profile", "3"))
    assert first[0] == second[0] == 0, first[2][-3000:] + second[2][-3000:]
    assert first[1].splitlines()[-1] == str(root / "two" / "report.html") and second[1] == ""
    assert_same_run(root / "two", one)
    assert all(0 < row["goodput"] < 1 for row in rows(root / "two", "metrics.jsonl"))
    assert len(list((root / "two" / "profile").rglob("*.xplane.pb"))) == 1
    written = {path.name for path in (root / "two").iterdir() if not path.name.startswith(".")}
    assert written - {"profile"} == {path.name for path in one.iterdir() if not path.name.startswith(".")}


def test_a_killed_process_stops_the_other_and_one_process_goes_on(root, one):
    """Killed at step 3, after the checkpoint of step 2: the other is in a collective operation then. What a single
    process makes of it is the run that nothing befell."""
    checkpoint = root / "killed" / "checkpoints" / "2"
    saved = f"while not pathlib.Path({str(checkpoint)!r}).is_dir(): time.sleep(0.1)\n        "
    survivor, killed = finish(start(root, "killed", 2, after_step(3, 1, saved + KILL)))
    assert killed[0] == -signal.SIGKILL and survivor[0] == LOST, survivor[2][-3000:]
    assert f"process 1 on {socket.gethostname()}: no sign of life for {SILENT} seconds" in survivor[2]
    ((code, stdout, stderr),) = finish(start(root, "killed", 1))
    assert code == 0, stderr[-3000:]
    assert "after step 2" in stdout
    assert_same_run(root / "killed", one)


def test_the_coordinator_is_named_too(root):
    killed, survivor = finish(start(root, "headless", 2, after_step(1, 0, KILL)))
    assert killed[0] == -signal.SIGKILL and survivor[0] == LOST, survivor[2][-3000:]
    assert f"process 0 on {socket.gethostname()}, the coordinator, was lost" in survivor[2]


def test_a_signal_to_one_process_saves_in_both_and_two_go_on(root, one):
    both = finish(start(root, "stopped", 2, after_step(1, 1, "os.kill(os.getpid(), signal.SIGTERM)")))
    assert [code for code, _, _ in both] == [143, 143], both[0][2][-3000:] + both[1][2][-3000:]
    assert [path.name for path in (root / "stopped" / "checkpoints").iterdir() if path.name.isdigit()] == ["1"]
    again = finish(start(root, "stopped", 2))
    assert [code for code, _, _ in again] == [0, 0], again[0][2][-3000:] + again[1][2][-3000:]
    assert "after step 1" in again[0][1]
    assert_same_run(root / "stopped", one)


def test_a_collective_operation_that_fails_is_nobodys_bad_input(root):
    """As JAX raises it where a process dies while another calls a program: both are to be started again."""
    lost = 'raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")'
    for code, _, stderr in finish(start(root, "reset", 2, after_step(1, 0, lost))):
        assert code == 1 and "UNKNOWN: Gloo AllGather failed" in stderr


def test_processes_that_differ_are_refused_by_all(root):
    differ = (1, "train.jax.__version__ = '0.0.0'")
    for code, _, stderr in finish(start(root, "differ", 2, differ)):
        assert code == 2 and "jax version: not the same in process 0 and process 1" in stderr
    assert not (root / "differ").exists()


# ------------------------------------------------------------------------------------------------ within one process


def test_a_process_reads_its_rows_of_the_same_batches():
    documents = [
        TokenizedDocument(np.arange(10 + i % 7, dtype=np.int32), np.ones(10 + i % 7, bool), i, str(i))
        for i in range(20)
    ]
    whole = train_batches(documents, 8, 32, 0, seed=3, pad_multiple=4)
    shares = [train_batches(documents, 8, 32, 0, 3, 4, rows=range(first, first + 4)) for first in (0, 4)]
    for _ in range(6):  # over the end of the first epoch
        batch, parts = next(whole), [next(share) for share in shares]
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value, err_msg=name)
        assert all(share.get_state() == whole.get_state() for share in shares)
    shares[0].set_state(json.loads(json.dumps(whole.get_state())))
    np.testing.assert_array_equal(next(shares[0])["document_B"], next(whole)["document_B"][:4])


def test_one_process_has_all_rows_and_takes_what_it_is_asked_for():
    assert own_rows(None, 5).tolist() == [0, 1, 2, 3, 4]
    tree = {"a": jax.numpy.arange(12).reshape(4, 3), "b": np.arange(4), "c": None}
    taken = fetch(tree, np.array([2, 0]))
    assert taken["a"].tolist() == [[6, 7, 8], [0, 1, 2]] and taken["b"].tolist() == [2, 0] and taken["c"] is None
    assert fetch(tree)["b"] is tree["b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, None, "host:1"), "--process-id missing"),
        ((2, 2, "host:1"), "the id is from 0"),
        ((2, 0, "host"), "HOST:PORT"),
        ((0, 0, "host:1"), "the id is from 0"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    with pytest.raises(ConfigError, match=message):
        join(*arguments)


def test_what_the_environment_may_say(monkeypatch):
    monkeypatch.setenv("RLP_DISTRIBUTED", "yes")
    with pytest.raises(ConfigError, match="RLP_DISTRIBUTED is 'yes'"):
        join()
    monkeypatch.delenv("RLP_DISTRIBUTED")
    monkeypatch.setenv("RLP_SILENT_SECONDS", "-3")
    with pytest.raises(ConfigError, match="RLP_SILENT_SECONDS is '-3'"):
        join(2, 0, "host:1")
    assert join().alone
