# SPDX-License-Identifier: Apache-2.0
"""The loop: what a run writes, and that a run which was killed ends bit by bit like one that was not."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from eight_devices import simulated
from next_step import next_step
from rich.console import Console
from tiny_run import compilation, hasty_compilation, tiny_config

from rlp_jax import cli
from rlp_jax.checkpoint import load_run
from rlp_jax.checkpoints_io.load import load, save_hf
from rlp_jax.config import CheckpointConfig, ConfigError, MeshConfig, OptimizerConfig, ReportConfig, RLPConfig
from rlp_jax.report.recorded import is_document
from rlp_jax.rows import Progress, watch
from rlp_jax.settings import from_json
from rlp_jax.train import TooManySkipped, only_process, train
from rlp_jax.writers import RunLog

TESTS = Path(__file__).parent
TIMINGS = ("seconds", "per_s", "goodput")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with model and documents. All runs below it share their compiled programs, compiled in haste."""
    root = tmp_path_factory.mktemp("runs")
    with hasty_compilation(root / "cache"):
        yield root


@pytest.fixture(scope="module")
def whole(root):
    """A run that nothing interrupts: its directory and what it printed."""
    out = io.StringIO()
    report = train(tiny_config(root), root / "whole", Console(file=out))
    assert report == root / "whole" / "report.html"
    return root / "whole", out.getvalue()


def rows(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def untimed(run_dir):
    """metrics.jsonl without what a clock measured."""
    return [
        {key: value for key, value in row.items() if not any(timing in key for timing in TIMINGS)}
        for row in rows(run_dir, "metrics.jsonl")
    ]


def final_arrays(run_dir, step):
    """Every array of a checkpoint, by path, as stored."""
    stored = ocp.StandardCheckpointer().restore((run_dir / "checkpoints" / str(step) / "state").resolve())
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}


def in_a_process(root, run_dir, before, config="tiny_config(root)", devices=1):
    """`rlp train` in a process of its own; `before` may plant what is to happen to it."""
    program = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from tiny_run import tiny_config
from rlp_jax.config import *
from rlp_jax import cli
from importlib import import_module
train = import_module("rlp_jax.train")
root = pathlib.Path({str(root)!r})
config = {config}
experiment = pathlib.Path({str(run_dir)!r} + ".py")
lines = ["from rlp_jax.settings import from_json", f"config = lambda: from_json({{to_json(config)!r}}, '')"]
experiment.write_text("\\n".join(lines))
{before}
sys.exit(cli.main(["train", str(experiment), "--run-dir", {str(run_dir)!r}]))
"""
    env = os.environ | simulated(devices) | {name: str(value) for name, value in compilation(root / "cache").items()}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=TESTS.parent)


def signal_after(step, name):
    """The process sends itself a signal as soon as a step is in metrics.jsonl."""
    return f"""
write = train.RunLog.step
def step(log, row):
    write(log, row)
    if row["step"] == {step}:
        os.kill(os.getpid(), signal.{name})
