# SPDX-License-Identifier: Apache-2.0
"""The driver on a study of five runs: results, resuming after a kill, what it refuses and how it fails."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_study
from tiny_run import compilation

from experiments.paper import drive, outcome, prepare
from experiments.paper.processes import Failed, Finished
from experiments.paper.study import Study
from rlp_jax.settings import from_json
from rlp_jax.train import LOCK

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIMES = ("resumed", "seconds", "first_step_seconds", "wall_seconds", "processor_seconds", "examination_seconds")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For the processes that the driver starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compilation(tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, str(value))
        yield


@pytest.fixture(scope="module")
def made(environment, tmp_path_factory):
    """Work and results of a whole study."""
    root = tmp_path_factory.mktemp("paper")
    (root / "work").mkdir()
    tiny_study.prepare(root / "work")
    assert drive.main(arguments(root), tiny_study.tiny_study()) == 0
    return root


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def arguments(root, *more):
    return ["--work", str(root / "work"), "--results", str(root / "results"), *more]


def result(root, name):
    return json.loads((root / "results" / f"{name}.json").read_text())


def untimed(found):
    return found | {"compute": {name: value for name, value in found["compute"].items() if name not in TIMES}}


def test_every_run_leaves_a_result(made):
    study = tiny_study.tiny_study()
    names = sorted(path.stem for path in (made / "results").iterdir())
    assert names == sorted(run.name for run in study.runs)
    base, *sweep, rlp, cpt = (result(made, run.name) for run in study.runs)
    assert (base["arm"], base["seed"], base["evaluation"], base["sweep"]) == ("base", 0, {}, False)
    assert set(base["scores"]) == set(rlp["scores"]) == set(sweep[0]["validation"])
    assert base["validation"] == sweep[0]["scores"] == {}
    assert set(rlp["evaluation"]) == {"before", "after"} and "gain_shuffled" in rlp["evaluation"]["after"]
    (chosen,) = [found for found in sweep if found["chosen"]]
    assert rlp["settings"]["learning_rate"] == cpt["settings"]["learning_rate"]
    assert rlp["settings"]["learning_rate"] == chosen["settings"]["learning_rate"]
    assert rlp["fingerprints"]["start"] == base["fingerprints"]["weights"] == cpt["fingerprints"]["base_weights"]
    assert rlp["fingerprints"]["weights"] != base["fingerprints"]["weights"]
    assert rlp["settings"]["rlp.group_size"] == 2 and rlp["settings"]["start"] == "tiny"

    read, sampled = (rlp["compute"][name] for name in ("input_tokens", "sampled_tokens"))
    assert rlp["settings"]["steps"] == 2 and sampled > 0
    assert cpt["settings"]["match_run"] == rlp["name"] and cpt["budget"]["rlp_thought_tokens"] == pytest.approx(sampled)
    assert cpt["settings"]["steps"] == round(2 * (read + sampled) / read)
    assert cpt["compute"]["flops"] == cpt["budget"]["flops"] > 0 and "sampled_tokens" not in cpt["compute"]
    assert not list((made / "work" / "runs").glob("*/checkpoints"))


def test_nothing_is_made_twice(copy, capsys):
    before = {path: path.read_bytes() for path in (copy / "results").iterdir()}
    assert drive.main(arguments(copy), tiny_study.tiny_study()) == 0
    assert "begun" not in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (copy / "results").iterdir()} == before


def test_killed_and_resumed_it_gives_the_same_result(made, copy, environment, capsys):
    """A run is to be made whose parent has its result but no longer what others need of it; while that is made again
    the driver is killed outright, and its process with it."""
    rlp, cpt = (run.name for run in tiny_study.tiny_study().runs[3:])
    (copy / "results" / f"{cpt}.json").unlink()
    for path in (copy / "work" / place / name for place in ("runs", "weights") for name in (rlp, cpt)):
        shutil.rmtree(path)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    driver = subprocess.Popen(
        [sys.executable, tiny_study.__file__, *arguments(copy, "--only", cpt)],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    started, until = copy / "work" / "runs" / rlp / "config.json", time.monotonic() + 120
    while not started.is_file():
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    if shutil.which("setpriv") is None:
        pytest.skip("without setpriv the training goes on, and holds its directory")
    with open(started.parent / LOCK, "a") as lock:  # as long as the process takes to end
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert drive.main(arguments(copy), tiny_study.tiny_study()) == 0
    assert f"{rlp}: made again, as others start from it" in capsys.readouterr().out
    assert result(copy, rlp) == result(made, rlp)
    assert untimed(result(copy, cpt)) == untimed(result(made, cpt))


def test_weights_that_cannot_be_made_again_are_not_passed_on(copy):
    """The run's process has ended with other weights than its result tells of."""
    study = tiny_study.tiny_study()
    run = study.runs[3]
    driver = drive.Driver(study, copy / "work", copy / "results")
    driver.results[run.name]["fingerprints"]["weights"] = "0" * 64
    job = driver.make_run(run)
    next(job)
    job.send(Finished(1.0, 1.0))
    with pytest.raises(Failed, match=r"made again, it has other weights than .*seed1\.json: remove that to go on here"):
        job.send(Finished(1.0, 1.0))
    assert not driver.made(run.name)


def changed(study, **changes):
    """The study with other settings of its fourth run."""
    run = study.runs[3]
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))
    return dataclasses.replace(study, runs=(*study.runs[:3], run, *study.runs[4:]))


