# SPDX-License-Identifier: Apache-2.0
"""The study's report from result files written by hand: its cells, what is missing, and what --check sees."""

import math
import re
from xml.etree import ElementTree

import pytest
from written import EVALUATION, write

from experiments.paper import before, drawing, tables
from experiments.paper.figure2 import drawings
from experiments.paper.results import load

BEFORE = EVALUATION | {"gain": -0.2, "gain_empty": -0.3, "gain_shuffled": -0.6, "ce_think": 1.7}
SEEDS = ((1, 0.50), (2, 0.60), (3, 0.70))  # mean 60, half width 4.303 × 10 / √3 = 24.8


def some_results(folder):
    """Results of a few runs of every kind, most of the study missing."""
    folder.mkdir()
    write(folder, "base", 0, 0.10, evaluation={})
    for seed, share in SEEDS:
        write(folder, "rlp", seed, share, evaluation={"before": BEFORE, "after": EVALUATION})
        write(folder, "rlp", seed, share - 0.1, axis="rollouts", value=4)
        write(folder, "rlp", seed, share - 0.2, axis="kl", value=0.001)
        write(folder, "rlp", seed, share + (0.01 if seed == 3 else 0), axis="tau", value=0.99)
        write(folder, "rlp", seed, share, axis="corpus", value="story")
        write(folder, "rlp", seed, share + 0.1, base="decoder_late")
    write(folder, "base", 0, 0.2, base="decoder_late", evaluation={})
    matched = {"settings": {"learning_rate": 1e-4, "steps": 40, "match_run": "decoder--rlp--seed1"}}
    write(folder, "rpt_tokens", 1, 0.3, budget={"rlp_flops": 2.5e12}, **matched)
    write(folder, "rpt_tokens", 2, 0.3)
    write(folder, "rlp", 1, 0.9, stage="rlvr")
    for rate, share in ((1e-4, 0.41), (3e-4, 0.42)):
        rates = {"learning_rate": rate, "steps": 40}
        write(folder, "rlp", 0, share, sweep=True, chosen=rate == 3e-4, settings=rates)
    return folder


@pytest.fixture
def folder(tmp_path):
    return some_results(tmp_path / "results")


def run(folder, out, *more):
    return tables.main(["--results", str(folder), "--out", str(out), *more])


