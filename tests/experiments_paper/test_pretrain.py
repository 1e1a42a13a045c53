# SPDX-License-Identifier: Apache-2.0
"""The run that makes bases: its rate, its branches, and what is saved. On models of a few thousand parameters."""

import jax
import numpy as np
import pytest
from test_batches import SMALL, SMALL_HYBRID

from experiments.paper import abilities, domains, pretrain
from experiments.tiny_base import save
from rlp_jax.checkpoints_io.load import load

pytestmark = pytest.mark.usefixtures("quick_compiles")


def leaves(params) -> list:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_the_rate_rises_stays_and_falls_at_the_end_of_a_branch():
    rates = [pretrain.factor(step, None) for step in range(300)]
    assert rates[0] == 1 / pretrain.WARM_UP and rates[pretrain.WARM_UP - 1 :] == [1.0] * (301 - pretrain.WARM_UP)
    branch = [pretrain.factor(step, 1000) for step in range(800, 1000)]
    assert branch[0] == 1.0 and branch[-1] == pytest.approx(1 / 200) and sorted(branch, reverse=True) == branch


def test_a_base_alone_is_the_base_of_the_shared_run(monkeypatch):
    monkeypatch.setattr(pretrain, "WARM_UP", 2)

    def run(**ends):
        return {name: leaves(params) for name, _, params in pretrain.train(SMALL, ends, 1e-2, documents=3, repeated=1)}

    both, late = run(early=5, late=10), run(late=10)
    assert list(both) == ["early", "late"]
    for ours, theirs in zip(both["late"], late["late"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any((a != b).any() for a, b in zip(both["early"], both["late"], strict=True))


@pytest.mark.parametrize("config", [SMALL, SMALL_HYBRID], ids=["decoder", "hybrid"])
def test_what_is_saved_is_what_is_loaded(config, tmp_path):
    ((_, model, params),) = pretrain.train(config, {"base": 2}, 1e-2, documents=3, repeated=0)
    save(tmp_path / "base", model, params, domains.TOKENIZER, "bfloat16")
    again = load(tmp_path / "base")
    assert again.model.config == model.config
    assert again.tokenizer.encode("x is 3 . <think> 3 + 4 7") == domains.TOKENIZER.encode("x is 3 . <think> 3 + 4 7")
    for ours, theirs in zip(leaves(params), leaves(again.params), strict=True):
        rounded = np.asarray(jax.numpy.asarray(ours, jax.numpy.bfloat16), np.float32)
        np.testing.assert_array_equal(rounded, theirs)


def test_abilities_are_those_of_a_model_that_knows_nothing():
    ((_, model, params),) = pretrain.train(SMALL, {"base": 1}, 0.0, documents=3, repeated=0)
    found = abilities.abilities(model, params, documents=8)
    assert {"compose", "compose, long documents", "crawl"} <= found.keys()
    for corpus in domains.BENCHMARKS:
        values = found[corpus]
        shares = [share for name, share in values.items() if name.startswith("thoughts, greedy")]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and values["thoughts, greedy: right"] == 0
        assert values["one step of a thought, accuracy"] < 0.3
        assert values["answer without a thought, cross-entropy"] > 2


def test_an_unknown_base_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain.main(["nothing", "--out", "x"])
    assert caught.value.code == 2 and "invalid choice: 'nothing'" in capsys.readouterr().err