def test_results_of_another_study_are_refused(copy, capsys):
    study = tiny_study.tiny_study()
    name = study.runs[3].name

    def refused(of=study):
        assert drive.main(arguments(copy, "--list"), of) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert f"{name}.json was made with other settings than the study has now: max_skipped, steps; remove it" in refused(
        changed(study, steps=3, max_skipped=7)
    )
    assert "settings than the study has now: problems" in refused(dataclasses.replace(study, problems=3))
    file = copy / "results" / f"{name}.json"
    whole = result(copy, name)
    for kind, words in (("data", "other data than"), ("base_weights", "other base weights than")):
        changed_prints = whole["fingerprints"] | {kind: "0" * 64}
        file.write_text(json.dumps(whole | {"fingerprints": changed_prints}))
        assert f"{name}.json was made with {words} {copy}" in refused()
    shutil.rmtree(copy / "work" / "bases")  # then the results have to agree among themselves
    assert "other base weights than" in refused()
    file.write_text(json.dumps(whole))
    (copy / "results" / "stray.json").write_text(json.dumps(whole))
    assert "stray.json: the study has no run of this name" in refused()
    (copy / "results" / "stray.json").write_text("{")
    assert "stray.json is no result of the study" in refused()


def test_a_rate_that_is_no_longer_the_best_is_refused(copy, capsys):
    study = tiny_study.tiny_study()
    for run in study.runs[1:3]:
        found = result(copy, run.name)
        for values in found["validation"].values():
            values["pass1"] = 0.1 if found["chosen"] else 0.9
        outcome.write(copy / "results" / f"{run.name}.json", found)
    assert drive.main(arguments(copy, "--list"), study) == 2
    assert "other settings than the study has now: learning_rate" in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(made, tmp_path, environment, capsys):
    shutil.copytree(made / "work", tmp_path / "work")
    base = tiny_study.tiny_study().runs[0]
    study = Study((tiny_study.broken_run(), base), ("tiny",), problems=2)
    assert drive.main(arguments(tmp_path, "--workers", "1"), study) == 1
    out = capsys.readouterr().out
    assert "broken: failed: -m rlp_jax train ended with 2: rlp: error: batch_documents is 512 but" in out
    assert "failed: broken" in out.splitlines()[-1] and "1 of 2 runs have results" in out
    assert result(tmp_path, base.name)["scores"]
    assert json.loads((tmp_path / "work" / "failures.jsonl").read_text())["name"] == "broken"


def test_no_run_is_begun_when_time_is_up(made, tmp_path, capsys):
    shutil.copytree(made / "work", tmp_path / "work")
    assert drive.main(arguments(tmp_path, "--minutes", "0"), tiny_study.tiny_study()) == 0
    assert "0 of 5 runs have results" in capsys.readouterr().out


def test_only_and_list(copy, capsys):
    study = tiny_study.tiny_study()
    for path in (copy / "results").glob("*3e-05*"):
        path.unlink()
    assert drive.main(arguments(copy, "--list", "--only", "*rlp*"), study) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["tiny--sweep--rlp--3e-05", "ready"],
        ["tiny--sweep--rlp--0.0001", "done"],
        ["tiny--main--rlp--seed1", "done"],
    ]
    assert [run.arm for run in drive.select(study, "cpt*")] == ["cpt_flops"]  # a part of the name
    for bad in (["--only", "nothing"], ["--workers", "0"]):
        assert drive.main(arguments(copy, *bad), study) == 2
        assert bad[0] in capsys.readouterr().err


def test_two_drivers_in_one_place(copy, capsys):
    with drive.only_driver(copy / "work"):
        assert drive.main(arguments(copy), tiny_study.tiny_study()) == 2
    assert "in use by another driver" in capsys.readouterr().err


def test_a_rival_that_samples_names_the_run_that_tells_how_much(copy):
    """What the driver asks `rlp train` for, and the settings that it is given."""
    study = tiny_study.tiny_study()
    rlp, cpt = study.runs[3:]
    rpt = dataclasses.replace(cpt, name="rpt", arm="rpt_flops", rival_run=rlp.name)
    study = dataclasses.replace(study, runs=(*study.runs, rpt))
    driver = drive.Driver(study, copy / "work", copy / "results")
    asked, log = next(driver.make_run(rpt))
    assert log == "rpt" and " ".join(asked).startswith("-m rlp_jax train")
    assert " ".join(asked[-8:]) == (
        f"--run-dir runs/rpt --match flops --match-run runs/{rlp.name} --rival-run runs/{rlp.name}"
    )
    given = from_json((copy / "work" / "settings" / "rpt.json").read_text(), "")
    assert (given.model, given.algorithm) == ("bases/tiny", "cpt")


def test_kept_bases_are_copied_where_there_are_none(tmp_path):
    own = tmp_path / "bases" / "decoder_early" / "config.json"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    prepare.copy_bases(("decoder", "decoder_early", "unknown"), tmp_path / "bases")
    assert sorted(path.name for path in (tmp_path / "bases").iterdir()) == ["decoder", "decoder_early"]
    kept = prepare.KEPT / "decoder" / "model.safetensors"
    assert (tmp_path / "bases" / "decoder" / "model.safetensors").read_bytes() == kept.read_bytes()
    assert own.read_text() == "mine"
