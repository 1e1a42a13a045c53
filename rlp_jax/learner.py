# SPDX-License-Identifier: Apache-2.0
"""The gradient of a batch of thoughts: equation (8) of arXiv 2510.01265, a part of the batch at a time.

Parts bound memory and are summed, so they do not change the gradient. For models of attention alone they are bins, into
which documents and thoughts are packed without padding (`rollout/packing.py`); how many are computed depends on the
lengths that came out. Recurrent layers cannot be packed: there a part is a few documents, their thoughts padded.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax import objective
from rlp_jax.config import Config
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.constraints import DOCUMENTS, constrain
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout import packing, scoring
from rlp_jax.rollout.filters import Filter
from rlp_jax.sharding import constrain_state

Batch = dict[str, jax.Array]
SPARE = 8  # a bin holds so many times more documents than would fit at their longest


class Verdict(NamedTuple):
    """What a judge outside the model says of a batch's thoughts, in place of the information gain.

    reward_BKG, advantage_BKG float32; weight_BKG float32, what each thought's term of equation (8) counts within its
    position (1/G is the paper's). tally: sums over a document [B] by name, for the metrics; the learner wants none.
    """

    reward_BKG: jax.Array
    advantage_BKG: jax.Array
    weight_BKG: jax.Array
    tally: dict[str, jax.Array]


class Samples(NamedTuple):
    """What a rollout leaves for the learner.

    position_BK int32, valid_BK bool (False: the document had too few positions, weight 0), s_ema_BKH the baseline's
    log-probabilities, thought_BKGL int32, length_BKG, stopped_BKG, logprob_BKGL by the sampler. s_pred_BKG where the
    rollout has scored its thoughts: then logprob_BKGL is log pi_old as well. verdict where rewards come from outside.
    """

    position_BK: jax.Array
    valid_BK: jax.Array
    s_ema_BKH: jax.Array
    thought_BKGL: jax.Array
    length_BKG: jax.Array
    stopped_BKG: jax.Array
    logprob_BKGL: jax.Array
    s_pred_BKG: jax.Array | None = None
    verdict: Verdict | None = None

    @property
    def sampled_B(self) -> jax.Array:
        """Tokens sampled over each document, those that a judge has left out included."""
        return self.length_BKG.sum((1, 2)) if self.verdict is None else self.verdict.tally["sampled_tokens"]


class Scores(NamedTuple):
    """Rewards of a batch: reward_BKG = s_pred_BKG - s_ema_BK in nats a scored token, or a verdict's; advantage_BKG; and
    the trainer's log pi_old of the thoughts, old_logprob_BKGL, which later updates of a batch are measured against."""

    reward_BKG: jax.Array
    advantage_BKG: jax.Array
    s_pred_BKG: jax.Array
    s_ema_BK: jax.Array
    old_logprob_BKGL: jax.Array


class Part(NamedTuple):
    """Some of a batch's documents. `scores` None: they are found on the way."""

    batch: Batch
    samples: Samples
    scores: Scores | None


class Bins(NamedTuple):
    """Each of `shards` runs of `per_shard` documents fills at most `most` bins, which hold up to `capacity` tokens and
    `documents` documents."""

    shards: int
    per_shard: int
    most: int
    capacity: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Learner:
    """What the gradient is taken of.

    Attributes:
      shards: in how many runs of neighbouring documents the batch is spread over devices. Each packs bins of its own,
        if they divide the batch.
    """

    model: LanguageModel
    template: TemplateTokens
    config: Config
    shards: int = 1

    @property
    def packs(self) -> bool:
        return self.model.config.hybrid is None

    def bins(self, parts: int, documents: int, tokens: int) -> "Bins":
        """The bins that `parts` parts of B documents of T tokens become."""
        rlp, template = self.config.rlp, self.template
        shards = self.shards if documents % self.shards == 0 else 1
        per_shard = documents // shards
        most = min(parts, per_shard)
        fit = -(-per_shard // most)  # this many of the longest go into a bin
        branch = packing.longest_branch(rlp.thought_tokens, template, rlp.horizon)
        longest = tokens + len(template.context) + rlp.positions * rlp.group_size * branch
        capacity = packing.bin_size(fit * longest)
        return Bins(shards, per_shard, most, capacity, min(SPARE * fit, per_shard))

    @jax.named_scope("gradient")
    def gradient(
        self, params: Params, reference_params: Params | None, whole: Part
    ) -> tuple[Params, dict[str, jax.Array], Scores]:
        """Gradient of the loss, metrics, and the scores (those of `whole`, or found here)."""
        samples = whole.samples
        total = jnp.maximum(samples.valid_BK.sum(), 1).astype(jnp.float32)
        loss_and_gradient = jax.value_and_grad(_loss, has_aux=True)

        def of_part(part, score):
            (loss, (sums, scores)), grads = loss_and_gradient(params, reference_params, self.config, part, score, total)
            return (constrain_state(grads), loss, sums), scores

        (grads, loss, sums), scores, computed = self._over_parts(self.config.rlp.microbatches, whole, of_part)
        needed = _needed_by_document(self.template, self.config, samples).sum().astype(jnp.float32)
        padding = 1.0 - needed / jnp.maximum(computed, 1.0)
        return grads, {"loss": loss, "padding": padding} | _metrics(sums, samples, scores), scores

    @jax.named_scope("scoring")
    def scores(self, params: Params, whole: Part) -> Scores:
        """Rewards and log pi_old without a gradient: from the rollout if it has found them, else by a forward."""
        if whole.samples.s_pred_BKG is not None:
            return _scores(self.config, whole.samples, whole.samples.s_pred_BKG, whole.samples.logprob_BKGL)

        def of_part(part, score):
            return (), _loss(params, None, self.config, part, score, jnp.ones(()))[1][1]

        parts = self.config.rlp.microbatches * self.config.rlp.minibatches
        return self._over_parts(parts, whole, of_part, "all_bins")[1]

    def _over_parts(
        self, parts: int, whole: Part, of_part: Callable, loop: str = "bins"
    ) -> tuple[Any, Scores, jax.Array]:
        if self.packs:
            return self._over_bins(parts, whole, of_part, loop)
        return self._over_documents(parts, whole, of_part)

    def _over_bins(self, parts: int, whole: Part, of_part: Callable, loop: str):
        """`of_part(part, score) -> (sums, scores)` of every bin that holds something: the sums' total, all documents'
        scores, and how many tokens were computed, padding included."""
        template, (B, T) = self.template, whole.batch["tokens_BT"].shape
        A, per_shard, bins, capacity, documents = self.bins(parts, B, T)
        tokens_AB = _needed_by_document(template, self.config, whole.samples).reshape(A, per_shard)
        index_APd, used_A = jax.vmap(lambda x: packing.assign(x, bins, capacity, documents))(tokens_AB)
        by_shard = in_shards(whole, A)

        def compute(index_Ad):
            part = take_rows(by_shard, jnp.minimum(index_Ad, per_shard - 1))
            part = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part)
            valid_BK = part.samples.valid_BK & (index_Ad < per_shard).reshape(-1, 1)
            part = part._replace(samples=part.samples._replace(valid_BK=valid_BK))
            sums, scores = of_part(part, functools.partial(self._score_bins, part, A, capacity))
            return sums, in_shards(scores, A)

        def one_bin(p, carry):
            totals, scores = carry
            sums, new = compute(index_APd[:, p])
            put = jax.vmap(lambda x, index_d, y: x.at[index_d].set(y, mode="drop"))
            scores = jax.tree.map(lambda x, y: put(x, index_APd[:, p], y), scores, new)
            return jax.tree.map(jnp.add, totals, sums), scores

        sums, new = jax.eval_shape(compute, index_APd[:, 0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        scores = jax.tree.map(lambda x: jnp.zeros((A, per_shard, *x.shape[2:]), x.dtype), new)
        used = used_A.max()
        with jax.named_scope(loop):
            totals, scores = jax.lax.fori_loop(0, used, one_bin, (zeros, scores))
        scores = jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), scores)
        return totals, scores, (used * A * capacity).astype(jnp.float32)

    def _score_bins(self, part: Part, shards: int, capacity: int, params: Params) -> scoring.BranchScores:
        """log pi and the true tokens' log-probabilities of a part's documents, [B, K, G, ...]."""
        rlp, samples, template = self.config.rlp, part.samples, self.template
        tokens_BT = scoring.with_context(part.batch["tokens_BT"], template.context)
        target_BRH, thoughts, prefix_BR = _branches(template, self.config, part)
        present_BR = jnp.repeat(samples.valid_BK, rlp.group_size, 1)
        inputs = jax.tree.map(
            lambda x: x.reshape(shards, -1, *x.shape[1:]), (tokens_BT, prefix_BR, present_BR, thoughts, target_BRH)
        )
        bins = jax.vmap(lambda inputs: packing.pack(*inputs, template, capacity))(inputs)
        thought_AdRL, target_AdRH = inputs[3].thought_BRL, inputs[4]
        scored = packing.score_bins(
            self.model, params, bins, thought_AdRL, target_AdRH, rlp.temperature, token_filter(self.config)
        )
        scored = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scored)
        return jax.tree.map(lambda x: split_groups(x, rlp.group_size), scored)

    def _over_documents(self, parts: int, whole: Part, of_part: Callable):
        """The same for padded parts of a few documents.

        Of each shard documents with thoughts of like length come together, and a part is computed at the first of
        `length_limits` that holds its thoughts: padding then costs less, and the numbers stay.
        """
        rlp, L = self.config.rlp, whole.samples.thought_BKGL.shape[-1]
        B, T = whole.batch["tokens_BT"].shape[0], whole.batch["tokens_BT"].shape[1] + len(self.template.context)
        limits = length_limits(L)

        def at_limit(limit, part):
            samples = part.samples
            samples = samples._replace(
                thought_BKGL=samples.thought_BKGL[..., :limit], logprob_BKGL=samples.logprob_BKGL[..., :limit]
            )
            scores = part.scores
            if scores is not None:
                scores = scores._replace(old_logprob_BKGL=scores.old_logprob_BKGL[..., :limit])
            part = Part(part.batch, samples, scores)
            sums, scores = of_part(part, functools.partial(self._score_documents, part))
            beyond = [(0, 0)] * 3 + [(0, L - limit)]
            branch = packing.longest_branch(limit, self.template, rlp.horizon)
            computed = part.samples.length_BKG.size * branch + samples.length_BKG.shape[0] * T
            scores = scores._replace(old_logprob_BKGL=jnp.pad(scores.old_logprob_BKGL, beyond))
            return sums, scores, jnp.asarray(computed, jnp.float32)

        def one_part(totals, part):
            needed = sum((part.samples.length_BKG.max() > limit).astype(jnp.int32) for limit in limits[:-1])
            branches = [functools.partial(at_limit, limit) for limit in limits]
            sums, scores, computed = jax.lax.switch(needed, branches, part) if len(limits) > 1 else branches[0](part)
            return jax.tree.map(jnp.add, totals, (sums, computed)), scores

        A = self.shards if B % (self.shards * parts) == 0 else 1
        order_AB = jnp.argsort(in_shards(whole.samples.length_BKG.max((1, 2)), A))

        def cut(x_AB):  # a part takes as many documents of every shard
            x = x_AB.reshape(A, parts, -1, *x_AB.shape[2:]).swapaxes(0, 1)
            return constrain(x.reshape(parts, -1, *x_AB.shape[2:]), None, DOCUMENTS)

        def join(x):
            x = x.reshape(parts, A, -1, *x.shape[2:]).swapaxes(0, 1)
            return x.reshape(A, -1, *x.shape[3:])

        split = jax.tree.map(cut, take_rows(in_shards(whole, A), order_AB))
        one = jax.tree.map(lambda x: x[0], split)
        sums, _, computed = jax.eval_shape(functools.partial(at_limit, L), one)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, computed))
        (totals, computed), scores = jax.lax.scan(one_part, zeros, split)
        scores = take_rows(jax.tree.map(join, scores), jnp.argsort(order_AB))
        return totals, jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), scores), computed

    def _score_documents(self, part: Part, params: Params) -> scoring.BranchScores:
        rlp, template = self.config.rlp, self.template
        tokens_BT = scoring.with_context(part.batch["tokens_BT"], template.context)
        target_BRH, thoughts, prefix_BR = _branches(template, self.config, part)
        stops_BK = prefix_length(template, part.samples.position_BK, 1)
        _, cache = self.model.hidden(params, tokens_BT, stops_BK=stops_BK)
        scored = scoring.score_branches(
            self.model, params, cache, prefix_BR, thoughts, target_BRH, template, rlp.temperature,
            token_filter(self.config),
        )  # fmt: skip
        return jax.tree.map(lambda x: split_groups(x, rlp.group_size), scored)


