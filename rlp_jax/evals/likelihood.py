# SPDX-License-Identifier: Apache-2.0
"""Does thinking pay on held-out text? The information gain of sampled thoughts beside its two controls.

- empty: opening and closing tag with nothing between. What it gains is format.
- shuffled: the thought of another document. What it gains beyond the empty one is generic.
- What sampled thoughts gain beyond both is content.

All are scored by the same forward, side by side as branches of one document. Every figure is in nats a scored token,
against the no-think baseline (equation 5 of arXiv 2510.01265); intervals are 95% over documents.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.config import Config, EvalConfig, MeshConfig, RLPConfig
from rlp_jax.data.positions import candidates, choose_positions
from rlp_jax.data.template import TemplateTokens
from rlp_jax.distributed import fetch
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.filters import Filter
from rlp_jax.rollout.sampling import thought_keys
from rlp_jax.sharding import in_rollout_layout, mesh_of, over


def evaluate(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    batches: Iterable[dict[str, Any]],
    template: TemplateTokens,
    config: Config,
    key: jax.Array,
) -> dict[str, Any]:
    """Think about held-out documents and measure what it is worth.

    Args:
      params, ema_params: policy and no-think baseline.
      batches: held-out batches; rows with `weight_B` 0 do not count.
      config: `eval.positions` positions a document with `eval.group_size` thoughts each; the rest as in training.
      key: the same key gives the same positions and, for equal parameters, the same thoughts.

    Returns:
      A flat dict: gain, gain_empty, gain_shuffled (nats a scored token) and their `_ci95` [low, high] over documents,
      gain_over_empty and gain_over_shuffled with intervals (paired by document), ce_think, ce_empty, ce_shuffled,
      ce_no_think (the baseline), ce_no_think_policy (the policy without a thought), acc_* likewise (top-1, share of
      scored tokens), thought_len (tokens), stop_rate, documents.

    Raises:
      ValueError: a batch with fewer than 2 different documents (no other one's thought to shuffle in), or none counted.
    """
    rows = [of_documents(model, params, ema_params, batch, template, config, key) for batch in batches]
    if not any(len(row["ce_think"]) for row in rows):
        raise ValueError("no held-out document has a position to score: check data.span and rlp.position_mode")
    columns = {name: np.concatenate([row[name] for row in rows]).astype(np.float64) for name in rows[0]}
    return summarise(columns)


def of_documents(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    batch: dict[str, Any],
    template: TemplateTokens,
    config: Config,
    key: jax.Array,
) -> dict[str, np.ndarray]:
    """What `summarise` takes the means of, for the documents of one batch that count: ce_*, acc_*, thought_len and
    stop_rate, each [documents]. Arguments as those of `evaluate`.

    Raises:
      ValueError: the batch has fewer than 2 different documents.
    """
    check_batch(batch)
    with over(mesh_of(params)):
        settings = config.rlp, config.eval, config.mesh
        out = _evaluate_batch(model, template, *settings, params, ema_params, batch, key)
    out = fetch(out)
    counted = out.pop("counted_B") & (fetch(batch.get("weight_B", np.ones(len(out["ce_think"])))) > 0)
    return {name: value[counted] for name, value in out.items()}


def check_batch(batch: dict[str, Any]) -> None:
    """Raises ValueError where a batch has no two different documents."""
    if len(np.unique(fetch(batch["document_B"]))) < 2:
        raise ValueError(
            "a held-out batch holds one document: the shuffled control needs another one's thought, so raise "
            "eval.batch_documents (and eval.documents) to at least 2"
        )


def summarise(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means over documents, gains and intervals from per-document columns (ce_*, acc_*, thought_len, stop_rate)."""
    result: dict[str, Any] = {name: float(value.mean()) for name, value in columns.items()}
    no_think = columns["ce_no_think"]
    gains = {
        "gain": no_think - columns["ce_think"],
        "gain_empty": no_think - columns["ce_empty"],
        "gain_shuffled": no_think - columns["ce_shuffled"],
        "gain_over_empty": columns["ce_empty"] - columns["ce_think"],
        "gain_over_shuffled": columns["ce_shuffled"] - columns["ce_think"],
    }
    for name, gain_B in gains.items():
        result[name] = float(gain_B.mean())
        result[f"{name}_ci95"] = interval(gain_B)
    return result | {"documents": len(no_think)}


def interval(value_B: np.ndarray) -> list[float] | None:
    """95% interval of the mean over documents, normal approximation; None for a single document."""
    if len(value_B) < 2:
        return None
    half = 1.96 * float(value_B.std(ddof=1)) / math.sqrt(len(value_B))
    return [float(value_B.mean()) - half, float(value_B.mean()) + half]


class Thinking(NamedTuple):
    """Thoughts of one batch and what they and their controls are worth, a number a scored token.

    Attributes:
      position_BK, valid_BK: as `choose_positions` gives them.
      target_BKH: the true tokens that are scored.
      entropy_BT: nats, of the baseline's prediction of every token; None where nobody asked for it.
      other_B: the row whose thoughts the shuffled control takes.
      thoughts: the sampled ones, R = K·G.
      logprob: log-probability of the targets by name: "think" and "shuffled" [B, K, G, H], "empty" [B, K, 1, H],
        "no_think" (the baseline's) and "no_think_policy" [B, K, H].
      correct: likewise, whether the true token is the likeliest.
    """

    position_BK: jax.Array
    valid_BK: jax.Array
    target_BKH: jax.Array
    entropy_BT: jax.Array | None
    other_B: jax.Array
    thoughts: scoring.Thoughts
    logprob: dict[str, jax.Array]
    correct: dict[str, jax.Array]


def sample_at(model, template, rlp: RLPConfig, mesh: MeshConfig, params, cache, prefix_BK, key_BKG):
    """Thoughts at given places, sampled as in training. Pure, for use under jit.

    Args:
      cache: of the documents behind the context, with stops at `prefix_BK`.
      prefix_BK: tokens before each place, the context's counted.
      key_BKG: of each thought.

    Returns:
      What `sample_thoughts` gives, R = K·G.
    """
    B, K, G = key_BKG.shape

    def sample(params, cache, prefix_BR, key_BR):
        return sample_thoughts(
            model, params, cache, prefix_BR, template.open, template.close, key_BR, rlp.thought_tokens,
            rlp.temperature, group_size=G, slots=rlp.slots or None, keep=Filter(rlp.top_k, rlp.top_p, rlp.min_p),
        )  # fmt: skip

    rows = jnp.repeat(prefix_BK, G, 1), key_BKG.reshape(B, K * G)
    return in_rollout_layout(mesh, model.config.compute_dtype, sample, params, cache, *rows)


def think_and_score(
    model, template, rlp: RLPConfig, settings: EvalConfig, mesh: MeshConfig, params, ema_params, batch, key,
    entropies: bool = False,
) -> Thinking:  # fmt: skip
    """Samples thoughts at drawn positions of a batch and scores them beside their controls. Pure, for use under jit.

    Args:
      entropies: return `entropy_BT` whatever the positions are drawn by.
    """
    K, G = settings.positions, settings.group_size
    tokens_BT, document_B = batch["tokens_BT"], batch["document_B"]
    B = tokens_BT.shape[0]
    position_key, thought_key = jax.random.split(key)

    by_entropy = rlp.position_mode == "entropy"
    plain = scoring.read_plain(model, ema_params, tokens_BT, template)
    entropy_BT = scoring.baseline_entropy(model, ema_params, plain) if by_entropy or entropies else None
    candidate_BT = candidates(batch["length_B"], batch["span_BT"], template.first, rlp.horizon, rlp.position_mode)
    score_BT = entropy_BT if by_entropy else None
    position_BK, valid_BK = choose_positions(position_key, document_B, candidate_BT, score_BT, K)
    target_BKH = scoring.targets(tokens_BT, position_BK, rlp.horizon)
    no_think = scoring.baseline_logprob(model, ema_params, plain, position_BK, target_BKH)
    plain = scoring.read_plain(model, params, tokens_BT, template)
    no_think_policy = scoring.baseline_logprob(model, params, plain, position_BK, target_BKH)

    prefix_BK = position_BK + len(template.context)
    _, cache = model.hidden(params, scoring.with_context(tokens_BT, template.context), stops_BK=prefix_BK)
    key_BKG = thought_keys(thought_key, document_B, position_BK, G)
    sampled = sample_at(model, template, rlp, mesh, params, cache, prefix_BK, key_BKG)
    own = scoring.Thoughts(sampled.thought_BRL, sampled.length_BR, sampled.stopped_BR)
    other_B = _another_document(document_B)
    shuffled = jax.tree.map(lambda x: x[other_B], own)
    empty = jax.tree.map(lambda x: jnp.zeros_like(x[:, :K]), own)
    thoughts = jax.tree.map(lambda *x: jnp.concatenate(x, 1), own, shuffled, empty)
    prefix_BR = jnp.concatenate([jnp.repeat(prefix_BK, G, 1)] * 2 + [prefix_BK], 1)
    target_BRH = jnp.concatenate([jnp.repeat(target_BKH, G, 1)] * 2 + [target_BKH], 1)
    scored = scoring.score_branches(model, params, cache, prefix_BR, thoughts, target_BRH, template, rlp.temperature)

    def apart(value_BRH):
        cuts = {"think": (0, K * G), "shuffled": (K * G, 2 * K * G), "empty": (2 * K * G, 2 * K * G + K)}
        return {name: value_BRH[:, start:stop].reshape(B, K, -1, rlp.horizon) for name, (start, stop) in cuts.items()}

    plainly = {"no_think": no_think, "no_think_policy": no_think_policy}
    return Thinking(
        position_BK, valid_BK, target_BKH, entropy_BT, other_B, own,
        apart(scored.target_logprob_BRH) | {name: logprob for name, (logprob, _) in plainly.items()},
        apart(scored.target_correct_BRH) | {name: correct for name, (_, correct) in plainly.items()},
    )  # fmt: skip


# Compiled once for all evaluations of a run.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _evaluate_batch(
    model, template, rlp: RLPConfig, settings: EvalConfig, mesh: MeshConfig, params, ema_params, batch, key
):
    thinking = think_and_score(model, template, rlp, settings, mesh, params, ema_params, batch, key)
    valid_BK = thinking.valid_BK

    def of_document(value_BR):  # mean over a document's valid positions and its thoughts
        value_BKG = value_BR.reshape(*valid_BK.shape, -1).mean(-1)
        return jnp.where(valid_BK, value_BKG, 0.0).sum(-1) / jnp.maximum(valid_BK.sum(-1), 1)

    out = {"counted_B": valid_BK.any(-1)}
    for name, logprob in thinking.logprob.items():
        out[f"ce_{name}"] = of_document(-logprob.mean(-1))
        out[f"acc_{name}"] = of_document(thinking.correct[name].mean(-1))
    out["thought_len"] = of_document(thinking.thoughts.length_BR.astype(jnp.float32))
    out["stop_rate"] = of_document(thinking.thoughts.stopped_BR.astype(jnp.float32))
    return out


def _another_document(document_B: jax.Array) -> jax.Array:
    """For each row the nearest row above it (cyclically) that holds another document: a batch that was filled up holds
    some documents twice, and a document's own thought is no control."""
    row_B = jnp.arange(len(document_B))
    above_BB = (row_B[:, None] - 1 - row_B) % len(document_B)
    different_BB = document_B[above_BB] != document_B[:, None]
    return jnp.take_along_axis(above_BB, different_BB.argmax(-1, keepdims=True), -1)[:, 0]
