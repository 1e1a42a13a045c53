# SPDX-License-Identifier: Apache-2.0
"""The study of real models: its commands are ones that `rlp` takes, what waits for what, and its table."""

import pytest

from experiments.real import drive, study, table
from experiments.real.study import CORPORA, MODELS, RATES, Run
from rlp_jax.cli import parser
from rlp_jax.settings import load_experiment, validate

EVALUATION = {
    "gain": -0.25, "gain_ci95": [-0.5, 0.125], "gain_empty": -0.0625, "gain_shuffled": -0.125,
    "ce_no_think_policy": 2.5, "ce_think": 2.75,
}  # fmt: skip


def result(run: Run, loss: float = 2.5, evaluated: bool = True) -> dict:
    found = {"name": run.name, "model": run.model, "corpus": run.corpus, "arm": run.arm}
    if run.arm != "base":
        after = EVALUATION | {"ce_no_think_policy": loss}
        found |= {"training": {"before": EVALUATION | {"gain": -1.0}, "after": after}, "learning_rate": 1e-5}
        found |= {"input_tokens": 12_000, "sampled_tokens": 0}
    if evaluated:
        found |= {"gsm8k": {"greedy": 12.5, "problems": 128}, "perplexity": {"ppl_no_think_policy": 20.0}}
    return found


@pytest.mark.parametrize("run", study.runs(), ids=lambda run: run.name)
def test_commands_are_ones_that_rlp_takes(run, tmp_path):
    commands = list(drive.eval_commands(run, "model", tmp_path, tmp_path / "out").values())
    if run.arm != "base":
        commands.append(drive.train_command(run, tmp_path / run.name, run.rate or 1e-5))
    for command in commands:
        parser().parse_args(command)
    trained = load_experiment(str(drive.STUDY), [f"model={run.model}", f"corpus={run.corpus}"])
    validate(trained)
    assert (trained.model, trained.steps) == (MODELS[run.model], study.STEPS[run.model])
    asked = load_experiment(str(drive.STUDY.with_name(f"{run.corpus}.py")))
    assert (asked.template, asked.rlp.horizon) == (trained.template, trained.rlp.horizon)


def test_a_base_answers_once_whatever_the_text(tmp_path):
    bases = [
        drive.eval_commands(Run("smollm2", corpus, "base"), "m", tmp_path, tmp_path / corpus) for corpus in CORPORA
    ]
    of_task = {task: [parser().parse_args(commands[task]).out for commands in bases] for task in bases[0]}
    assert of_task == {"gsm8k": [tmp_path / "smollm2--base"] * 2, "perplexity": [tmp_path / name for name in CORPORA]}


def test_the_best_rate_is_that_of_the_lowest_loss_of_a_whole_sweep(tmp_path):
    sweep = [Run("smollm2", "gsm8k", "cpt_tokens", rate) for rate in RATES]
    for run, loss in zip(sweep, (2.5, 2.25, 2.75), strict=True):
        assert drive.best_rate(run, tmp_path) is None
        drive.write(drive.result_path(tmp_path, run), result(run, loss))
    assert drive.best_rate(Run("smollm2", "gsm8k", "cpt_flops"), tmp_path) == RATES[1]
    assert drive.best_rate(Run("gemma3", "gsm8k", "cpt_flops"), tmp_path) is None


def test_a_rival_waits_for_the_run_it_is_matched_to(tmp_path):
    for arm, rate in (("cpt_tokens", 1e-5), ("cpt_flops", None)):
        assert drive.make(Run("smollm2", "gsm8k", arm, rate), tmp_path, tmp_path / "work", tmp_path) is None
    assert not (tmp_path / "work").exists()


def test_a_command_that_fails_is_reported_by_its_last_line(tmp_path, capsys, monkeypatch):
    run = Run("smollm2", "gsm8k", "base")
    monkeypatch.setattr(drive, "eval_commands", lambda *args: {"gsm8k": ["eval", "nowhere", "--tasks", "gsm8k"]})
    assert drive.drive([run], tmp_path, tmp_path / "work", tmp_path / "results", float("inf")) == 1
    assert "smollm2--gsm8k--base: failed: rlp eval ended with 2: rlp: error:" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_missing_text_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RLP_DATA", str(tmp_path))
    assert drive.main(["--only", "smollm2--*"]) == 2
    assert "gsm8k_test.jsonl: RLP_DATA names the folder" in capsys.readouterr().err
    assert drive.main(["--only", "nothing"]) == 2
    assert "no run matches" in capsys.readouterr().err


def test_table(tmp_path):
    for model in MODELS:
        for run in [r for r in study.runs() if r.model == model and r.corpus == CORPORA[0]]:
            best = run.rate in (None, RATES[2])
            drive.write(drive.result_path(tmp_path, run), result(run, 2.25 if best else 2.5, best))
    text = table.table(tmp_path)
    rows = {tuple(line.split(" | ")[:3]): line for line in text.splitlines()}
    assert len(text.split("\n\n")[0].splitlines()) == 2 + 2 * 4
    base = rows[("| smollm2", "gsm8k", "base")]
    assert (
        "| – | – | – | −1.000 [−0.500, +0.125] | −0.062 | −0.125 | 2.500 | 2.750 | 20.00 | 12.5 [7.8, 19.3] |" in base
    )
    assert "| 12,000 | 0 | −0.250 [−0.500, +0.125] | " in rows[("| smollm2", "gsm8k", "CPT, same tokens")]
    assert f"| smollm2 | {CORPORA[0]} | 2.500 | 2.500 | 2.250 |" in table.sweeps(tmp_path)


def test_interval_of_a_share():
    low, high = table.wilson(0.0, 100)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.0370, abs=1e-4)  # z²/(n + z²)
