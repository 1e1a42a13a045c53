"""One RLP step: choose positions, sample thoughts, score them against the baseline, learn.

Algorithm 1 of arXiv 2510.01265. Where it departs from the letter of the paper:
- The reward needs log p(x_t | prefix, thought), the learner needs log pi of the thought under the same parameters. One
  forward gives both, so the first update of a batch computes rewards, advantages and gradients in a single pass, with
  pi_old the trainer's own log-probabilities: the ratio is exactly 1. Later updates of the batch reuse what it found.
- With several minibatches a batch, pi_old and the rewards come from a forward of their own before the first update.
- The closing tag is part of a thought that sampled it. A thought at the cap has it appended, without gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlp_jax import objective
from rlp_jax.config import Config
from rlp_jax.data.positions import candidates, choose_positions
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.transformer import LanguageModel, Params, cast_kernels
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.filters import Filter
from rlp_jax.rollout.sampling import Rollout, thought_keys
from rlp_jax.state import Purpose, TrainState

Batch = dict[str, jax.Array]


class Samples(NamedTuple):
    """What a rollout leaves for the learner.

    position_BK int32, valid_BK bool (False: the document had too few positions, weight 0), s_ema_BKH the baseline's
    log-probabilities, thought_BKGL int32, length_BKG, stopped_BKG, logprob_BKGL by the sampler.
    """

    position_BK: jax.Array
    valid_BK: jax.Array
    s_ema_BKH: jax.Array
    thought_BKGL: jax.Array
    length_BKG: jax.Array
    stopped_BKG: jax.Array
    logprob_BKGL: jax.Array


class Scores(NamedTuple):
    """Rewards of a batch: reward_BKG = s_pred_BKG - s_ema_BK in nats a scored token; advantage_BKG; and the trainer's
    log pi_old of the thoughts, old_logprob_BKGL, which later updates of the batch are measured against."""

    reward_BKG: jax.Array
    advantage_BKG: jax.Array
    s_pred_BKG: jax.Array
    s_ema_BK: jax.Array
    old_logprob_BKGL: jax.Array


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
    rollout = think(model, template, config, params, tokens_BT, position_BK, key_BKG)
    thought_BKGL, length_BKG, stopped_BKG, logprob_BKGL = (_split(x, rlp.group_size) for x in rollout)
    return Samples(position_BK, valid_BK, s_ema_BKH, thought_BKGL, length_BKG, stopped_BKG, logprob_BKGL)


def think(
    model: LanguageModel,
    template: TemplateTokens,
    config: Config,
    params: Params,
    tokens_BT: jax.Array,
    position_BK: jax.Array,
    key_BKG: jax.Array,
) -> Rollout:
    """Samples G thoughts at each position, as the settings say: [B, R] thoughts, R = K·G."""
    rlp, group_size = config.rlp, key_BKG.shape[-1]
    if rlp.rollout_dtype not in (None, model.config.compute_dtype):
        model, params = model.in_dtype(rlp.rollout_dtype), cast_kernels(params, rlp.rollout_dtype)
    _, cache = model.hidden(
        params, scoring.with_context(tokens_BT, template.context), stops_BK=prefix_length(template, position_BK, 1)
    )
    return sample_thoughts(
        model, params, cache, prefix_length(template, position_BK, group_size), template.open, template.close,
        _merge(key_BKG), rlp.thought_tokens, rlp.temperature, group_size=group_size, slots=rlp.slots or None,
        keep=token_filter(config),
    )  # fmt: skip


def token_filter(config: Config) -> Filter:
    """Which tokens thoughts may be drawn from."""
    return Filter(config.rlp.top_k, config.rlp.top_p, config.rlp.min_p)


def learn(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    state: TrainState,
    batch: Batch,
    samples: Samples,
    reference_params: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array], Scores]:
    """Rewards, advantages and `updates_per_batch` passes of `minibatches` optimizer steps on one rollout batch.

    Returns:
      The new state (an update that was not finite leaves it as it is), float32 scalar metrics of the last update, and
      the rewards.
    """
    rlp, step = config.rlp, state.step + 1

    def update(state, batch, samples, scores):
        grads, metrics, scores = _gradient(
            model, template, config, state.params, batch, samples, reference_params, scores
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["reward_mean"])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = objective.ema_update(state.ema_params, params, config.rlp.ema_decay)
        proposed = TrainState(step, params, ema_params, opt_state)
        state = _choose(finite, proposed, state._replace(step=step))
        return state, metrics | {"grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}, scores

    if rlp.minibatches == 1:
        scores = None
        for _ in range(rlp.updates_per_batch):
            state, metrics, scores = update(state, batch, samples, scores)
        return state, metrics, scores

    scores = _over_microbatches(
        rlp.microbatches * rlp.minibatches,
        lambda part: _loss(model, template, config, state.params, *part, reference_params, jnp.ones(()))[1][1],
        (batch, samples, None),
    )
    shares = _split_documents((batch, samples, scores), rlp.minibatches)

    def one_pass(state, _):
        def one_share(state, share):
            state, metrics, _ = update(state, *share)
            return state, metrics

        return jax.lax.scan(one_share, state, shares)

    state, metrics = jax.lax.scan(one_pass, state, length=rlp.updates_per_batch)
    last = jax.tree.map(lambda x: x[-1, -1], metrics)
    return state, last | {"finite": metrics["finite"].min()}, scores


def _split_documents(tree, parts: int):
    """Leaves [B, ...] to [parts, B / parts, ...]."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


