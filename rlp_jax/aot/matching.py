# SPDX-License-Identifier: Apache-2.0
"""How much of a rival's training an RLP run is worth: the steps that make them equal, computed, not chosen.

- "tokens": the same input tokens, which on the same documents is the same number of steps.
- "flops": the paper's rule (arXiv 2510.01265, section 4): a rival that samples nothing reads
  T_flop = n · l_seq · bs · iters + T_inp tokens, as if a token sampled cost what a token trained on does. A rival that
  samples itself takes as many steps as make what it reads and samples T_flop tokens, by what a run of it has sampled.
- "counted": the same floating-point operations, counted from the traced programs of both (`jaxpr_cost.py`), for
  documents and thoughts of the mean length, one document a sequence, so that no padding is counted on either side. RLP
  counts as if each document were read to its end, a little more than it does, and attention by whole blocks of pairs,
  as it is computed: where thoughts are short, many of them nobody sees. Both give the rival more.

Thoughts are as long as in a finished run where one is named. Else they count at the cap, which gives the rival more.
What a rival samples is measured in a run of its own: how often it asks again depends on how often it is right.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax

from rlp_jax.algorithms import ALGORITHMS
from rlp_jax.aot.jaxpr_cost import Turns, count_flops
from rlp_jax.aot.programs import batch_shapes, template_of
from rlp_jax.aot.workload import causal_steps, loop_turns
from rlp_jax.checkpoints_io.load import open_model, open_shape
from rlp_jax.config import (
    WITHOUT_THOUGHTS,
    Algorithm,
    Budget,
    Config,
    ConfigError,
    CPTConfig,
    Match,
    SFTConfig,
    with_algorithm,
)
from rlp_jax.data.pipeline import load_documents
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.backend import compiling_for
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.models.vocabulary import chunk_tokens
from rlp_jax.optimizer import make_optimizer
from rlp_jax.report.run import read_run
from rlp_jax.rollout import packing
from rlp_jax.settings import from_json
from rlp_jax.state import init_state

SAME = ("model", "batch_documents", "template", "rlp", "data")  # of a run whose thoughts are measured
READ_ALIKE = ("model", "batch_documents", "data")  # of RLP and a rival with settings of its own
RIVALS: tuple[Algorithm, ...] = (*WITHOUT_THOUGHTS, "rpt")  # rlvr reads questions


class Means(NamedTuple):
    """Mean tokens of a training document and of a thought; the run in which they were measured, or ""."""

    document_tokens: float
    thought_tokens: float
    run: str = ""


class Sampling(NamedTuple):
    """Mean tokens that a rival samples over a training document, and the run in which that was measured."""

    document_tokens: float
    run: str


def measure(config: Config, run_dir: Path | None = None) -> Means:
    """The means of an RLP run.

    Args:
      config: RLP's. Without a run its documents are read, and thoughts taken for as long as they may be.
      run_dir: a finished RLP run of the same settings (steps, learning rate and the like may differ).

    Raises:
      ConfigError, ReportError: the documents cannot be read, or the run is another one, unfinished or too old to tell.
    """
    if run_dir is None:
        _, tokenizer, _ = open_model(config.model, config.compute_dtype)
        documents = load_documents(config.data, tokenizer, config.seed, config.rlp.position_mode).train
        if not documents:
            raise ConfigError("data.sources give no training document of at least data.min_tokens tokens")
        mean = sum(len(document.tokens_T) for document in documents) / len(documents)
        return Means(mean, float(config.rlp.thought_tokens))
    rows = _rows(config, run_dir, "--match-run")
    documents = len(rows) * config.batch_documents
    thoughts = documents * config.rlp.positions * config.rlp.group_size
    read, sampled = (sum(row[name] for row in rows) for name in ("input_tokens", "sampled_tokens"))
    return Means(read / documents, sampled / thoughts, str(run_dir))


def measure_sampling(rival: Config, run_dir: Path) -> Sampling:
    """What a rival samples, by a finished run of the same settings (steps, learning rate and the like may differ).

    Raises:
      ConfigError, ReportError: as `measure` does.
    """
    rows = _rows(rival, run_dir, "--rival-run")
    return Sampling(sum(row["sampled_tokens"] for row in rows) / (len(rows) * rival.batch_documents), str(run_dir))


def _rows(config: Config, run_dir: Path, option: str) -> list[dict]:
    """The steps of a finished run of the same algorithm and settings, which tell what was read and sampled."""
    run = read_run(run_dir)
    recorded = recorded_config(run_dir)
    differing = [name for name in SAME if getattr(recorded, name) != getattr(config, name)]
    if recorded.algorithm != config.algorithm or differing:
        another = recorded.algorithm != config.algorithm
        what = f"is one of {recorded.algorithm}" if another else f"differs in {', '.join(differing)}"
        wanted = config.algorithm.upper()
        raise ConfigError(f"{option} {run_dir}: the run {what}; name an {wanted} run of this experiment")
    if not run.finished:
        raise ConfigError(f"{option} {run_dir}: the run has not finished, and its thoughts may still change")
    rows = [row for row in run.metrics if {"input_tokens", "sampled_tokens"} <= row.keys()]
    if not rows:
        raise ConfigError(f"{option} {run_dir}: no step in its metrics.jsonl tells its sampled_tokens")
    return rows


def recorded_config(run_dir: Path) -> Config:
    """The settings of a run.

    Raises:
      ConfigError: not a run directory.
    """
    file = Path(run_dir) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.json")
    return from_json(file.read_text(encoding="utf-8"), str(file))


def matched(
    config: Config,
    match: Match,
    means: Means,
    rival: Algorithm | Config = "cpt",
    sampling: Sampling | None = None,
    count: bool = True,
) -> Config:
    """The rival's run that matches an RLP run: the same documents and batches, for as many steps as make them equal.

    The rival is evaluated as often, and the budget stands in its config.

    Args:
      config: RLP's, its steps those to be matched.
      rival: its algorithm, all else being RLP's settings, or settings of its own.
      sampling: of a rival that samples, needed for "flops".
      count: whether operations are counted for the budget where `match` does not need them; it takes a while.

    Raises:
      ConfigError: the config is not RLP's, the rival reads something else or does not tell how much it samples, or
        "counted" with one that samples: how often it asks again is in no program.
    """
    if config.algorithm != "rlp":
        raise ConfigError(f"algorithm is {config.algorithm}: what is matched is a run with algorithm rlp")
    if not isinstance(rival, Config):
        rival = with_algorithm(config, rival)
    algorithm, rlp = rival.algorithm, config.rlp
    if algorithm not in RIVALS:
        raise ConfigError(f"--match is for rivals that read RLP's documents, {', '.join(RIVALS)}: not {algorithm}")
    differing = [name for name in READ_ALIKE if getattr(rival, name) != getattr(config, name)]
    if differing:
        raise ConfigError(f"--match: the rival differs from the RLP run in {', '.join(differing)}, so they read others")
    samples = algorithm not in WITHOUT_THOUGHTS
    if samples and match == "counted":
        raise ConfigError(f"--match counted: algorithm {algorithm} samples as often as its judge asks; match flops")
    if samples and match == "flops" and sampling is None:
        raise ConfigError(f"--match flops: measure first what {algorithm} samples, and name that run with --rival-run")
    documents = config.steps * config.batch_documents
    read = documents * means.document_tokens
    sampled = documents * rlp.positions * rlp.group_size * means.thought_tokens
    cost, rival_cost = (0.0, 0.0)
    if not samples and (count or match == "counted"):
        cost, rival_cost = (step_flops(c, means) for c in (config, rival))
    of_a_step = config.batch_documents * means.document_tokens
    sampled_of_a_step = config.batch_documents * sampling.document_tokens if sampling else 0.0
    steps = {
        "tokens": lambda: config.steps,
        "flops": lambda: (read + sampled) / (of_a_step + sampled_of_a_step),
        "counted": lambda: config.steps * cost / rival_cost,
    }[match]()
    steps = max(1, round(steps))
    every = max(1, round(rival.eval.every * steps / config.steps)) if rival.eval.every else 0
    budget = Budget(
        match, means.run, means.document_tokens, means.thought_tokens, config.steps, read, sampled,
        config.steps * cost, steps * of_a_step, steps * rival_cost, steps * sampled_of_a_step,
        sampling.run if sampling else "",
    )  # fmt: skip
    return dataclasses.replace(
        rival,
        name=f"{rival.name}_{match}",
        steps=steps,
        eval=dataclasses.replace(rival.eval, every=every),
        budget=budget,
    )


def step_flops(config: Config, means: Means) -> float:
    """Operations of one step, over all devices: documents and thoughts of the mean length, nothing padded. Between two
    lengths of thoughts the count is interpolated."""
    model, tokenizer = open_shape(config.model, config.compute_dtype)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=config.remat))
    template = template_of(config.template, tokenizer)
    tokens = max(1, round(means.document_tokens), config.rlp.horizon + 1)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, document_tokens=tokens),
        cpt=CPTConfig(sequence_tokens=tokens),
        sft=SFTConfig(sequence_tokens=tokens),
    )
    if config.algorithm in WITHOUT_THOUGHTS:
        return _count(config, model, template, _turns_of_texts(model, template, config))
    low, share = max(1, math.floor(means.thought_tokens)), means.thought_tokens % 1

    def of_length(thought_tokens):
        parts = config.batch_documents // config.rlp.minibatches  # a document each
        rlp = dataclasses.replace(config.rlp, thought_tokens=thought_tokens, microbatches=parts)
        own = dataclasses.replace(config, rlp=rlp)
        return _count(own, model, template, _turns_of_thoughts(model, template, own))

    return (1 - share) * of_length(low) + (share * of_length(low + 1) if share else 0.0)


def _turns_of_texts(model: LanguageModel, template: TemplateTokens, config: Config) -> Turns:
    """One sequence a document (`baselines/next_token.py`)."""
    length = config.data.document_tokens + len(template.plain)
    capacity = length if model.config.hybrid else packing.bin_size(length)
    wanted = config.data.document_tokens - template.first
    chunk = min(packing.SCORED, chunk_tokens(model.config.vocab_size), capacity)
    return Turns(
        {"sequences": config.batch_documents * length / capacity, "target_scores": wanted / chunk}, causal_steps
    )


def _turns_of_thoughts(model: LanguageModel, template: TemplateTokens, config: Config) -> Turns:
    """One bin a document, whose thoughts have all the same length."""
    rlp = config.rlp
    turns = loop_turns(model, template, config, 1, rlp.thought_tokens)
    branches = rlp.positions * rlp.group_size
    branch = packing.longest_branch(rlp.thought_tokens, template, rlp.horizon)
    length = config.data.document_tokens + len(template.context) + branches * branch
    chunk = min(packing.SCORED, chunk_tokens(model.config.vocab_size))
    of_batch = config.batch_documents * length / packing.bin_size(length)
    unpadded = {
        "bins": of_batch / rlp.minibatches,
        "all_bins": of_batch,
        "thought_scores": max(1.0, branches * rlp.thought_tokens / chunk),
        "target_scores": max(1.0, branches * rlp.horizon / chunk),
    }
    return dataclasses.replace(turns, loops=dict(turns.loops) | unpadded)


def _count(config: Config, model: LanguageModel, template: TemplateTokens, turns: Turns) -> float:
    """Operations of a step's programs as a TPU would run them."""
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), optimizer))
    reference = params if config.rlp.kl_coefficient > 0 else None
    batch = batch_shapes(config.batch_documents, config.data.document_tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def step(params, ema_params, state, batch, key, reference_params):
        of = ALGORITHMS[config.algorithm](model, optimizer, template, config, reference_params, None)
        samples = of.sample(params, ema_params, batch, key)
        return of.learn(state, batch, samples)

    with compiling_for("tpu"):
        traced = jax.jit(step).trace(params, params, state, batch, key, reference)
    return float(count_flops(traced.jaxpr, turns).total())


def describe(config: Config) -> str:
    """The budget of a matched run, two lines for the console."""
    budget = config.budget
    of_a_document = budget.rlp_thought_tokens * budget.document_tokens / budget.rlp_input_tokens
    each = round(of_a_document / budget.thought_tokens)
    length = f"{budget.thought_tokens:,.1f} tokens as in {budget.run}"
    if not budget.run:
        length = f"{budget.thought_tokens:,.0f} tokens, the cap (--match-run RUN_DIR takes their true length)"
    documents = f"{config.batch_documents:,} documents of {budget.document_tokens:,.1f} tokens"
    counted, rival_counted = (
        f"; {flops:.3g} operations" if flops else "" for flops in (budget.rlp_flops, budget.flops)
    )
    sampled = ""
    if budget.sampled_tokens:
        sampled = f" and {budget.sampled_tokens:,.0f} sampled ones, as in {budget.rival_run}"
    return (
        f"RLP: {budget.rlp_steps:,} steps of {documents}, {budget.rlp_input_tokens:,.0f} input tokens; "
        f"{each:,} thoughts a document of {length}, {budget.rlp_thought_tokens:,.0f} thought tokens{counted}\n"
        f"{config.algorithm.upper()} matched by {budget.match}: {config.steps:,} steps, "
        f"{budget.input_tokens:,.0f} input tokens{sampled}{rival_counted}"
    )
