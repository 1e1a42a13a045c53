# SPDX-License-Identifier: Apache-2.0
"""What an RLP run is worth in a rival's steps: formulas by hand, counts against what the sizes say."""

import dataclasses
import json
import sys

import jax
import pytest
from hybrids import hybrid
from tiny_run import LLAMA, tiny_config, write_model

from rlp_jax import cli
from rlp_jax.aot.matching import (
    Means,
    Sampling,
    describe,
    matched,
    measure,
    measure_sampling,
    recorded_config,
    step_flops,
)
from rlp_jax.aot.workload import needed_flops
from rlp_jax.config import Config, ConfigError, DataConfig, EvalConfig, RLPConfig, Template, to_json, with_algorithm
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel

HYBRID = dataclasses.replace(hybrid("M*-").config, vocab_size=256)
# The formulas do not ask for the model.
SETTINGS = Config(name="paper", model="quickstart", steps=330, data=DataConfig(("-",)), eval=EvalConfig(every=10))
PAPER = dataclasses.replace(SETTINGS, model="qwen3-1.7b")


def test_tokens_are_the_same_steps():
    config = matched(SETTINGS, "tokens", Means(1_000.0, 2_048.0))
    assert (config.algorithm, config.name, config.steps) == ("cpt", "paper_cpt_tokens", 330)
    assert config.budget.input_tokens == config.budget.rlp_input_tokens == 330 * 512 * 1_000
    assert config.data == SETTINGS.data and config.batch_documents == SETTINGS.batch_documents


def test_flops_are_the_papers_formula():
    """170M input tokens are worth about 6B, 35 times as many (arXiv 2510.01265, section 4)."""
    steps, document = 330, 1_000.0
    config = matched(SETTINGS, "flops", Means(document, 2_048.0))
    sampled, read = 16 * 2_048 * 512 * steps, 512 * steps * document
    assert config.budget.rlp_thought_tokens == sampled
    assert config.steps == round((sampled + read) / (512 * document)) == 11_143
    assert config.budget.input_tokens / config.budget.rlp_input_tokens == pytest.approx(33.8, abs=0.1)
    assert config.eval.every == round(10 * config.steps / steps)  # as many evaluations
    two = dataclasses.replace(SETTINGS, rlp=RLPConfig(positions=2, kl_coefficient=0.1))
    twice = matched(two, "flops", Means(document, 100.0))
    assert twice.steps == round(steps * (1 + 2 * 16 * 100 / document)) and twice.rlp.kl_coefficient == 0


@pytest.mark.parametrize("remat", ["layer", "none"])
def test_a_cpt_step_counts_what_its_sizes_say(remat):
    """Products of weights forward, and twice that backward (layers once more where they are computed again), logits
    twice forward; attention over blocks."""
    model = CONFIGS["qwen3-1.7b"]
    config = dataclasses.replace(with_algorithm(PAPER, "cpt"), remat=remat, batch_documents=4)
    T, again = 2_048, remat == "layer"
    params = jax.eval_shape(LanguageModel(model).init, jax.random.key(0))
    layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2)
    head = model.vocab_size * model.d_model
    pairs = 4 * model.n_heads * model.head_dim * model.n_layers * T * T / 2
    needed = 2 * T * layers * (3 + again) + 2 * (T - 1) * head * 4 + pairs * (3.5 + again)
    share = step_flops(config, Means(T, 0.0)) / (4 * needed)
    assert 0.99 < share < 1.1
    assert step_flops(config, Means(T, 512.0)) == step_flops(config, Means(T, 0.0))


def test_an_rlp_step_counts_what_it_needs():
    config = dataclasses.replace(PAPER, batch_documents=4, rlp=RLPConfig(group_size=4, thought_tokens=2_048))
    model = dataclasses.replace(CONFIGS["qwen3-1.7b"], remat="layer")
    params = jax.eval_shape(LanguageModel(model).init, jax.random.key(0))
    template = TemplateTokens((), (1,) * 30, (2,) * 2, (3,) * 2)
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, document_tokens=500))
    needed = sum(needed_flops(model, params, template, own, 100).values())
    assert 0.95 < step_flops(config, Means(500.0, 100.0)) / needed < 1.2


def test_several_minibatches_cost_a_forward_more():
    """bfloat16: the rollout's own scores do not serve."""
    config = dataclasses.replace(
        PAPER, compute_dtype="bfloat16", remat="none", batch_documents=8, rlp=RLPConfig(group_size=4)
    )
    several = dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, minibatches=4))
    of = Means(300.0, 64.0)
    template = TemplateTokens((), (1,) * 30, (2,) * 2, (3,) * 2)
    model = dataclasses.replace(CONFIGS["qwen3-1.7b"], remat="none")
    params = jax.eval_shape(LanguageModel(model).init, jax.random.key(0))
    own = dataclasses.replace(several, data=dataclasses.replace(config.data, document_tokens=300))
    scoring = needed_flops(model, params, template, own, 64)["scoring"]
    assert (step_flops(several, of) - step_flops(config, of)) / scoring == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("model", "thought"), [(LLAMA, 9.5), (HYBRID, 9.0)], ids=["llama", "hybrid"])