def _over_microbatches(parts: int, fn, tree):
    """`fn` of the documents' parts in turn, its results put together again, [B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(fn, _split_documents(tree, parts)))


def _choose(condition: jax.Array, a: TrainState, b: TrainState) -> TrainState:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _gradient(model, template, config, params, batch, samples, reference_params, scores):
    """Gradient of equation (8) over the batch, summed over microbatches of whole documents.

    Documents with thoughts of like length come together, and each microbatch is computed at the first of
    `length_limits` that holds its thoughts: padding then costs little, and the numbers stay.
    """
    parts = config.rlp.microbatches
    total = jnp.maximum(samples.valid_BK.sum(), 1).astype(jnp.float32)
    grad_fn = jax.value_and_grad(_loss, argnums=3, has_aux=True)
    limits = length_limits(config.rlp.thought_tokens)

    def at_limit(limit, part):
        batch, samples, scores = part
        samples = samples._replace(
            thought_BKGL=samples.thought_BKGL[..., :limit], logprob_BKGL=samples.logprob_BKGL[..., :limit]
        )
        if scores is not None:
            scores = scores._replace(old_logprob_BKGL=scores.old_logprob_BKGL[..., :limit])
        (loss, (sums, scores)), grads = grad_fn(
            model, template, config, params, batch, samples, scores, reference_params, total
        )
        beyond = [(0, 0)] * 3 + [(0, config.rlp.thought_tokens - limit)]
        return grads, loss, (sums, scores._replace(old_logprob_BKGL=jnp.pad(scores.old_logprob_BKGL, beyond)))

    def one_part(carry, part):
        needed = sum((part[1].length_BKG.max() > limit).astype(jnp.int32) for limit in limits[:-1])
        branches = [functools.partial(at_limit, limit) for limit in limits]
        grads, loss, aux = jax.lax.switch(needed, branches, part) if len(limits) > 1 else branches[0](part)
        return jax.tree.map(jnp.add, carry, (grads, loss)), aux

    order_B = jnp.argsort(samples.length_BKG.max((1, 2)))
    chunked = _split_documents(jax.tree.map(lambda x: x[order_B], (batch, samples, scores)), parts)
    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    (grads, loss), (sums, scores) = jax.lax.scan(one_part, start, chunked)
    back_B = jnp.argsort(order_B)
    scores = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[back_B], scores)
    sums = jax.tree.map(lambda x: x.sum(0), sums)
    return grads, {"loss": loss} | _metrics(config, sums, samples, scores), scores


def length_limits(thought_tokens: int) -> tuple[int, ...]:
    """Lengths a microbatch may be computed at, ascending; the last is the cap. Each costs a compilation, so short
    caps get none but themselves."""
    return (thought_tokens // 4, thought_tokens // 2, thought_tokens) if thought_tokens >= 64 else (thought_tokens,)


def _loss(model, template, config, params, batch, samples, scores, reference_params, total):
    """Equation (8) for some of the batch's documents, with sums for the metrics and the rewards."""
    rlp = config.rlp
    tokens_BT = scoring.with_context(batch["tokens_BT"], template.context)
    prefix_BR = prefix_length(template, samples.position_BK, rlp.group_size)
    target_BKH = scoring.targets(batch["tokens_BT"], samples.position_BK, rlp.horizon)
    thoughts = scoring.Thoughts(*map(_merge, (samples.thought_BKGL, samples.length_BKG, samples.stopped_BKG)))

    def score(params):
        _, cache = model.hidden(params, tokens_BT, stops_BK=prefix_length(template, samples.position_BK, 1))
        scored = scoring.score_branches(
            model, params, cache, prefix_BR, thoughts, jnp.repeat(target_BKH, rlp.group_size, 1), template,
            rlp.temperature, token_filter(config),
        )  # fmt: skip
        return jax.tree.map(lambda x: _split(x, rlp.group_size), scored)

    scored = score(params)
    logprob_BKGL = scored.logprob_BRL
    if scores is None:
        s_pred_BKG = objective.sequence_logprob(scored.target_logprob_BRH)
        s_ema_BK = objective.sequence_logprob(samples.s_ema_BKH)
        reward_BKG = objective.information_gain(s_pred_BKG, s_ema_BK)
        advantage_BKG = objective.group_relative_advantage(reward_BKG)
        scores = Scores(reward_BKG, advantage_BKG, s_pred_BKG, s_ema_BK, logprob_BKGL)
        scores = jax.lax.stop_gradient(scores)

    mask_BKGL = jnp.arange(samples.thought_BKGL.shape[-1]) < samples.length_BKG[..., None]
    weight_BKG = jnp.broadcast_to(samples.valid_BK[..., None], samples.length_BKG.shape) / (total * rlp.group_size)
    ratio_BKGL = objective.importance_ratio(logprob_BKGL, scores.old_logprob_BKGL, mask_BKGL)
    weight_BKGL = None
    if rlp.importance_cap > 0:
        weight_BKGL = objective.truncated_importance_weight(
            scores.old_logprob_BKGL, samples.logprob_BKGL, mask_BKGL, rlp.importance_cap
        )
    surrogate_BKG = objective.clipped_surrogate(
        ratio_BKGL, scores.advantage_BKG, mask_BKGL, rlp.clip_low, rlp.clip_high, weight_BKGL
    )
    loss = jnp.sum(weight_BKG * surrogate_BKG)
    kl = jnp.zeros(())
    if rlp.kl_coefficient > 0:
        reference_BKGL = score(jax.lax.stop_gradient(reference_params)).logprob_BRL
        kl = jnp.sum(weight_BKG * objective.token_kl(logprob_BKGL, reference_BKGL, mask_BKGL))
        loss = loss + rlp.kl_coefficient * kl

    counted_BKGL = mask_BKGL & samples.valid_BK[..., None, None]
    clipped = objective.clip_fraction(ratio_BKGL, scores.advantage_BKG, counted_BKGL, rlp.clip_low, rlp.clip_high)
    tokens = counted_BKGL.sum().astype(jnp.float32)
    sums = {
        "tokens": tokens,
        "entropy": jnp.sum(jnp.where(counted_BKGL, scored.entropy_BRL, 0.0)),
        "clip_fraction": clipped * tokens,
        "logprob_gap": jnp.sum(jnp.where(counted_BKGL, jnp.abs(scores.old_logprob_BKGL - samples.logprob_BKGL), 0.0)),
        "kl": kl,
    }
    return loss, (jax.lax.stop_gradient(sums), scores)


