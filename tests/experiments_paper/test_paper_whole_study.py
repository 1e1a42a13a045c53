# SPDX-License-Identifier: Apache-2.0
"""Every run of the study, with a result as its driver writes one, has its place in the report."""

import dataclasses
import json

import pytest
from written import EVALUATION, WHERE, shares

from experiments.paper import configs, drive, outcome, results, study, tables
from experiments.paper.cells import MAIN
from experiments.paper.pretrain import BASES
from rlp_jax.config import Budget, to_json


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Of a folder with a result of each run; what a training leaves is the same for all."""
    folder, run_dir = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("run")
    budget = Budget(match="tokens", rlp_flops=3e12, flops=2e12)
    (run_dir / "config.json").write_text(to_json(dataclasses.replace(configs.rlp(), budget=budget)))
    (run_dir / "summary.json").write_text(json.dumps({"before": EVALUATION, "after": EVALUATION}))
    row = {"step": 1, "input_tokens": 500, "sampled_tokens": 4000, "seconds": 0.5, "thought_len": 9.0, "stop_rate": 1.0}
    (run_dir / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    for run in study.study().runs:
        references = {name: getattr(run, name) for name in ("start", "match_run", "rival_run")}
        wanted = outcome.settings(run, run.config, references, 256)
        where = WHERE if run.located else {}
        result = outcome.assemble(run, wanted, run_dir, shares(0.5), where, {"wall_seconds": 2.0}, {})
        outcome.write(folder / f"{run.name}.json", result)
    return results.load(folder)


def test_every_run_is_read(records):
    runs = study.study().runs
    assert {record.name for record in records} == {run.name for run in runs} and len(records) == len(runs)
    assert {record.axis for record in records} == {"", *results.AXES}
    assert {record.stage for record in records} == set(results.STAGES)
    assert {record.base for record in records} == set(results.BASES) == set(BASES)
    assert {record.arm for record in records} == set(results.ARMS) == {"base", *study.ARMS}


def test_no_table_lacks_runs(records):
    """But CPT on single corpora, which the study does not have, and whose rows are left out."""
    text = tables.report(records, "Words.")
    assert "No runs yet" not in text and "no runs yet" not in text
    numbers = set()
    for block in text.split("\n\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for column in (place for place, name in enumerate(rows[0]) if name == "seeds"):
            numbers |= {row[column] for row in rows[2:]}
    assert numbers == {"1", "3"}


def test_every_run_counts_somewhere(records):
    """Each cell of the report has as many seeds as the study."""
    counted = [record for record in records if not record.sweep]
    cells = {(record.arm, record.base, record.stage, record.axis, record.value) for record in counted}
    for arm, base, stage, axis, value in cells:
        found = results.select(records, arm, base, stage, axis, value)
        alone = arm == "base" and not stage
        assert [record.seed for record in found] == ([0] if alone else list(study.SEEDS))
    assert sum(len(results.select(records, *cell)) for cell in cells) == len(counted)


def test_the_main_run_stands_where_its_settings_put_it():
    rlp = configs.rlp().rlp
    assert {axis: getattr(rlp, field) for axis, field in study.FIELDS.items() if axis in MAIN} == {
        axis: value for axis, value in MAIN.items() if axis in study.FIELDS
    }


@pytest.mark.parametrize("section", tables.SECTIONS, ids=lambda section: section.title)
def test_the_command_of_a_section_makes_runs_that_it_shows(records, section):
    selected = {run.name for run in drive.select(study.study(), section.only)}
    assert section.text([record for record in records if record.name in selected])