def test_counted_runs_cost_the_same_to_half_a_step(tmp_path, model, thought):
    write_model(tmp_path / "model", model)
    config = Config(
        model=str(tmp_path / "model"), steps=20, batch_documents=8, data=DataConfig(("-",)),
        rlp=RLPConfig(group_size=4, positions=2, thought_tokens=16), template=Template("", "<", ">"),
    )  # fmt: skip
    rival = matched(config, "counted", Means(28.7, thought))
    budget = rival.budget
    assert abs(budget.flops - budget.rlp_flops) <= 0.51 * budget.flops / rival.steps
    assert budget.match == "counted"
    assert 0.3 < rival.steps / (20 * (1 + 8 * thought / 28.7)) < 3  # the formula's
    if thought % 1:
        ends = [20 * step_flops(config, Means(28.7, length)) for length in (9.0, 10.0)]
        assert ends[0] < ends[1] and budget.rlp_flops == pytest.approx(sum(ends) / 2, rel=1e-12)


def run_directory(root, **changes):
    config = tiny_config(root, **changes)
    run_dir = root / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(to_json(config))
    (run_dir / "summary.json").write_text('{"before": {}, "after": {}}')
    lines = [{"step": n, "input_tokens": 100 + n, "sampled_tokens": 20} for n in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config, run_dir


def test_means_of_a_run(tmp_path):
    """Two steps of four documents, each with two thoughts."""
    config, run_dir = run_directory(tmp_path)
    longer = dataclasses.replace(config, steps=100, seed=3)
    assert measure(longer, run_dir) == Means(203 / 8, 40 / 16, str(run_dir))
    cap = measure(config)
    assert cap.thought_tokens == config.rlp.thought_tokens and cap.run == "" and 14 < cap.document_tokens < 32
    rival = matched(config, "tokens", measure(config, run_dir))
    assert f"2.5 tokens as in {run_dir}" in describe(rival)
    assert "5 tokens, the cap (--match-run RUN_DIR" in describe(matched(config, "tokens", cap))


def test_runs_that_say_nothing_of_the_thoughts_are_refused(tmp_path):
    config, run_dir = run_directory(tmp_path)
    with pytest.raises(ConfigError, match=r"--match-run .*: the run differs in rlp; name an RLP run of this"):
        measure(dataclasses.replace(config, rlp=RLPConfig()), run_dir)
    summary = (run_dir / "summary.json").rename(tmp_path / "summary.json")
    with pytest.raises(ConfigError, match=r"the run has not finished, and its thoughts may still change"):
        measure(config, run_dir)
    summary.rename(run_dir / "summary.json")
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"no step in its metrics\.jsonl tells its sampled_tokens"):
        measure(config, run_dir)
    (run_dir / "config.json").write_text(to_json(with_algorithm(config, "cpt")))
    with pytest.raises(ConfigError, match=r"the run is one of cpt"):
        measure(config, run_dir)
    with pytest.raises(ConfigError, match=r"algorithm is cpt: what is matched is a run with algorithm rlp"):
        matched(with_algorithm(config, "cpt"), "tokens", Means(10.0, 10.0))
    with pytest.raises(ConfigError, match=r"--match is for rivals that read RLP's documents, cpt, sft, rpt: not rlvr"):
        matched(config, "tokens", Means(10.0, 10.0), "rlvr")


def rpt_of(config, **changes):
    """RPT with settings of its own, as an experiment file would have it."""
    template = dataclasses.replace(config.template, end=".")
    rlp = dataclasses.replace(config.rlp, group_size=3, horizon=1, thought_tokens=7)
    return dataclasses.replace(config, name="rpt", algorithm="rpt", template=template, rlp=rlp, **changes)


