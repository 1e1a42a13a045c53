# SPDX-License-Identifier: Apache-2.0
"""The study of real models: its commands are ones that `rlp` takes, what waits for what, and its table."""

import json

import pytest

from experiments.real import drive, study, table
from experiments.real.study import CORPORA, MODELS, RATES, Run
from rlp_jax.cli import parser
from rlp_jax.settings import load_experiment, validate

pytestmark = pytest.mark.slow


def gain_of(gain: float) -> dict:
    """What `rlp eval --tasks gain` gives, as far as it is shown."""
    parts = {"gain": gain, "format": -0.25, "drift": 0.0625, "generic": 0.125, "content": gain + 0.125}
    found = {
        name: value for part, mean in parts.items() for name, value in ((part, mean), (f"{part}_ci95", [-1.0, 0.5]))
    }
    fifth = {"gain": gain, "gain_ci95": [-0.5, 0.125]}
    return found | {
        "ce_think": 2.5 - gain, "ce_no_think_policy": 2.5, "thought_len": 12.5, "alarms": {"empty_thoughts": "..."},
        "warnings": [{"kind": "never_closed"}], "where": {"entropy": [fifth] * 3},
        "probes": {"quotes": {"target": {"own": 0.25, "shuffled": 0.125}}},
    }  # fmt: skip


def result(run: Run, loss: float = 2.5, gain: float = -0.25, evaluated: bool = True) -> dict:
    found = {"name": run.name, "model": run.model, "corpus": run.corpus, "arm": run.arm}
    if run.arm != "base":
        found |= {"learning_rate": run.rate or 1e-5, "steps": 4, "input_tokens": 12_000, "sampled_tokens": 0}
    if run.match:
        found |= {"late_loss": loss, "budget": {"run": run.rlp, "flops": 2.5e12, "rlp_flops": 9e12}}
    if evaluated:
        figures = {
            "gain": gain_of(gain),
            "gsm8k": {"greedy": 12.5, "problems": 128},
            "perplexity": {"ce_no_think_policy": 3.0, "ce_think": 3.25},
        }
        found |= {task: figures[task] for task in drive.tasks(run)}
        found["held_out"] = {"document": [1, 2, 3], "think": [2.0, 2.25, 2.5 + gain], "no_think": [2.5, 2.25, 2.75]}
    return found


@pytest.mark.parametrize("run", study.runs(), ids=lambda run: run.name)
def test_commands_are_ones_that_rlp_takes(run, tmp_path):
    evaluations = drive.eval_commands(run, "model", tmp_path, tmp_path / "out")
    assert tuple(evaluations) == (("gain",) if "--rlp--" in run.name else drive.TASKS)
    commands = list(evaluations.values())
    if run.arm != "base":
        rate = run.rate or (3e-5 if run.match else None)
        commands.append(drive.train_command(run, tmp_path / run.name, rate))
        assert commands[-1].count(f"optimizer.learning_rate={rate}") == (rate is not None)
    for command in commands:
        parser().parse_args(command)
    trained = load_experiment(str(drive.STUDY), [f"model={run.model}", f"corpus={run.corpus}"])
    validate(trained)
    assert (trained.model, trained.steps) == (MODELS[run.model], study.STEPS[run.model])
    asked = load_experiment(str(drive.STUDY.with_name(f"{run.corpus}.py")))
    assert (asked.template, asked.rlp.horizon) == (trained.template, trained.rlp.horizon)


def test_a_base_answers_once_whatever_the_text(tmp_path, monkeypatch):
    bases = [Run("smollm2", corpus, "base") for corpus in CORPORA]
    drive.keep(tmp_path, bases[0], {"gsm8k": {"greedy": 12.5}})
    asked = []

    def call(command: list[str], log) -> str:
        asked.append(parser().parse_args(command).tasks)
        return json.dumps({"tasks": {asked[-1]: {}}})

    monkeypatch.setattr(drive, "call", call)
    monkeypatch.setattr(drive, "held_out", lambda records: {})
    assert drive.make(bases[1], tmp_path, tmp_path / "work", tmp_path) == "made"
    assert asked == ["gain", "perplexity"]
    made = drive.read(drive.result_path(tmp_path, bases[1]))
    assert drive.complete(bases[1], made) and made["gsm8k"] == {"greedy": 12.5} and made["arm"] == "base"


def test_late_loss_is_of_the_second_half_of_the_steps():
    assert drive.late_loss([{"loss": loss} for loss in (9.0, 8.0, 3.0, 2.0, 1.0)]) == 2.0


