# SPDX-License-Identifier: Apache-2.0
"""The study's statistics and verdicts, against numbers worked out by hand."""

import json
import math

import pytest
from written import write

from experiments.paper import before, cells, ordering, results, split
from experiments.paper.domains import BENCHMARKS
from experiments.paper.intervals import Interval, mean, paired
from experiments.paper.table4 import corpora


def test_interval_is_students():
    # Deviations −1, 0, 1: standard deviation 1; t with 2 degrees of freedom 4.303; 4.303 / √3 = 2.4843.
    found = mean([4.0, 5.0, 6.0])
    assert found == (5.0, pytest.approx(2.4843, abs=1e-4), 3)
    assert (found.low, found.high) == pytest.approx((2.5157, 7.4843), abs=1e-4)
    # Two values 2 apart: standard deviation √2, so that the half width is t itself.
    assert mean([1.0, 3.0]).half == pytest.approx(12.706)
    assert mean([7.0]) == (7.0, None, 1) and mean([]) is None
    assert mean([1.0] * 30).half == 0


def test_differences_are_paired_by_seed():
    # 3 − 1, 5 − 2 and 8 − 4 are 2, 3, 4; seed 9 has no partner. Unpaired, the interval would be wider.
    found = paired({1: 3.0, 2: 5.0, 3: 8.0, 9: 100.0}, {3: 4.0, 2: 2.0, 1: 1.0})
    assert found == (3.0, pytest.approx(4.303 / math.sqrt(3)), 3)
    assert paired({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    "ours, sign, said",
    [
        (Interval(2.0, 1.0, 3), 1, ordering.AGREES),
        (Interval(2.0, 2.0, 3), 1, ordering.UNDECIDED),
        (Interval(-2.0, 1.0, 3), 1, ordering.REVERSED),
        (Interval(-2.0, 1.0, 3), -1, ordering.AGREES),
        (Interval(0.0, 0.0, 3), 1, ordering.EQUAL),
        (Interval(2.0, None, 1), 1, ordering.ONE_SEED),
        (None, 1, ordering.NO_RUNS),
    ],
)
def test_verdicts(ours, sign, said):
    assert ordering.verdict(ours, sign) == said


@pytest.mark.parametrize(
    "ours, margin, said",
    [
        (Interval(0.5, 1.0, 3), 2.0, "agrees: within ±2.0"),
        (Interval(0.5, 2.0, 3), 2.0, "undecided: not within ±2.0"),
        (Interval(5.0, 1.0, 3), 2.0, "differs: beyond ±2.0"),
        (Interval(0.0, 0.0, 3), 2.0, "agrees"),
        (Interval(0.5, 1.0, 3), None, "undecided: no step before the plateau"),
    ],
)
def test_a_plateau_agrees_only_within_half_of_the_step_before(ours, margin, said):
    assert ordering.verdict(ours, 0, margin) == said


def test_overall_weighs_the_two_averages_alike(tmp_path):
    # Mathematics (0.2 + 0.4) / 2 = 0.3; reasoning (0.6 + 0.9 + 0.9) / 3 = 0.8; Overall 0.55, not the mean of five.
    right = dict(zip(BENCHMARKS, (0.2, 0.4, 0.6, 0.9, 0.9), strict=True))
    scores = {name: {"pass1": share, "greedy": 0.5} for name, share in right.items()}
    write(tmp_path, "rlp", 1, 0.0, scores=scores)
    (record,) = results.load(tmp_path)
    assert results.overall(record) == pytest.approx(0.55)
    assert results.overall(record, "greedy") == 0.5
    assert results.overall(record, "plain") is None  # not examined that way
    assert results.standard_error(record) is None


def test_the_standard_error_of_overall(tmp_path):
    # Each benchmark's is 0.01; weights 1/4, 1/4 and three times 1/6: 0.01 × √(2/16 + 3/36).
    write(tmp_path, "rlp", 1, 0.5)
    (record,) = results.load(tmp_path)
    assert results.standard_error(record) == pytest.approx(0.01 * math.sqrt(5 / 24))


def test_every_comparison_takes_the_right_runs(tmp_path):
    write(tmp_path, "base", 0, 0.10)
    write(tmp_path, "base", 0, 0.05, base="hybrid")
    for seed, share in ((1, 0.50), (2, 0.60), (3, 0.70)):
        write(tmp_path, "rlp", seed, share)
        write(tmp_path, "cpt_tokens", seed, share - 0.20)
        write(tmp_path, "rlp", seed, share - 0.02 * seed, axis="rollouts", value=4)
        write(tmp_path, "rlp", seed, share - 0.10, axis="thought_tokens", value=8)
        write(tmp_path, "rlp", seed, share, axis="thought_tokens", value=32)
        write(tmp_path, "rlp", seed, share, axis="tau", value=0.99)
        write(tmp_path, "rlp", seed, share + 0.10, axis="kl", value=0.001)
        write(tmp_path, "rlp", seed, share, axis="corpus", value="story")
        write(tmp_path, "rlp", seed, share + 0.05, base="hybrid")
        write(tmp_path, "cpt_tokens", seed, share, base="hybrid")
        write(tmp_path, "rlp", seed, share, base="hybrid", stage="rlvr")
        write(tmp_path, "base", seed, share - 0.03, base="hybrid", stage="rlvr")
        for stage, less in (("sft", 0.3), ("rlvr", 0.01 * (seed - 2))):
            write(tmp_path, "rlp", seed, share, stage=stage)
            write(tmp_path, "base", seed, share - less, stage=stage)
    write(tmp_path, "rlp", 0, 0.99, sweep=True, chosen=True)
    records = results.load(tmp_path)
    found = {item.claim: item for item in ordering.comparisons(records)}

    def ours(claim):
        return found[claim].ours

    assert ours("RLP > base") == pytest.approx({1: 40, 2: 50, 3: 60})
    assert ours("CPT, same tokens > base") == pytest.approx({1: 20, 2: 30, 3: 40})
    assert ours("RLP > CPT, same tokens") == pytest.approx({1: 20, 2: 20, 3: 20})
    assert ours("RLP > base, after SFT + RLVR") == pytest.approx({1: -1, 2: 0, 3: 1})
    assert ours("G 16 > G 4") == pytest.approx({1: 2, 2: 4, 3: 6})
    assert ours("cap L 16 > 8") == pytest.approx({1: 10, 2: 10, 3: 10})
    assert ours("β 0 > β 0.001") == pytest.approx({1: -10, 2: -10, 3: -10})
    assert ours("τ 0.999 > τ 0.99") == {1: 0, 2: 0, 3: 0}
    assert ours("RLP on story > CPT, same tokens, on mix") == pytest.approx({1: 20, 2: 20, 3: 20})
    assert ours("hybrid: RLP > base") == pytest.approx({1: 50, 2: 60, 3: 70})
    assert ours("hybrid: RLP > CPT, same tokens") == pytest.approx({1: 5, 2: 5, 3: 5})
    assert ours("hybrid: RLP > base, after SFT + RLVR") == pytest.approx({1: 3, 2: 3, 3: 3})
    assert ours("RLP over base: hybrid > decoder") == pytest.approx({1: 10, 2: 10, 3: 10})
    assert ours("G 16 > G 8") == {} and ours("RLP > RPT, same FLOPs") == {}
    plateau = found["plateau: cap L 32 ≈ 16"]
    assert (plateau.sign, plateau.margin) == (0, pytest.approx(5)) and plateau.ours == {1: 0, 2: 0, 3: 0}
    # The paper's own differences, from its tables.
    assert found["RLP > base"].paper == "+5.71" and found["RLP > base, after SFT + RLVR"].paper == "+3.17"
    assert found["RLP > RPT, same FLOPs"].paper == "+7.18" and found["β 0 > β 0.001"].paper == "+0.73"
    assert found["RLP > CPT, same FLOPs"].paper == "+3.39 or more"
    assert found["RLP over base: hybrid > decoder"].paper == "+12.80"
    assert found["hybrid: RLP > base, after SFT + RLVR"].paper == "+2.78"

    rows = [line for line in ordering.text(records).splitlines() if line.startswith("| ")]
    said = {row.split(" | ")[0].strip("| "): row.split(" | ")[-1].strip("| ") for row in rows}
    assert said["RLP > base"] == "agrees"  # 50 ± 24.8
    assert said["RLP > base, after SFT + RLVR"] == ordering.UNDECIDED  # 0 ± 2.5
    assert said["G 16 > G 4"] == ordering.UNDECIDED  # 4 ± 4.97
    assert said["β 0 > β 0.001"] == "reversed" and said["τ 0.999 > τ 0.99"] == ordering.EQUAL
    assert said["G 16 > G 8"] == "no runs yet" and corpora(records) == ["story", "mix"]


def test_parts_add_up_to_the_gain():
    found = split.parts({"gain": 0.5, "gain_empty": 0.1, "gain_shuffled": -0.05})
    assert found == pytest.approx({"gain": 0.5, "format": 0.1, "generic": -0.15, "content": 0.55})
    assert found["format"] + found["generic"] + found["content"] == pytest.approx(found["gain"])
    assert split.parts({"gain": 0.5}) == {}


def test_figures_as_text():
    assert cells.figure(-0.04) == "0.0" and cells.figure(-0.06) == "−0.1" and cells.figure(0.0, sign=True) == "0.0"
    assert cells.interval(Interval(60.0, 24.84, 3)) == "60.0 ± 24.8" and cells.interval(None) == "–"
    assert cells.bounds(Interval(2.0, 3.0, 3)) == "+2.0 [−1.0, +5.0]"


@pytest.mark.parametrize("change", [{"arm": "rlpp"}, {"base": "encoder"}, {"stage": "dpo"}, {"axis": "width"}])
def test_a_result_of_another_kind_is_refused(tmp_path, change):
    (name,) = change
    write(tmp_path, **({"arm": "rlp", "seed": 1, "share": 0.5} | change))
    with pytest.raises(results.ResultError, match=f"{name} '{change[name]}' is none of"):
        results.load(tmp_path)


def test_a_broken_result_is_refused(tmp_path):
    path = write(tmp_path, "rlp", 1, 0.5)
    raw = json.loads(path.read_text())
    del raw["seed"]
    path.write_text(json.dumps(raw))
    with pytest.raises(results.ResultError, match=r"seed1\.json: no result of the study, 'seed' is missing"):
        results.load(tmp_path)
    path.write_text("{")
    with pytest.raises(results.ResultError, match=r"seed1\.json"):
        results.load(tmp_path)


def test_a_cell_is_of_its_own_runs_alone(tmp_path):
    write(tmp_path, "rlp", 2, 0.5)
    write(tmp_path, "rlp", 1, 0.5)
    write(tmp_path, "rlp", 1, 0.5, stage="sft")
    write(tmp_path, "rlp", 1, 0.5, axis="kl", value=0.001)
    write(tmp_path, "rlp", 0, 0.5, sweep=True)
    records = results.load(tmp_path)
    assert len(records) == 5
    assert [run.seed for run in results.select(records, "rlp")] == [1, 2]
    assert [run.seed for run in cells.at(records, "kl", 0.001)] == [1] and len(cells.at(records, "kl", 0.0)) == 2
    assert cells.points(records, "kl") == [0.0, 0.001] and cells.points(records, "tau") == []


def test_the_table_of_abilities_has_a_row_for_each_base_and_benchmark_that_is_there():
    figures = {what: i / 10 for i, what in enumerate(before.COLUMNS.values())}
    lines = before.abilities_table({"decoder": dict.fromkeys(BENCHMARKS, figures)}).splitlines()
    assert len(lines) == 2 + len(BENCHMARKS) + 2
    assert lines[2] == "| decoder | arithmetic | 0.0 | 10.0 | 20.0 | 30.0 | 40.0 | 50.0 | 60.0 |"