def _metrics(config, sums, samples, scores) -> dict[str, jax.Array]:
    per_token = {
        name: sums[name] / jnp.maximum(sums["tokens"], 1.0) for name in ("entropy", "clip_fraction", "logprob_gap")
    }
    weight_BKG = jnp.broadcast_to(samples.valid_BK[..., None], samples.length_BKG.shape).astype(jnp.float32)

    def mean(value_BKG):
        return jnp.sum(jnp.where(weight_BKG > 0, value_BKG, 0.0)) / jnp.maximum(weight_BKG.sum(), 1.0)

    spread_BK1 = scores.reward_BKG.std(-1, keepdims=True)
    return per_token | {
        "kl": sums["kl"],
        "reward_mean": mean(scores.reward_BKG),
        "reward_std": mean(jnp.broadcast_to(spread_BK1, weight_BKG.shape)),  # inside a group
        "s_pred": mean(scores.s_pred_BKG),
        "s_ema": mean(jnp.broadcast_to(scores.s_ema_BK[..., None], weight_BKG.shape)),
        "thought_len": mean(samples.length_BKG.astype(jnp.float32)),
        "stop_rate": mean(samples.stopped_BKG.astype(jnp.float32)),
        "thought_tokens": sums["tokens"],
        "positions": samples.valid_BK.sum().astype(jnp.float32),
    }


class Step:
    """The two jitted halves of a step.

    `sample(params, ema_params, batch, key) -> Samples` and
    `learn(state, batch, samples) -> (state, metrics, Scores)`, which donates the state.
    """

    def __init__(self, model, optimizer, template, config, reference_params=None):
        def _sample(params, ema_params, batch, key):
            return sample(model, template, config, params, ema_params, batch, key)

        def _learn(state, batch, samples, reference_params):
            return learn(model, optimizer, template, config, state, batch, samples, reference_params)

        self.sample = jax.jit(_sample)
        jitted = jax.jit(_learn, donate_argnums=0)
        self.learn = lambda state, batch, samples: jitted(state, batch, samples, reference_params)


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    reference_params: Params | None = None,
) -> Step:
    """Compiles the algorithm for a model and its settings.

    Args:
      reference_params: what the KL term of `rlp.kl_coefficient` > 0 is measured against (the parameters at the start).

    Raises:
      ValueError: a KL coefficient without reference parameters.
    """
    if config.rlp.kl_coefficient > 0 and reference_params is None:
        raise ValueError(f"rlp.kl_coefficient is {config.rlp.kl_coefficient}: pass reference_params to measure it from")
    return Step(model, optimizer, template, config, reference_params)


def prefix_length(template: TemplateTokens, position_BK: jax.Array, group_size: int) -> jax.Array:
    """Tokens that each branch sees before its opening tag: instruction and x_<t, [B, K·G]."""
    return jnp.repeat(position_BK + len(template.context), group_size, 1)


def _merge(x_BKG: jax.Array) -> jax.Array:
    """[B, K, G, ...] to [B, R, ...]."""
    return x_BKG.reshape(x_BKG.shape[0], -1, *x_BKG.shape[3:])


def _split(x_BR: jax.Array, group_size: int) -> jax.Array:
    """[B, R, ...] to [B, K, G, ...]."""
    return x_BR.reshape(x_BR.shape[0], -1, group_size, *x_BR.shape[2:])