def test_held_out_documents_are_read_from_the_records(tmp_path):
    rows = [
        {"document": 7, "ce_think": [[1.0, 2.0], [3.0, 4.0]], "ce_no_think_policy": [1.0, 1.5]},
        {"document": 5, "ce_think": [[0.5, 0.5], [0.0, 0.0]], "ce_no_think_policy": [0.25, 0.25]},
    ]
    file = tmp_path / "gain.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"settings": {}}, *rows)))
    assert drive.held_out(file) == {"document": [7, 5], "think": [2.5, 0.25], "no_think": [1.25, 0.25]}


def test_the_best_rate_is_that_of_the_lowest_loss_of_a_whole_sweep(tmp_path):
    sweep = [Run("smollm2", "gsm8k", "cpt_tokens", rate) for rate in RATES]
    for run, loss in zip(sweep, (2.5, 2.25, 2.75), strict=True):
        assert drive.best_rate(run, tmp_path) is None
        drive.keep(tmp_path, run, result(run, loss))
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


def test_report(tmp_path):
    for run in [run for run in study.runs() if run.model == "gemma3" or run.corpus == "gsm8k"]:
        best = not run.swept or run.rate == RATES[2]
        gain = -0.5 if run.arm == "base" else -0.25
        drive.keep(tmp_path, run, result(run, 2.25 if best else 2.5, gain, best))
    drive.keep(tmp_path, Run("smollm2", CORPORA[1], "base"), {"arm": "base", "gain": gain_of(0.0)})
    text = table.report(tmp_path, "said in words\n")
    assert text.startswith("# Real models, real text\n\nsaid in words\n\n## The arms\n\n")
    compared, against, split, entropy, sweep = (part for part in text.split("\n\n") if part.startswith("| "))
    further = len(study.FURTHER["smollm2"]) + 2 * len(study.FURTHER["gemma3"])
    arms = 3 * 4 + further
    assert len(compared.splitlines()) == len(split.splitlines()) == len(entropy.splitlines()) == 2 + arms
    assert "| smollm2 | gsm8k | base | – | – | – | – | 2.500 | 3.000 | 3.000 | 3.250 | 12.5 [7.8, 19.3] |" in compared
    assert "| smollm2 | gsm8k | CPT, same tokens | 0.0001 | 12,000 | 0 | 2.5 | 2.500 | 2.750 |" in compared
    assert "| smollm2 | gsm8k | RLP | 1e-05 | 12,000 | 0 | 9.0 | 2.500 |" in compared
    assert "| gemma3 | encyclopedia | RLP at 3e-06 | 3e-06 | 12,000 | 0 | – | 2.500 | 2.750 | – | – | – |" in compared
    # RLP thinking: 2.5, 2.25, 2.75 against 2.0, 2.25, 2.25, so ahead by 0.5, 0.0 and 0.5, standard error 1/6
    half = 4.303 / 6
    ahead = f"+0.333 [−{half - 1 / 3:.3f}, +{half + 1 / 3:.3f}]"
    for rlp in ("smollm2 | gsm8k | RLP", "gemma3 | encyclopedia | RLP at 3e-06"):
        assert f"| {rlp} | base | 0.000 [0.000, 0.000] | {ahead} |" in against
    assert len(against.splitlines()) == 2 + 3 * (3 + further)
    parts = [f"{mean} [−1.000, +0.500]" for mean in ("−0.500", "−0.250", "+0.062", "+0.125", "−0.375")]
    assert f"| {' | '.join(parts)} |" in split
    assert "| 12.5 | 25% / 12% | empty_thoughts, never_closed |" in split
    assert entropy.splitlines()[-1].endswith("| −0.250 [−0.500, +0.125] | – | – |")
    assert f"| smollm2 | {CORPORA[0]} | 2.500 | 2.500 | 2.250 |" in sweep


def test_interval_of_a_share():
    low, high = table.wilson(0.0, 100)
    assert low == 0 and high == pytest.approx(0.0370, abs=1e-4)  # z²/(n + z²)


def test_the_report_is_what_the_results_give(tmp_path, capsys):
    assert table.main(["--check"]) == 0, capsys.readouterr().err
    out = tmp_path / "RESULTS.md"
    assert table.main(["--check", "--out", str(out)]) == 1
    assert f"{out} is not current: run python -m experiments.real.table" in capsys.readouterr().err
    assert table.main(["--out", str(out)]) == table.main(["--check", "--out", str(out)]) == 0
    assert table.main(["--results", str(tmp_path)]) == 2
    assert f"no results in {tmp_path}" in capsys.readouterr().err
