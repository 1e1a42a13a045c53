# SPDX-License-Identifier: Apache-2.0
"""The study's list of runs holds together: names, parents, sweeps of equal size, equal tokens where it says so."""

import collections
import dataclasses
from pathlib import Path

import pytest

from experiments.paper import configs
from experiments.paper.pretrain import BASES
from experiments.paper.study import (
    ARMS,
    HYBRID_ARMS,
    HYBRID_POST_TRAINED,
    POST_TRAINED,
    RATES,
    RPT_WITHOUT,
    SEEDS,
    best,
    overall,
    resolved,
    study,
)
from rlp_jax.settings import validate


@pytest.fixture(scope="module")
def runs():
    return study().runs


def test_every_run_comes_after_what_it_needs(runs):
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    there, size = set(BASES), collections.Counter(run.sweep for run in runs)
    seen = collections.Counter()
    for run in runs:
        for name in run.needs:
            assert name in there or (name in size and seen[name] == size[name]), (run.name, name)
        there.add(run.name)
        seen[run.sweep] += 1
    assert not there & set(size)


def test_the_main_table_of_the_decoder_comes_first(runs):
    tables = [run.name.split("--")[0] for run in runs]
    first_other = next(i for i, table in enumerate(tables) if not table.startswith(("main", "sweep", "post_")))
    assert tables[first_other] == "corpus"
    assert first_other == sum(run.base == "decoder" and not run.axis for run in runs)
    assert tables.index("hybrid") == max(i for i, table in enumerate(tables) if table != "hybrid") + 1


def test_all_rivals_try_the_same_rates_and_have_as_many_seeds(runs):
    for base, trained, after in (("decoder", ARMS, POST_TRAINED), ("hybrid", HYBRID_ARMS, HYBRID_POST_TRAINED)):
        for stage, arms in (("", trained), ("sft", after), ("rlvr", after)):
            tried = {}
            for arm in arms:
                of_arm = [r for r in runs if (r.base, r.stage, r.arm, r.axis) == (base, stage, arm, "")]
                tried[arm] = [r.config.optimizer.learning_rate for r in of_arm if r.sweep]
                assert [r.seed for r in of_arm if not r.sweep] == list(SEEDS)
                assert {r.seed for r in of_arm if r.sweep} == {0}
                assert len({r.rate_from for r in of_arm if not r.sweep}) == 1
                (sweep,) = {r.sweep for r in of_arm if r.sweep}
                assert all(r.rate_from == sweep for r in of_arm if not r.sweep)
            assert len(set(map(tuple, tried.values()))) == 1, (base, stage)
            if not stage:
                assert tried["rlp"] == list(RATES)


def test_every_setting_is_valid_and_a_rate_takes_its_cosine_along(runs):
    for run in runs:
        if run.config is not None:
            validate(resolved(run, Path("weights/x"), 3e-4))
    cpt = configs.with_rate(configs.cpt(), 3e-4).optimizer
    assert (cpt.learning_rate, cpt.final_learning_rate) == (3e-4, pytest.approx(3e-5))
    assert configs.with_rate(configs.rlp(), 3e-4).optimizer.final_learning_rate is None


def test_a_rival_is_matched_to_the_rlp_run_of_its_seed(runs):
    by_name = {run.name: run for run in runs}
    rivals = [run for run in runs if run.match and not run.sweep]
    assert len(rivals) == (len(ARMS) - 1 + len(RPT_WITHOUT) + len(HYBRID_ARMS) - 1) * len(SEEDS)
    for run in rivals:
        rlp = by_name[run.match_run]
        assert (rlp.arm, rlp.seed, rlp.base, rlp.axis) == ("rlp", run.seed, run.base, "")
        for field in ("batch_documents", "data", "template"):
            assert getattr(run.config, field) == getattr(rlp.config, field)
        assert bool(run.rival_run) == (run.arm == "rpt_flops")
        if run.rival_run:
            measured = by_name[run.rival_run]
            assert (measured.arm, measured.seed, measured.base) == ("rpt_tokens", run.seed, run.base)
            assert dataclasses.replace(measured.config, name="") == dataclasses.replace(run.config, name="")


def test_a_post_training_goes_on_from_the_same_seed(runs):
    by_name = {run.name: run for run in runs}
    for run in runs:
        if not run.stage or run.sweep or run.start in BASES:
            continue
        before = by_name[run.start]
        assert (before.arm, before.seed, before.base) == (run.arm, run.seed, run.base)
        assert before.stage == {"sft": "", "rlvr": "sft"}[run.stage]
    assert {run.start for run in runs if run.arm == "base" and run.stage == "sft"} == {"decoder", "hybrid"}


def test_an_ablation_changes_one_setting(runs):
    main, changed = configs.rlp(), collections.defaultdict(set)
    for run in runs:
        if run.axis == "place":
            data = dataclasses.replace(run.config.data, span_pattern=main.data.span_pattern)
            assert dataclasses.replace(run.config, data=data, seed=0) == main != run.config
        elif run.axis == "rpt":
            rpt = configs.rpt()
            assert dataclasses.replace(run.config, rpt=rpt.rpt, seed=0) == rpt != run.config
            differing = [name for name, value in vars(rpt.rpt).items() if getattr(run.config.rpt, name) != value]
            assert len(differing) == 1 and run.arm == "rpt_tokens" and run.match == "tokens"
        elif run.axis not in ("", "corpus", "positions"):
            assert dataclasses.replace(run.config, rlp=main.rlp, seed=0) == main
            fields = [f.name for f in dataclasses.fields(main.rlp)]
            differing = {name for name in fields if getattr(run.config.rlp, name) != getattr(main.rlp, name)}
            assert len(differing) == 1
            assert getattr(run.config.rlp, differing.pop()) == (True if run.axis == "advantage" else run.value)
        changed[run.axis].add((run.value, run.seed))
    assert all(len(points) == len(SEEDS) * len({v for v, _ in points}) for axis, points in changed.items() if axis)


def test_positions_a_document_generate_equally_much(runs):
    found = {run.value: run.config for run in runs if run.axis == "positions"}
    assert set(found) == {1, 2, 4, 8, 16}
    thoughts = {c.batch_documents * c.rlp.positions * c.rlp.group_size for c in found.values()}
    assert thoughts == {16 * 2 * 16}
    assert len({c.data for c in found.values()}) == 1 and all("corpora_long" in s for s in found[1].data.sources)


def scores(value):
    return {name: {"pass1": value} for name in ("arithmetic", "textbook", "compose", "pointers", "story")}


def test_the_best_rate_is_the_one_with_the_highest_overall(runs):
    sweep = [run for run in runs if run.sweep == "sweep--rlp"]
    uneven = scores(0.2) | {"arithmetic": {"pass1": 0.8}}  # one of two in mathematics
    assert overall(uneven) == pytest.approx((0.5 + 0.2) / 2)
    one_in_reasoning = scores(0.2) | {"story": {"pass1": 0.8}}  # one of three
    assert overall(one_in_reasoning) == pytest.approx((0.2 + 0.4) / 2)
    found = {run.name: scores(0.2) for run in sweep}
    assert best(found, sweep).config.optimizer.learning_rate == RATES[0]  # of equals the lowest
    assert best(found, sweep[::-1]).config.optimizer.learning_rate == RATES[0]
    found[sweep[2].name] = uneven
    found[sweep[3].name] = one_in_reasoning
    assert best(found, sweep) == sweep[2]
