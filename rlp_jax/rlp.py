# SPDX-License-Identifier: Apache-2.0
"""One RLP step: choose positions, sample thoughts, score them against the baseline, learn.

Algorithm 1 of arXiv 2510.01265. Where it departs from the letter of the paper:
- The reward needs log p(x_t | prefix, thought), the learner needs log pi of the thought under the same parameters. One
  forward gives both, so the first update of a batch computes rewards, advantages and gradients in a single pass, with
  pi_old the trainer's own log-probabilities: the ratio is exactly 1. Later updates of the batch reuse what it found.
- With several minibatches a batch, pi_old and the rewards come from a forward of their own before the first update, or
  from the rollout itself where its numbers are the trainer's (`scored_in_rollout`).
- The closing tag is part of a thought that sampled it. A thought at the cap has it appended, without gradient.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlp_jax import objective
from rlp_jax.config import Config
from rlp_jax.data.positions import candidates, choose_positions
from rlp_jax.data.template import TemplateTokens
from rlp_jax.learner import (
    Batch,
    Learner,
    Part,
    Samples,
    Scores,
    merge_groups,
    prefix_length,
    split_documents,
    split_groups,
    token_filter,
)
from rlp_jax.models.quantised import quantise
from rlp_jax.models.transformer import LanguageModel, Params, cast_kernels
from rlp_jax.optimizer import apply_gradient
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.sampling import Rollout, thought_keys
from rlp_jax.sharding import document_shards, in_rollout_layout, over
from rlp_jax.state import Purpose, TrainState


def sample(
    model: LanguageModel,
    template: TemplateTokens,
    config: Config,
    params: Params,
    ema_params: Params,
    batch: Batch,
    key: jax.Array,
) -> Samples:
    """Positions, thoughts and the baseline's scores for a batch of documents."""
    rlp, tokens_BT = config.rlp, batch["tokens_BT"]
    plain = scoring.read_plain(model, ema_params, tokens_BT, template)
    entropy_BT = scoring.baseline_entropy(model, ema_params, plain) if rlp.position_mode == "entropy" else None
    candidate_BT = candidates(batch["length_B"], batch["span_BT"], template.first, rlp.horizon, rlp.position_mode)
    position_BK, valid_BK = choose_positions(
        jax.random.fold_in(key, Purpose.POSITIONS), batch["document_B"], candidate_BT, entropy_BT, rlp.positions
    )
    target_BKH = scoring.targets(tokens_BT, position_BK, rlp.horizon)
    s_ema_BKH, _ = scoring.baseline_logprob(model, ema_params, plain, position_BK, target_BKH)

    key_BKG = thought_keys(jax.random.fold_in(key, Purpose.THOUGHTS), batch["document_B"], position_BK, rlp.group_size)
    scored = target_BKH if scored_in_rollout(model, config) else None
    rollout = think(model, template, config, params, tokens_BT, position_BK, key_BKG, scored)
    thoughts = (split_groups(x, rlp.group_size) for x in rollout[:4])
    s_pred_BKG = None
    if scored is not None:
        s_pred_BKG = objective.sequence_logprob(split_groups(rollout.target_logprob_BRH, rlp.group_size))
    return Samples(position_BK, valid_BK, s_ema_BKH, *thoughts, s_pred_BKG)


def scored_in_rollout(model: LanguageModel, config: Config) -> bool:
    """Whether the rollout finds S_pred, and its log pi serves as log pi_old, so that the learner reads nothing before
    its first update.

    With one minibatch the gradient's own forward gives both at no cost, and the ratio starts at exactly 1. With several
    the rollout is as good where it computes what the trainer does: every thought still has its keys at the end (a slot
    each), in float32 (bfloat16 is off by percents from one program to another), and nobody asked to weigh the
    difference between sampler and trainer.
    """
    rlp = config.rlp
    enough_slots = rlp.slots == 0 or rlp.slots >= rlp.positions * rlp.group_size
    exact = model.config.compute_dtype == "float32" and rlp.rollout_dtype in (None, "float32")
    return rlp.minibatches > 1 and enough_slots and exact and rlp.importance_cap == 0