train.RunLog.step = step
"""


def test_what_a_run_writes(whole):
    run_dir, printed = whole
    config = from_json((run_dir / "config.json").read_text(), "config.json")
    assert config == tiny_config(run_dir.parent)
    assert [row["step"] for row in rows(run_dir, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(run_dir, "eval.jsonl")] == [0, 4, 6]
    summary = json.loads((run_dir / "summary.json").read_text())
    first, _, last = rows(run_dir, "eval.jsonl")
    assert list(summary) == ["before", "after"]
    assert {"step": 0} | summary["before"] == first and {"step": 6} | summary["after"] == last
    asked = "gain gain_ci95 gain_empty gain_shuffled ce_think ce_no_think acc_think acc_no_think thought_len stop_rate"
    assert set(asked.split()) <= set(summary["after"])
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()) == ["4", "6"]
    assert (run_dir / "report.html").is_file() and list((run_dir / "tensorboard").iterdir())
    assert printed.count("held-out after step") == 3
    (row, *_) = rows(run_dir, "metrics.jsonl")
    assert row["skipped"] == 0 and row["warnings"] == [] and row["learning_rate"] == pytest.approx(1e-2)
    assert row["seconds"] == pytest.approx(row["seconds_data"] + row["seconds_sample"] + row["seconds_learn"])


def test_thoughts_are_rows_of_text_with_rewards(whole):
    run_dir, _ = whole
    thoughts = rows(run_dir, "thoughts.jsonl")
    assert [row["step"] for row in thoughts] == [1, 1, 5, 5]
    texts = [json.loads(line)["text"] for line in (run_dir.parent / "documents.jsonl").read_text().splitlines()]
    for row in thoughts:
        assert any(text.startswith(row["prefix"] + row["target"]) for text in texts)
        assert len(row["target"]) == 2 and row["s_ema"] < 0
        assert len(row["thoughts"]) == 2
        assert sum(thought["advantage"] for thought in row["thoughts"]) == pytest.approx(0, abs=1e-5)
        assert all(1 <= thought["length"] <= 5 for thought in row["thoughts"])


def test_training_moves_the_policy_and_its_average_follows(whole):
    run_dir, _ = whole
    run = load_run(run_dir)
    assert run.step == 6
    start = np.asarray(load(run_dir.parent / "model").params["embed"]["embedding"])
    moved = np.abs(np.asarray(run.params["embed"]["embedding"]) - start).max()
    followed = np.abs(np.asarray(run.ema_params["embed"]["embedding"]) - start).max()
    assert 0 < followed < 0.1 * moved


def test_killed_stopped_killed_and_resumed_is_bitwise_the_same(root, whole):
    run_dir = root / "killed"
    killed = in_a_process(root, run_dir, signal_after(1, "SIGKILL"))  # before the first checkpoint: starts over
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [row["step"] for row in rows(run_dir, "metrics.jsonl")] == [1]
    with only_process(run_dir):  # as while it goes on
        assert cli.main(["report", str(run_dir)]) == 0

    stopped = in_a_process(root, run_dir, signal_after(4, "SIGTERM"))  # before an evaluation, which is left for later
    assert stopped.returncode == 143, stopped.stderr[-2000:]
    assert "the same command resumes the run" in stopped.stderr and "resuming" not in stopped.stdout
    assert [row["step"] for row in rows(run_dir, "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(run_dir, "eval.jsonl")] == [0]
    assert (run_dir / "checkpoints" / "4").is_dir() and not (run_dir / "summary.json").exists()

    killed = in_a_process(root, run_dir, signal_after(5, "SIGKILL"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert "resuming" in killed.stdout and "after step 4" in killed.stdout
    assert [row["step"] for row in rows(run_dir, "metrics.jsonl")] == [1, 2, 3, 4, 5]

    out = io.StringIO()
    train(tiny_config(root), run_dir, Console(file=out))
    assert "after step 4" in out.getvalue()
    assert_same_run(run_dir, whole[0])


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(root, whole):
    run_dir, out = root / "damaged", io.StringIO()
    shutil.copytree(whole[0], run_dir)
    (run_dir / "summary.json").unlink()
    file = max((run_dir / "checkpoints" / "6" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    train(tiny_config(root), run_dir, Console(file=out))
    assert "checkpoints/6 is damaged" in out.getvalue() and "after step 4" in out.getvalue()
    assert (run_dir / "checkpoints" / "6.damaged").is_dir()
    assert_same_run(run_dir, whole[0])


def test_a_run_whose_directory_vanishes_stops_and_goes_on_when_it_is_back(root, whole):
    run_dir = root / "vanished"
    vanishes = f"""
import time
from rlp_jax import storage
storage.WAITS_S = (0.01, 0.01)
write = train.RunLog.step
def step(log, row):
    write(log, row)
    if row["step"] == 4:
        while not os.path.isdir({str(run_dir / "checkpoints" / "2")!r}):  # a save in progress would go on beside it
            time.sleep(0.01)
        os.rename({str(run_dir)!r}, {str(run_dir) + ".away"!r})