def test_a_rival_that_samples_is_matched_by_what_it_sampled(tmp_path):
    """RLP reads 203 tokens and samples 40 over 8 documents; the rival samples 60 over as many."""
    config, run_dir = run_directory(tmp_path)
    rival = rpt_of(config)
    rival_dir = tmp_path / "rival"
    rival_dir.mkdir()
    (rival_dir / "config.json").write_text(to_json(dataclasses.replace(rival, steps=2, seed=5)))
    (rival_dir / "summary.json").write_text('{"before": {}, "after": {}}')
    lines = [{"step": n, "input_tokens": 100, "sampled_tokens": 20 * n} for n in (1, 2)]
    (rival_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    means, sampling = measure(config, run_dir), measure_sampling(rival, rival_dir)
    assert sampling == Sampling(60 / 8, str(rival_dir))
    long = dataclasses.replace(config, steps=300)
    same = matched(long, "tokens", means, rival)
    assert (same.algorithm, same.name, same.steps, same.rlp) == ("rpt", "rpt_tokens", 300, rival.rlp)
    assert same.budget.flops == same.budget.sampled_tokens == 0 and "operations" not in describe(same)
    equal = matched(long, "flops", means, rival, sampling)
    assert equal.steps == round(300 * (203 + 40) / (203 + 60)) == 277
    of_rival = equal.budget.input_tokens + equal.budget.sampled_tokens
    assert of_rival == pytest.approx(equal.budget.rlp_input_tokens + equal.budget.rlp_thought_tokens, rel=1 / 277)
    assert equal.eval.every == round(4 * 277 / 300) and equal.budget.rival_run == str(rival_dir)
    lines = describe(equal).splitlines()
    assert "2 thoughts a document of 2.5 tokens" in lines[0]
    assert lines[1] == (
        f"RPT matched by flops: 277 steps, {277 * 4 * 203 / 8:,.0f} input tokens and {277 * 30:,} sampled ones, "
        f"as in {rival_dir}"
    )

    with pytest.raises(ConfigError, match=r"--match flops: measure first what rpt samples, and name that run with"):
        matched(long, "flops", means, rival)
    with pytest.raises(ConfigError, match=r"--match counted: algorithm rpt samples as often as its judge asks"):
        matched(long, "counted", means, rival, sampling)
    with pytest.raises(ConfigError, match=r"the rival differs from the RLP run in batch_documents"):
        matched(long, "flops", means, dataclasses.replace(rival, batch_documents=8), sampling)
    with pytest.raises(ConfigError, match=r"--rival-run .*: the run differs in rlp; name an RPT run of this"):
        measure_sampling(dataclasses.replace(rival, rlp=config.rlp), rival_dir)
    with pytest.raises(ConfigError, match=r"--rival-run .*: the run is one of rlp; name an RPT run"):
        measure_sampling(rival, run_dir)
    with pytest.raises(ConfigError, match=r"nowhere is not a run directory: it has no config\.json"):
        recorded_config(tmp_path / "nowhere")


def test_a_rival_of_its_own_on_the_command_line(tmp_path, monkeypatch, capsys):
    config, run_dir = run_directory(tmp_path)
    experiment = tmp_path / "rival.py"
    rival = rpt_of(config, steps=99)
    experiment.write_text(
        f"from rlp_jax.settings import from_json\nconfig = lambda: from_json({to_json(rival)!r}, '')\n"
    )
    given = []
    monkeypatch.setattr(
        sys.modules["rlp_jax.train"],
        "train",
        lambda config, *args, **more: given.append((config, args[0])) or tmp_path / "report",
    )
    train = ["train", str(experiment), "--match", "tokens"]
    assert cli.main([*train, "--match-run", str(run_dir)]) == 0
    assert "RPT matched by tokens: 6 steps" in capsys.readouterr().out
    assert given[0][0].steps == 6 and given[0][0].rlp == rival.rlp and str(given[0][1]) == "runs/rpt_tokens"
    assert cli.main(train) == 2
    assert "name the RLP run that this experiment is to match with --match-run" in capsys.readouterr().err
    assert cli.main(["train", str(experiment), "--rival-run", str(run_dir)]) == 2
    assert "--rival-run without --match" in capsys.readouterr().err
    assert cli.main([*train, "--match-run", str(run_dir), "--rival-run", str(tmp_path / "none")]) == 2
    assert "none is not a run directory" in capsys.readouterr().err


def test_the_command_line_prints_the_budget_and_runs_it(tmp_path, monkeypatch, capsys):
    config, run_dir = run_directory(tmp_path)
    experiment = tmp_path / "tiny.py"
    experiment.write_text(
        f"from rlp_jax.settings import from_json\nconfig = lambda: from_json({to_json(config)!r}, '')\n"
    )
    given = []
    monkeypatch.setattr(
        sys.modules["rlp_jax.train"], "train", lambda config, *args, **more: given.append(config) or tmp_path / "report"
    )
    train = ["train", str(experiment), "--as", "cpt", "--run-dir", str(tmp_path / "rival")]
    assert (
        cli.main([*train, "--match", "flops", "--match-run", str(run_dir), "--set", "optimizer.weight_decay=0.1"]) == 0
    )
    printed = capsys.readouterr().out
    assert "CPT matched by flops: 7 steps" in printed and "RLP: 6 steps of 4 documents of 25.4 tokens" in printed
    (rival,) = given
    assert rival.steps == round(6 * (1 + 2 * 2.5 / (203 / 8))) == 7
    assert (rival.name, rival.algorithm, rival.optimizer.weight_decay) == ("tiny_cpt_flops", "cpt", 0.1)
    assert rival.budget.run == str(run_dir) and rival.budget.rlp_steps == 6
    for arguments, message in (
        (["--match", "flops"], "--match without --as"),
        (["--as", "cpt", "--match-run", str(run_dir)], "--match-run without --match"),
    ):
        assert cli.main(["train", str(experiment), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert len(given) == 1