def think(
    model: LanguageModel,
    template: TemplateTokens,
    config: Config,
    params: Params,
    tokens_BT: jax.Array,
    position_BK: jax.Array,
    key_BKG: jax.Array,
    target_BKH: jax.Array | None = None,
    ends: jax.Array | None = None,
) -> Rollout:
    """Samples G thoughts at each position, as the settings say: [B, R] thoughts, R = K·G. Scores the true tokens after
    them too if they are given. `ends` is the engine's."""
    rlp, group_size = config.rlp, key_BKG.shape[-1]
    if rlp.rollout_dtype == "int8":
        model, params = quantise(model, params)
    elif rlp.rollout_dtype not in (None, model.config.compute_dtype):
        model, params = model.in_dtype(rlp.rollout_dtype), cast_kernels(params, rlp.rollout_dtype)
    with jax.named_scope("prefill"):
        stops_BK = prefix_length(template, position_BK, 1)
        _, cache = model.hidden(params, scoring.with_context(tokens_BT, template.context), stops_BK=stops_BK)

    def sample(params, cache, prefix_BR, key_BR, target_BRH):
        return sample_thoughts(
            model, params, cache, prefix_BR, template.open, template.close, key_BR, rlp.thought_tokens, rlp.temperature,
            group_size=group_size, slots=rlp.slots or None, keep=token_filter(config), target_BRH=target_BRH,
            ends=ends,
        )  # fmt: skip

    prefix_BR = prefix_length(template, position_BK, group_size)
    target_BRH = None if target_BKH is None else jnp.repeat(target_BKH, group_size, 1)
    rows = prefix_BR, merge_groups(key_BKG), target_BRH
    return in_rollout_layout(config.mesh, model.config.compute_dtype, sample, params, cache, *rows)


def learn(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    state: TrainState,
    batch: Batch,
    samples: Samples,
    reference_params: Params | None = None,
    shards: int = 1,
) -> tuple[TrainState, dict[str, jax.Array], Scores]:
    """Rewards, advantages and `updates_per_batch` passes of `minibatches` optimizer steps on one rollout batch.

    Returns:
      The new state (an update that was not finite leaves it as it is), float32 scalar metrics of the last update
      (`logprob_gap` of the first, whose parameters sampled), and the rewards.
    """
    rlp, step = config.rlp, state.step + 1
    learner = Learner(model, template, config, shards)

    def update(state, part):
        grads, metrics, scores = learner.gradient(state.params, reference_params, part)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["reward_mean"])
        # A judge may leave nothing to learn from; momentum would move parameters even so.
        useful = finite if part.samples.verdict is None else finite & part.samples.valid_BK.any()
        state = apply_gradient(optimizer, rlp.ema_decay, state, step, grads, useful)
        return state, metrics | {"grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}, scores

    whole = Part(batch, samples, None)
    if rlp.minibatches == 1:
        for _ in range(rlp.updates_per_batch):
            state, metrics, scores = update(state, whole)
            whole = whole._replace(scores=scores)
        return state, metrics, scores

    scores = learner.scores(state.params, whole)
    shares = split_documents(whole._replace(scores=scores), rlp.minibatches)

    def one_pass(state, _):
        def one_share(state, share):
            state, metrics, _ = update(state, share)
            return state, metrics

        return jax.lax.scan(one_share, state, shares)

    state, metrics = jax.lax.scan(one_pass, state, length=rlp.updates_per_batch)
    last = jax.tree.map(lambda x: x[-1, -1], metrics)
    of_all = {"finite": metrics["finite"].min(), "logprob_gap": metrics["logprob_gap"][0, 0]}
    return state, last | of_all, scores


class Step:
    """The two jitted halves of a step.

    `sample(params, ema_params, batch, key) -> Samples` and
    `learn(state, batch, samples) -> (state, metrics, Scores)`, which donates the state.
    """

    judge = None  # the reward is a likelihood

    def __init__(self, model, optimizer, template, config, reference_params=None, mesh=None):
        def _sample(params, ema_params, batch, key):
            with over(mesh):
                return sample(model, template, config, params, ema_params, batch, key)

        def _learn(state, batch, samples, reference_params):
            given = state, batch, samples, reference_params, document_shards(mesh)
            with over(mesh):
                return learn(model, optimizer, template, config, *given)

        self.sample = jax.jit(_sample)
        jitted = jax.jit(_learn, donate_argnums=0)
        self.learn = lambda state, batch, samples: jitted(state, batch, samples, reference_params)


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    reference_params: Params | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """Compiles the algorithm for a model and its settings.

    Args:
      reference_params: what the KL term of `rlp.kl_coefficient` > 0 is measured against (the parameters at the start).
      mesh: over which state and batches are placed (`sharding.py`), None on one device.

    Raises:
      ValueError: a KL coefficient without reference parameters.
    """
    if config.rlp.kl_coefficient > 0 and reference_params is None:
        raise ValueError(f"rlp.kl_coefficient is {config.rlp.kl_coefficient}: pass reference_params to measure it from")
    return Step(model, optimizer, template, config, reference_params, mesh)