train.RunLog.step = step
"""
    done = in_a_process(root, run_dir, vanishes)
    assert done.returncode == 74, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("rlp: error")]
    assert len(said) == 1 and f"{run_dir}/" in said[0], done.stderr[-2000:]
    assert said[0].endswith(
        "No such file or directory, 3 times: bring the directory back, then the same command goes on from the last "
        "checkpoint"
    )
    os.rename(str(run_dir) + ".away", run_dir)  # nothing was written in its place
    train(tiny_config(root), run_dir, Console(file=io.StringIO()))
    assert_same_run(run_dir, whole[0])


def assert_same_run(ours, theirs):
    assert untimed(ours) == untimed(theirs)
    for name in ("eval.jsonl", "thoughts.jsonl", "summary.json", "config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert_same_arrays(ours, theirs)


def assert_same_arrays(ours, theirs):
    ours, theirs = final_arrays(ours, 6), final_arrays(theirs, 6)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_finished_run_says_so_and_touches_nothing(root, whole):
    run_dir, _ = whole
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    out = io.StringIO()
    assert train(tiny_config(root), run_dir, Console(file=out)) == run_dir / "report.html"
    assert "is finished (6 steps)" in out.getvalue()
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_run_directory_of_another_config_is_refused(root, whole):
    run_dir, _ = whole
    with pytest.raises(ConfigError, match=r"another config: seed \(0 there, 1 here\); choose another --run-dir"):
        train(tiny_config(root, seed=1), run_dir)
    with pytest.raises(ConfigError, match=r"steps \(6 there, 5 here\)"):
        train(tiny_config(root, steps=5), run_dir)
    cosine = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3)
    with pytest.raises(ConfigError, match=r"optimizer\.final_learning_rate"):
        train(tiny_config(root, optimizer=cosine), run_dir)
    with pytest.raises(ConfigError, match="holds other files"):
        train(tiny_config(root), root / "model" / "..")
    with pytest.raises(ConfigError, match=r"has \[\.\.\.\] in its name: no checkpoint could be read"):
        train(tiny_config(root), root / "seeds[0]")
    assert not (root / "seeds[0]").exists()
    with pytest.raises(ConfigError, match="is a file"):
        train(tiny_config(root), root / "documents.jsonl")


def test_a_finished_run_with_a_constant_rate_can_be_extended(root, whole):
    """To the very numbers of a run that was that long from the beginning."""
    run_dir = root / "extended"
    train(tiny_config(root, steps=4), run_dir, Console(file=io.StringIO()))
    train(tiny_config(root), run_dir, Console(file=io.StringIO()))
    assert untimed(run_dir) == untimed(whole[0])
    assert_same_arrays(run_dir, whole[0])


def test_a_run_that_diverges_stops_and_names_the_documents(root):
    model, params, tokenizer = load(root / "model")
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 3e38  # finite, but its logits are not
    save_hf(root / "broken", model, params, tokenizer)
    config = tiny_config(root, max_skipped=2, model=str(root / "broken"), checkpoint=CheckpointConfig(every=1))
    message = "2 steps in a row were not finite, the last one step 2 on documents"
    file = root / "diverged" / "nonfinite.jsonl"
    with pytest.raises(TooManySkipped, match=message) as e:
        train(config, root / "diverged", Console(file=io.StringIO()))
    metrics = rows(root / "diverged", "metrics.jsonl")
    assert [row["finite"] for row in metrics] == [0.0, 0.0]
    assert [row["skipped"] for row in metrics] == [1, 2]
    assert metrics[0]["loss"] is None
    assert metrics[-1]["warnings"] == ["loss, reward or gradient is not finite: the step is skipped"]
    named = str(e.value).split("documents ")[1].split(":")[0].split(", ")
    assert len(named) == 4 and all(name.isdigit() for name in named) and str(e.value).endswith(f"documents in {file}")
    kept = rows(root / "diverged", "nonfinite.jsonl")
    assert [row["step"] for row in kept] == 4 * [1] + 4 * [2]
    assert [str(row["document"]) for row in kept[4:]] == named
    texts = [json.loads(line)["text"] for line in (root / "documents.jsonl").read_text().splitlines()]
    assert all(row["text"] in texts and row["rewards"] == [[None, None]] for row in kept)
    assert not (root / "diverged" / "summary.json").exists()


def test_kl_and_several_updates_and_microbatches_run(root):
    rlp = RLPConfig(
        group_size=2, thought_tokens=3, positions=2, kl_coefficient=0.1, updates_per_batch=2, microbatches=2
    )
    train(tiny_config(root, steps=2, rlp=rlp), root / "kl", Console(file=io.StringIO()))
    first, second = rows(root / "kl", "metrics.jsonl")
    assert first["kl"] > 0 and second["kl"] > 0 and second["learning_rate"] == pytest.approx(1e-2)


def test_two_processes_cannot_share_a_run_directory(tmp_path):
    with (
        only_process(tmp_path),
        pytest.raises(ConfigError, match="in use by another process"),
        only_process(tmp_path),
    ):
        pass
    with only_process(tmp_path):
        pass


def test_warnings_are_recorded_at_every_step_and_said_once(tmp_path):
    out, progress = io.StringIO(), Progress()
    lengths = [40.0] * 5 + [8.0, 8.0, 40.0, 8.0]
    with RunLog(tmp_path, 9, console=Console(file=out)) as log:
        found = [
            watch(progress, {"step": n, "finite": 1.0, "thought_len": length, "stop_rate": 0.5}, 1, log)["warnings"]
            for n, length in enumerate(lengths, start=1)
        ]
    assert [len(warnings) for warnings in found] == [0] * 5 + [1, 1, 0, 1]
    assert out.getvalue().count("thoughts have shrunk to 8.0 tokens from 40.0") == 2


def test_progress_survives_json():
    progress = Progress(skipped=2, warned=["stop_rate"], evaluations={"before": {"gain": 0.5}})
    progress.start = progress.start.add(3.0, 0.5)
    assert Progress.from_json(json.loads(json.dumps(dataclasses.asdict(progress)))) == progress


@pytest.mark.slow
def test_a_checkpoint_of_one_device_goes_on_on_eight_and_back(root, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "6")
    one = next_step(root, run_dir, MeshConfig())
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(TESTS)!r})
import numpy as np
from next_step import next_step
from rlp_jax.config import MeshConfig
root, run_dir = pathlib.Path({str(root)!r}), pathlib.Path({str(run_dir)!r})
values = next_step(root, run_dir, MeshConfig(data=2, fsdp=2, tensor=2), save=True)
np.savez({str(tmp_path / "eight.npz")!r}, **values)
"""
    env = os.environ | simulated() | {name: str(value) for name, value in compilation(root / "cache").items()}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    eight = dict(np.load(tmp_path / "eight.npz"))
    assert one.keys() == eight.keys() and len(one) > 80
    for name in one:
        if name.startswith(("before", "exact")):  # the state as restored; prompts, positions, keys and thoughts
            np.testing.assert_array_equal(eight[name], one[name], err_msg=name)
        elif name.startswith("value"):  # rewards and metrics: float32 sums in another order
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    back = next_step(root, run_dir, MeshConfig())
    assert back["exact step"] == 5
    for name in (name for name in one if name.startswith("before")):
        np.testing.assert_array_equal(back[name], eight[name.replace("before", "after")], err_msg=name)