def length_limits(thought_tokens: int) -> tuple[int, ...]:
    """Lengths a padded part may be computed at, ascending; the last is the cap. Each costs a compilation, so short
    caps get none but themselves."""
    return (thought_tokens // 4, thought_tokens // 2, thought_tokens) if thought_tokens >= 64 else (thought_tokens,)


def _branches(template: TemplateTokens, config: Config, part: Part):
    """Targets, thoughts and prefix lengths of a part's branches."""
    samples, G = part.samples, config.rlp.group_size
    target_BKH = scoring.targets(part.batch["tokens_BT"], samples.position_BK, config.rlp.horizon)
    thoughts = scoring.Thoughts(*map(merge_groups, (samples.thought_BKGL, samples.length_BKG, samples.stopped_BKG)))
    return jnp.repeat(target_BKH, G, 1), thoughts, prefix_length(template, samples.position_BK, G)


def _needed_by_document(template: TemplateTokens, config: Config, samples: Samples) -> jax.Array:
    """Tokens that each document's gradient reads: what its last position sees, and all its branches."""
    thoughts = scoring.Thoughts(samples.thought_BKGL, samples.length_BKG, samples.stopped_BKG)
    branches_BK = packing.branch_tokens(thoughts, template, config.rlp.horizon).sum(-1)
    prefix_BK = prefix_length(template, samples.position_BK, 1)
    read_B = jnp.where(samples.valid_BK, prefix_BK, 0).max(-1)
    return read_B + jnp.where(samples.valid_BK, branches_BK, 0).sum(-1)


def _loss(params, reference_params, config: Config, part: Part, score: Callable, total: jax.Array):
    """Equation (8) for a part of the batch, with sums for the metrics and the scores.

    `score(params)` gives the part's `BranchScores`, [B, K, G, ...]; `total` is the batch's number of positions.
    """
    rlp, samples, scores = config.rlp, part.samples, part.scores
    scored = score(params)
    logprob_BKGL = scored.logprob_BRL
    if scores is None:
        s_pred_BKG = objective.sequence_logprob(scored.target_logprob_BRH)
        scores = jax.lax.stop_gradient(_scores(config, samples, s_pred_BKG, logprob_BKGL))

    mask_BKGL = jnp.arange(samples.thought_BKGL.shape[-1]) < samples.length_BKG[..., None]
    weight_BKG = jnp.broadcast_to(samples.valid_BK[..., None], samples.length_BKG.shape) / (total * rlp.group_size)
    counted_BKGL = mask_BKGL & samples.valid_BK[..., None, None]
    if samples.verdict is not None:
        weight_BKG = jnp.where(samples.valid_BK[..., None], samples.verdict.weight_BKG, 0.0) / total
        counted_BKGL &= samples.verdict.weight_BKG[..., None] > 0
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
    if rlp.kl_coefficient > 0 and reference_params is not None:
        reference_BKGL = score(jax.lax.stop_gradient(reference_params)).logprob_BRL
        kl = jnp.sum(weight_BKG * objective.token_kl(logprob_BKGL, reference_BKGL, mask_BKGL))
        loss = loss + rlp.kl_coefficient * kl

    clipped = objective.clip_fraction(ratio_BKGL, scores.advantage_BKG, counted_BKGL, rlp.clip_low, rlp.clip_high)
    tokens = counted_BKGL.sum().astype(jnp.float32)
    # Where the sampler's own numbers are log pi_old, the trainer's are this forward's: the same in the first update.
    trainer_BKGL = scores.old_logprob_BKGL if samples.s_pred_BKG is None else logprob_BKGL
    sums = {
        "tokens": tokens,
        "entropy": jnp.sum(jnp.where(counted_BKGL, scored.entropy_BRL, 0.0)),
        "clip_fraction": clipped * tokens,
        "logprob_gap": jnp.sum(jnp.where(counted_BKGL, jnp.abs(trainer_BKGL - samples.logprob_BKGL), 0.0)),
        "kl": kl,
    }
    return loss, (jax.lax.stop_gradient(sums), scores)


def _scores(config: Config, samples: Samples, s_pred_BKG: jax.Array, logprob_BKGL: jax.Array) -> Scores:
    s_ema_BK = objective.sequence_logprob(samples.s_ema_BKH)
    if (verdict := samples.verdict) is not None:
        nothing_BKG = jnp.zeros_like(verdict.reward_BKG)  # what comes after a response is no reward
        return Scores(verdict.reward_BKG, verdict.advantage_BKG, nothing_BKG, s_ema_BK, logprob_BKGL)
    if config.rlp.reward == "likelihood":
        reward_BKG = jax.lax.stop_gradient(s_pred_BKG)
    else:
        reward_BKG = objective.information_gain(s_pred_BKG, s_ema_BK)
    advantage = objective.group_normalised_advantage if config.rlp.normalise else objective.group_relative_advantage
    return Scores(reward_BKG, advantage(reward_BKG), s_pred_BKG, s_ema_BK, logprob_BKGL)


def _metrics(sums, samples: Samples, scores: Scores) -> dict[str, jax.Array]:
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


def token_filter(config: Config) -> Filter:
    """Which tokens thoughts may be drawn from."""
    return Filter(config.rlp.top_k, config.rlp.top_p, config.rlp.min_p)


def prefix_length(template: TemplateTokens, position_BK: jax.Array, group_size: int) -> jax.Array:
    """Tokens that each branch sees before its opening tag: instruction and x_<t, [B, K·G]."""
    return jnp.repeat(position_BK + len(template.context), group_size, 1)


def split_documents(tree, parts: int):
    """Leaves [B, ...] to [parts, B / parts, ...]: document b to part b mod `parts`, so that each part has as many of
    every device's, which are neighbours, and none moves."""
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)
    return constrain(split, None, DOCUMENTS)


def in_shards(tree, shards: int):
    """Leaves [B, ...] to [A, B / A, ...], a shard's documents together."""
    return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), tree)


def take_rows(tree, index_Ad: jax.Array):
    """Rows of every shard, leaves [A, B / A, ...] to [A, d, ...], each from its own: no device needs another's."""
    return jax.tree.map(lambda x: jax.vmap(lambda rows, index_d: rows[index_d])(x, index_Ad), tree)


def merge_groups(x_BKG: jax.Array) -> jax.Array:
    """[B, K, G, ...] to [B, R, ...]."""
    return x_BKG.reshape(x_BKG.shape[0], -1, *x_BKG.shape[3:])


def split_groups(x_BR: jax.Array, group_size: int) -> jax.Array:
    """[B, R, ...] to [B, K, G, ...]."""
    return x_BR.reshape(x_BR.shape[0], -1, group_size, *x_BR.shape[2:])