def section(text: str, title: str) -> list[list[str]]:
    """The cells of a section's first table, or its words where it has none."""
    body = text.split(f"## {title}", 1)[1].split("\n## ", 1)[0].partition("\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:2] == "| "]
    return rows or [[body.strip()]]


def row(rows: list[list[str]], *start: str) -> dict[str, str]:
    (found,) = [cells for cells in rows if tuple(cells[: len(start)]) == start]
    return dict(zip(rows[0], found, strict=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    assert run(some_results(path / "results"), path / "out") == 0
    return (path / "out" / "RESULTS.md").read_text()


def test_arms_and_missing_cells(text):
    rows = section(text, "Table 1")
    rlp = row(rows, "the arm", "RLP")
    assert (rlp["seeds"], rlp["Overall"], rlp["story"], rlp["the paper's Overall"]) == (
        "3", "60.0 ± 24.8", "60.0 ± 24.8", "36.03",
    )  # fmt: skip
    base = row(rows, "the arm", "base")
    assert (base["seeds"], base["Overall"], base["the paper's Overall"]) == ("1", "10.0", "30.32")
    after = row(rows, "+ SFT + RLVR", "RLP")
    assert (after["seeds"], after["Overall"], after["the paper's Overall"]) == ("1", "90.0", "42.51")
    assert base["SE over problems"] == "0.5"  # 100 × 0.01 × √(5 / 24)
    missing = row(rows, "the arm", "CPT, same FLOPs")
    assert set(missing.values()) == {"the arm", "CPT, same FLOPs", "–"}
    assert row(rows, "the arm", "RPT, same tokens")["seeds"] == "2"


def test_sections_without_runs_name_their_command(text):
    assert "`python -m experiments.paper.drive --only 'hybrid'`" in section(text, "Table 2")[0][0]
    assert "`python -m experiments.paper.drive --only 'horizon'`" in section(text, "Horizon")[0][0]


def test_rpt_is_compared_over_the_seeds_it_has(text):
    found = row(section(text, "Table 3"), "the arm", "same tokens")
    # 50 − 30 and 60 − 30: 25 ± 12.706 × 7.071 / √2.
    assert found["RLP − RPT"] == "+25.0 [−38.5, +88.5]" and found["RPT"] == "30.0 ± 0.0"
    assert (found["the paper's RPT"], found["the paper's RLP"]) == ("41.69", "43.35")


def test_ablations_stand_beside_the_main_run(text):
    rows = section(text, "Figure 2a")
    assert [cells[0] for cells in rows[2:]] == ["4", "16"]
    assert row(rows, "4")["Overall"] == "50.0 ± 24.8" and row(rows, "16")["Overall"] == "**60.0 ± 24.8**"
    assert row(rows, "4")["the paper's Overall"] == "41.38" and row(rows, "16")["gain, nats"] == "+0.500 ± 0.000"
    assert "The paper, Overall: 4: 41.38, 8: 41.95, 16: 42.17, 32: 41.75." in text
    assert row(section(text, "Figure 2c"), "0")["the paper's Overall"] == "42.17"


def test_tau_says_which_seeds_are_equal(text):
    body = text.split("## Table S.6", 1)[1].split("\n## ", 1)[0]
    assert "| 1 | 0.99, 0.999 | yes |" in body and "| 3 | 0.99, 0.999 | no |" in body


def test_corpora_bases_and_sweeps(text):
    rows = section(text, "Table 4")
    assert row(rows, "RLP", "story")["Overall"] == "60.0 ± 24.8"
    assert row(rows, "RLP", "mix")["the paper's Overall"] == "41.43 to 43.36"
    assert row(rows, "CPT, same tokens", "mix")["the paper's Overall"] == "35.01"
    late = row(section(text, "Early and late bases"), "decoder, late")
    assert (late["Overall"], late["Overall after RLP"], late["difference"]) == (
        "20.0", "70.0 ± 24.8", "+50.0 [+25.2, +74.8]",
    )  # fmt: skip
    sweep = row(section(text, "Learning rates"), "decoder", "the arm", "RLP")
    assert (sweep["0.0001"], sweep["0.0003"]) == ("41.0", "**42.0**")


def test_perplexity_compute_and_split(text):
    rlp = row(section(text, "Table S.8"), "decoder", "RLP")
    assert rlp["thought"] == f"{math.e:.3f} ± 0.000" and rlp["no thought"].startswith(f"{math.exp(1.5):.3f}")
    assert rlp["empty thought"].startswith(f"{math.exp(1.4):.3f}")
    assert "The paper: CrossThink 2.91 → 2.36, WikiText-103 5.83 → 4.48." in text
    cost = row(section(text, "Compute"), "decoder", "RLP", "the arm")
    assert (cost["tokens read"], cost["tokens sampled"], cost["read + sampled"], cost["seconds"]) == (
        "20,000", "200,000", "220,000", "90",
    )  # fmt: skip
    assert cost["FLOPs"] == "2.5e+12"  # as the run that is matched to it tells
    parts = row(section(text, "What the gain is made of"), "decoder", "RLP", "the arm", "main")
    assert (parts["gain"], parts["format"], parts["generic"], parts["content"]) == tuple(
        f"+{value:.3f} ± 0.000" for value in (0.5, 0.1, 0.05, 0.35)
    )
    base = row(section(text, "What the gain is made of"), "decoder", "base")
    assert [base[name][:6] for name in ("gain", "format", "generic", "content")] == [
        "−0.200", "−0.300", "−0.300", "+0.400",
    ]  # fmt: skip
    assert row(section(text, "What the gain is made of"), "decoder", "RLP", "the arm", "kl 0.001")["seeds"] == "3"
    perplexity = row(section(text, "Table S.8"), "decoder", "base")
    assert perplexity["seeds"] == "3" and perplexity["thought"].startswith(f"{math.exp(1.7):.3f}")


def test_check_sees_a_changed_result(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--check") == 1
    assert "RESULTS.md is not current" in capsys.readouterr().err
    assert run(folder, out) == 0 and run(folder, out, "--check") == 0
    write(folder, "rlp", 1, 0.51)
    assert run(folder, out, "--check") == 1
    said = capsys.readouterr().err
    assert "RESULTS.md is not current" in said and "figure2.svg is not current" in said
    assert run(folder, out) == 0 and run(folder, out, "--check") == 0


def test_check_sees_changed_files(folder, tmp_path, capsys):
    out = tmp_path / "out"
    names = ("RESULTS.md", "figures/figure2.svg", "figures/ablations.svg")
    assert run(folder, out) == 0
    kept = {name: (out / name).read_text() for name in names}
    for name, text in kept.items():
        first, second = text[: len(text) // 2], text[len(text) // 2 :]
        last_digit = re.compile(r"\d(?=\D*$)")
        changed = last_digit.sub(lambda digit: str((int(digit[0]) + 1) % 10), first, count=1) + second
        assert sum(a != b for a, b in zip(changed, text, strict=True)) == 1
        (out / name).write_text(changed)
    capsys.readouterr()
    assert run(folder, out, "--check") == 1
    said = [f"{out / name} is not current: run python -m experiments.paper.tables" for name in names]
    assert capsys.readouterr().err.splitlines() == said
    (out / names[1]).unlink()
    assert run(folder, out, "--check") == 1 and said[1] in capsys.readouterr().err
    assert run(folder, out) == 0
    assert {name: (out / name).read_text() for name in names} == kept  # byte by byte


def test_check_sees_a_figure_left_over(folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(folder, out)
    (out / "figures" / "old.svg").write_text("<svg/>")
    assert run(folder, out, "--check") == 1 and "old.svg is not current" in capsys.readouterr().err
    assert run(folder, out) == 0 and not (out / "figures" / "old.svg").exists()


def test_a_figure_of_another_matplotlib_is_judged_by_its_stamp(folder, monkeypatch):
    found = drawings(load(folder))
    assert [item.name for item in found] == ["figure2", "ablations"]
    figure = found[0]
    text = drawing.render(figure)
    ElementTree.fromstring(text)
    assert drawing.current(text, figure)
    monkeypatch.setattr("matplotlib.__version__", "0.0")
    assert drawing.current(text, figure)
    assert not drawing.current(text.replace("Overall", "Sum", 1), figure)
    assert not drawing.current(text, figure._replace(title="another"))
    assert not drawing.current(text[: text.index("<!-- matplotlib")], figure)


def test_figure_2_has_the_papers_panels_and_ours(folder):
    theirs, ours = drawings(load(folder))[0].rows
    assert [point[:2] for point in theirs[0].points] == [(4, 41.38), (8, 41.95), (16, 42.17), (32, 41.75)]
    assert [point[0] for point in ours[0].points] == [4, 16] and not ours[1].points
    assert ours[0].points[0][1:] == pytest.approx((50.0, 24.843), abs=1e-3)


def test_no_results_at_all(tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out") == 0
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    of_runs = [section for section in tables.SECTIONS if section != before.BEFORE]  # that one is about the bases
    assert text.count("No runs yet: `python -m experiments.paper.drive") == len(of_runs)
    assert run(tmp_path / "nowhere", tmp_path / "out", "--check") == 0


def test_a_bad_result_is_one_line(folder, tmp_path, capsys):
    (folder / "bad.json").write_text("{")
    assert run(folder, tmp_path / "out", "--check") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tables: ") and "bad.json" in line


def test_the_committed_report_is_current(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