@pytest.mark.slow
def test_eight_devices_train_like_one(root, whole):
    run_dir = root / "eight"
    config = "tiny_config(root, mesh=MeshConfig(data=2, fsdp=2, tensor=2))"
    done = in_a_process(root, run_dir, "", config, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert from_json((run_dir / "config.json").read_text(), "").mesh == MeshConfig(data=2, fsdp=2, tensor=2)
    one, eight = untimed(whole[0]), untimed(run_dir)
    for name in ("reward_mean", "s_ema", "entropy", "grad_norm"):
        np.testing.assert_allclose(eight[0][name], one[0][name], rtol=1e-4, err_msg=name)
    assert [row["step"] for row in eight] == [row["step"] for row in one]


def test_documents_are_recorded_before_and_after_and_by_a_command_the_same(root):
    config = tiny_config(root, steps=2, report=ReportConfig(documents=3, positions=4, group_size=2))
    run_dir = root / "documents"
    train(config, run_dir, Console(file=io.StringIO()))
    recorded = rows(run_dir, "documents.jsonl")
    assert [row["step"] for row in recorded] == [0] * 3 + [2] * 3
    assert [row["document"] for row in recorded[:3]] == [row["document"] for row in recorded[3:]]
    assert all(is_document(row) and len(row["position"]) == 4 for row in recorded)

    def moved(row):
        return any(np.any(thought["ratio_ema"]) for group in row["thoughts"] for thought in group)

    assert [moved(row) for row in recorded] == [False] * 3 + [True] * 3
    assert "Thinking, token by token" in (run_dir / "report.html").read_text(encoding="utf-8")
    # A thought is its document's, its position's and its number's: other positions change none of them.
    assert cli.main(["report", str(run_dir), "--documents", "2", "--positions", "3", "--thoughts", "2"]) == 0
    again = rows(run_dir, "documents.jsonl")
    assert [row["step"] for row in again] == [0] * 2 + [2] * 2
    for old, new in zip(recorded[:2] + recorded[3:5], again, strict=True):
        assert (old["document"], old["tokens"]) == (new["document"], new["tokens"]) and len(new["position"]) == 3
        for ends in (0, -1):
            assert old["position"][ends] == new["position"][ends]
            assert old["gain"][ends] == pytest.approx(new["gain"][ends], abs=2e-3)


def test_a_run_over_a_mixture_stops_resumes_and_lists_what_it_left_out(root):
    config = tiny_config(root, steps=4)
    place = root / "mixed"
    place.mkdir()
    (place / "more.jsonl").write_text((root / "documents.jsonl").read_text() + "broken\n")
    data = dataclasses.replace(
        config.data, sources=(*config.data.sources, str(place / "more.jsonl")), weights=(3.0, 1.0), malformed="skip"
    )
    config = dataclasses.replace(config, data=data)
    cached = dataclasses.replace(data, cache=str(place / "cache"), workers=1, prefetch=2)
    out = io.StringIO()
    train(config, place / "whole", Console(file=out))
    train(dataclasses.replace(config, data=cached, steps=2), place / "parts")
    train(config, place / "parts")  # two steps later, from the cache to memory
    assert untimed(place / "whole") == untimed(place / "parts")
    assert "data: the loader gives" in out.getvalue() and "the step takes" in out.getvalue()
    listed = rows(place / "whole", "filtered.jsonl")
    assert listed == rows(place / "parts", "filtered.jsonl")
    assert [e["place"] for e in listed if e["reason"] == "malformed"] == [f"{place / 'more.jsonl'}:61"]
    last = rows(place / "whole", "metrics.jsonl")[-1]
    assert last["step_documents_per_s"] > 0 and last["loader_documents_per_s"] > 0
