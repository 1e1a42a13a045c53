# SPDX-License-Identifier: Apache-2.0
"""What thinking gains at every token of a few held-out documents, with the thoughts: what the report's viewer shows.

`likelihood.py` measures at drawn positions; here each token of a document in turn is one. A row a document goes to
documents.jsonl, before and after training, so that the same text can be seen with both.

Token log-ratios say what the policy pi makes of its own thoughts, all at the sampling temperature:
- ratio_ema: log pi - log pi_ema. How far the policy has moved from its moving average, the baseline of the reward.
- ratio_sampler: log pi - log pi_sampler, trainer's forward against sampler. Nothing but rounding and low precision: the
  log of the ratio in equation 8 at a batch's first update.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax import objective
from rlp_jax.config import Config, MeshConfig, RLPConfig
from rlp_jax.data.pipeline import Batch
from rlp_jax.data.positions import candidates
from rlp_jax.data.template import TemplateTokens
from rlp_jax.distributed import fetch
from rlp_jax.evals.likelihood import sample_at
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout import scoring
from rlp_jax.rollout.filters import Filter
from rlp_jax.rollout.sampling import thought_keys
from rlp_jax.sharding import mesh_of, over

FILE = "documents.jsonl"
DIGITS = 4  # of nats, after the point
TOKENS_KEPT = 256  # of a thought, one by one with their numbers; what follows is kept as text


class Along(NamedTuple):
    """K positions of B documents, G thoughts at each, R = K·G branches.

    target_logprob_BKG, empty_BK, s_ema_BK: mean log-probability of the true tokens after each thought, after an empty
    one, and without any (the baseline's). thoughts: sampled. logprob_BRL by the policy, ratio_ema_BRL and
    ratio_sampler_BRL as above; meaningless past a thought's end.
    """

    target_logprob_BKG: jax.Array
    empty_BK: jax.Array
    s_ema_BK: jax.Array
    thoughts: scoring.Thoughts
    logprob_BRL: jax.Array
    ratio_ema_BRL: jax.Array
    ratio_sampler_BRL: jax.Array


def first_documents(heldout: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The first `count` documents that held-out batches hold, those of weight 0 left out, in batches."""
    for batch in heldout:
        rows = np.flatnonzero(np.asarray(batch["weight_B"]) > 0)[: max(count, 0)]
        count -= len(rows)
        if len(rows):
            yield {name: np.asarray(value)[rows] for name, value in batch.items()}


def rows_of(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    batch: Batch,
    tokenizer: Any,
    template: TemplateTokens,
    config: Config,
    key: jax.Array,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[dict[str, Any]]:
    """The rows of documents.jsonl for a batch's documents, but for their step. With several processes all call it.

    Each holds: document (id), horizon, tokens (text of each token), position [P], trained [P] (whether the run's
    `position_mode` may draw it), s_ema, gain, gain_empty [P] in nats a scored token (gain: the mean over thoughts), and
    thoughts [P][G] with tokens (text of each, the first `TOKENS_KEPT`;
    a sampled closing tag is the last `close` of all), rest (text of the others), length, stopped, reward, advantage,
    and of each token logprob, ratio_ema and ratio_sampler in nats.

    Args:
      params, ema_params: policy and no-think baseline.
      batch: documents on the host.
      config: `report` says how many positions and thoughts; the rest as in training.
      key: the same key gives, for equal parameters, the same thoughts.
      place: puts a batch on the devices.

    Raises:
      ValueError: a number that is not finite.
    """
    shown, G = config.report, config.report.group_size
    length_B, B = batch["length_B"], len(batch["length_B"])
    given = length_B, batch["span_BT"], template.first, config.rlp.horizon
    candidate_BT, trained_BT = (np.asarray(candidates(*given, mode)) for mode in ("uniform", config.rlp.position_mode))
    chosen = [_positions(candidate_BT[b], trained_BT[b], shown.positions) for b in range(B)]
    # As many branches at a time as an evaluation has.
    K = max(1, min(-(-config.eval.positions * config.eval.group_size // G), max(map(len, chosen), default=1)))
    parts, settings = [], (config.rlp, G, config.mesh)
    placed = place(batch)
    for start in range(0, max(map(len, chosen), default=0), K):
        # Documents that have no more positions repeat one: any will do.
        position_BK = np.stack([np.resize(at[start : start + K] or at[-1:] or [template.first], K) for at in chosen])
        given = place({"position_BK": position_BK.astype(np.int32)})["position_BK"]
        with over(mesh_of(params)):
            parts.append(fetch(_think_along(model, template, *settings, params, ema_params, placed, given, key)))
    close = len(template.close)
    rows = [(b, at) for b, at in enumerate(chosen) if at]
    return [
        _row(batch, b, at, K, parts, tokenizer, close, config) | {"trained": trained_BT[b, at].tolist()}
        for b, at in rows
    ]


def _positions(candidate_T: np.ndarray, prefer_T: np.ndarray, limit: int) -> list[int]:
    """At most `limit` candidates, ascending: preferred ones first, of each kind evenly spread."""
    chosen: list[int] = []
    for kind in (candidate_T & prefer_T, candidate_T & ~prefer_T):
        found, room = np.flatnonzero(kind), limit - len(chosen)
        chosen += found[np.linspace(0, len(found) - 1, min(room, len(found))).round().astype(int)].tolist()
    return sorted(chosen)


def _row(batch, b, positions, K, parts: list[Along], tokenizer, close, config: Config) -> dict[str, Any]:
    G, document = config.report.group_size, int(batch["document_B"][b])
    tokens = batch["tokens_BT"][b, : batch["length_B"][b]].tolist()
    row = {"document": document, "horizon": config.rlp.horizon, "tokens": whole_characters(tokens, tokenizer)}
    columns: dict[str, list] = {"position": positions, "s_ema": [], "gain": [], "gain_empty": [], "thoughts": []}
    for number, t in enumerate(positions):
        part, k = parts[number // K], number % K
        s_ema, s_pred_G = part.s_ema_BK[b, k], part.target_logprob_BKG[b, k]
        reward_G = np.asarray(objective.information_gain(s_pred_G, s_ema))
        advantage_G = np.asarray(objective.group_relative_advantage(reward_G))
        if not np.isfinite(reward_G).all():
            raise ValueError(f"document {document}, position {t}: a gain that is not finite; are the weights?")
        columns["s_ema"].append(_rounded(s_ema))
        columns["gain"].append(_rounded(reward_G.mean()))
        columns["gain_empty"].append(_rounded(part.empty_BK[b, k] - s_ema))
        columns["thoughts"].append(
            [
                _thought(part, b, k * G + g, tokenizer, close)
                | {"reward": _rounded(reward_G[g]), "advantage": _rounded(advantage_G[g])}
                for g in range(G)
            ]
        )
    return row | columns


def _thought(part: Along, b: int, r: int, tokenizer, close: int) -> dict[str, Any]:
    length, stopped = int(part.thoughts.length_BR[b, r]), bool(part.thoughts.stopped_BR[b, r])
    text = whole_characters(part.thoughts.thought_BRL[b, r, :length].tolist(), tokenizer)
    numbers = {"logprob": part.logprob_BRL, "ratio_ema": part.ratio_ema_BRL, "ratio_sampler": part.ratio_sampler_BRL}
    kept = min(length, TOKENS_KEPT)
    return {
        "tokens": text[:kept],
        "rest": "".join(text[kept : length - close * stopped]),
        "length": length,
        "stopped": stopped,
        "close": close * stopped,
        **{name: _rounded(value[b, r, :kept]) for name, value in numbers.items()},
    }


def whole_characters(tokens: list[int], tokenizer) -> list[str]:
    """What each token adds to the text, as `token_classes.surfaces`, but a character of several tokens stands whole
    with its last one and not as so many U+FFFD."""
    parts: list[str] = []
    start = 0  # of the tokens whose text has not been given to one of them
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[max(start - 1, 0) : start])
        both = tokenizer.decode(tokens[max(start - 1, 0) : end])
        text = both[len(before) :] if both.startswith(before) else tokenizer.decode(tokens[start:end])
        # No character has more than 4 bytes: what is none by then, is none.
        unfinished = text.endswith("\ufffd") and end - start < 4 and end < len(tokens)
        parts.append("" if unfinished else text)
        start = start if unfinished else end
    return parts


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _think_along(
    model, template, rlp: RLPConfig, G: int, mesh: MeshConfig, params, ema_params, batch, position_BK, key
) -> Along:
    tokens_BT, document_B = batch["tokens_BT"], batch["document_B"]
    B, K = position_BK.shape
    target_BKH = scoring.targets(tokens_BT, position_BK, rlp.horizon)
    plain = scoring.read_plain(model, ema_params, tokens_BT, template)
    s_ema_BKH, _ = scoring.baseline_logprob(model, ema_params, plain, position_BK, target_BKH)

    with_context_BT = scoring.with_context(tokens_BT, template.context)
    prefix_BK = position_BK + len(template.context)
    _, cache = model.hidden(params, with_context_BT, stops_BK=prefix_BK)
    key_BKG = thought_keys(key, document_B, position_BK, G)
    sampled = sample_at(model, template, rlp, mesh, params, cache, prefix_BK, key_BKG)
    keep, prefix_BR = Filter(rlp.top_k, rlp.top_p, rlp.min_p), jnp.repeat(prefix_BK, G, 1)
    own = scoring.Thoughts(sampled.thought_BRL, sampled.length_BR, sampled.stopped_BR)
    empty = jax.tree.map(lambda x: jnp.zeros_like(x[:, :K]), own)
    both = jax.tree.map(lambda *x: jnp.concatenate(x, 1), own, empty)
    target_BRH = jnp.repeat(target_BKH, G, 1)
    of_both = jnp.concatenate([prefix_BR, prefix_BK], 1), both, jnp.concatenate([target_BRH, target_BKH], 1)
    scored = scoring.score_branches(model, params, cache, *of_both, template, rlp.temperature, keep)
    s_pred_BR = objective.sequence_logprob(scored.target_logprob_BRH)

    _, cache = model.hidden(ema_params, with_context_BT, stops_BK=prefix_BK)
    of_ema = scoring.score_branches(
        model, ema_params, cache, prefix_BR, own, target_BRH, template, rlp.temperature, keep
    )
    logprob_BRL = scored.logprob_BRL[:, : K * G]
    return Along(
        s_pred_BR[:, : K * G].reshape(B, K, G), s_pred_BR[:, K * G :], objective.sequence_logprob(s_ema_BKH), own,
        logprob_BRL, logprob_BRL - of_ema.logprob_BRL, logprob_BRL - sampled.logprob_BRL,
    )  # fmt: skip


def _rounded(value: Any) -> Any:
    """Numbers fit to be written: JSON knows no infinity (a filter may forbid the moving average a token)."""
    value = np.asarray(value, np.float64)
    return np.where(np.isfinite(value), np.round(value, DIGITS), None).tolist()
