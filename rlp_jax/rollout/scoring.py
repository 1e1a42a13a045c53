# SPDX-License-Identifier: Apache-2.0
"""What the trainer's own forward says of thoughts, and what the baseline says without them.

A branch is: opening tag, sampled thought, closing tag (appended where the thought hit the cap), then the true next
tokens. One pass over [documents, branches] gives log pi of every thought token and the log-probability of the true
tokens after it; gradients flow through the shared prefix. The baseline reads the plain document once and gives every
position.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.cache import Cache, fork
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import TokenScores, token_logprobs
from rlp_jax.rollout.filters import KEEP_ALL, Filter


class Thoughts(NamedTuple):
    """Thoughts to score. thought_BRL int32, length_BR int32 (0: the empty thought), stopped_BR bool: the thought's own
    last tokens are the closing tag, so none is appended."""

    thought_BRL: jax.Array
    length_BR: jax.Array
    stopped_BR: jax.Array


class BranchScores(NamedTuple):
    """Of R branches a document.

    Attributes:
      logprob_BRL: log pi(thought token) at the temperature; meaningless past the thought's end.
      entropy_BRL: entropy of the same distribution, nats, no gradient.
      target_logprob_BRH: log p(true token | prefix, thought) at temperature 1.
      target_correct_BRH: bool, the true token is the most likely one.
    """

    logprob_BRL: jax.Array
    entropy_BRL: jax.Array
    target_logprob_BRH: jax.Array
    target_correct_BRH: jax.Array


def with_context(tokens_BT: jax.Array, before: tuple[int, ...]) -> jax.Array:
    """Documents with constant tokens (BOS, instruction) before them: [B, len(before) + T]."""
    before_BT = jnp.broadcast_to(jnp.asarray(before, tokens_BT.dtype), (tokens_BT.shape[0], len(before)))
    return jnp.concatenate([before_BT, tokens_BT], 1)


def targets(tokens_BT: jax.Array, position_BK: jax.Array, horizon: int) -> jax.Array:
    """x_t .. x_{t+H-1} for each position: [B, K, H]."""
    index_BKH = position_BK[..., None] + jnp.arange(horizon)
    index_BKH = jnp.minimum(index_BKH, tokens_BT.shape[1] - 1)
    return jnp.take_along_axis(tokens_BT[:, None], index_BKH, -1)


def lay_out(thoughts: Thoughts, target_BRH: jax.Array, template: TemplateTokens) -> tuple[jax.Array, jax.Array]:
    """Branch tokens without gaps, and where each target is predicted.

    Returns:
      tokens_BRS with S = open + L + close + H - 1 (the last target is only ever predicted), right-padded with 0, and
      index_BRH into S: the token after which target h is predicted.
    """
    B, R, L = thoughts.thought_BRL.shape
    n_open, tail, appended_BR1 = len(template.open), *lay_out_tail(thoughts.stopped_BR, target_BRH, template.close)
    opening = jnp.broadcast_to(jnp.asarray(template.open, jnp.int32), (B, R, n_open))
    n_tail, H = tail.shape[-1], target_BRH.shape[-1]
    S = n_open + L + n_tail
    head = jnp.concatenate([opening, thoughts.thought_BRL, jnp.zeros((B, R, S - n_open - L), jnp.int32)], -1)
    tail_start_BR1 = n_open + thoughts.length_BR[..., None]
    into_tail_BRS = jnp.arange(S) - tail_start_BR1
    from_tail = jnp.take_along_axis(tail, jnp.clip(into_tail_BRS, 0, n_tail - 1), -1)
    from_tail = jnp.where(into_tail_BRS < n_tail, from_tail, 0)
    tokens_BRS = jnp.where(into_tail_BRS < 0, head, from_tail)
    return tokens_BRS, tail_start_BR1 + appended_BR1 - 1 + jnp.arange(H)


def lay_out_tail(
    stopped_BR: jax.Array, target_BRH: jax.Array, close_tokens: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """What follows a thought's last token: the closing tag where the thought has none, and the known targets.

    Returns:
      tokens [B, R, close + H - 1], right-padded with 0, and how many of them are the tag, [B, R, 1].
    """
    shape, n_close = stopped_BR.shape, len(close_tokens)
    closing = jnp.broadcast_to(jnp.asarray(close_tokens, jnp.int32), (*shape, n_close))
    known = target_BRH[..., :-1].astype(jnp.int32)
    spare = jnp.zeros((*shape, n_close), jnp.int32)
    stopped_BR1 = stopped_BR[..., None]
    tail = jnp.where(stopped_BR1, jnp.concatenate([known, spare], -1), jnp.concatenate([closing, known], -1))
    return tail, jnp.where(stopped_BR1, 0, n_close)


def score_branches(
    model: LanguageModel,
    params: Params,
    cache: Cache,
    prefix_length_BR: jax.Array,
    thoughts: Thoughts,
    target_BRH: jax.Array,
    template: TemplateTokens,
    temperature: float,
    keep: Filter = KEEP_ALL,
) -> BranchScores:
    """Equation (3) and log pi of the thoughts, in one differentiable pass over branches that share their prefix.

    `keep` is the sampler's filter: log pi is that of the distribution the thoughts were drawn from. Logits are held for
    a part of the tokens at a time (`models/vocabulary.py`).
    """
    tokens_BRS, index_BRH = lay_out(thoughts, target_BRH, template)
    hidden_BRSD, _ = model.hidden(params, tokens_BRS, fork(cache, prefix_length_BR))
    L, first = thoughts.thought_BRL.shape[-1], len(template.open) - 1

    unembed = model.unembedding(params)
    of_thought = token_logprobs(
        unembed, hidden_BRSD[:, :, first : first + L], thoughts.thought_BRL, temperature,
        None if keep.everything else keep,
    )  # fmt: skip
    hidden_BRHD = jnp.take_along_axis(hidden_BRSD, index_BRH[..., None], 2)
    of_target = token_logprobs(unembed, hidden_BRHD, target_BRH)
    return BranchScores(of_thought.logprob, of_thought.entropy, of_target.logprob, of_target.correct)


def score_ended(
    model: LanguageModel,
    params: Params,
    cache: Cache,
    hidden_BRD: jax.Array,
    stopped_BR: jax.Array,
    target_BRH: jax.Array,
    close_tokens: tuple[int, ...],
) -> TokenScores:
    """Equation (3) from branches whose thoughts are in the cache already: reads closing tag and known targets only.

    Args:
      cache: with `end_BR`.
      hidden_BRD: after each thought's last token.
    """
    tail, appended_BR1 = lay_out_tail(stopped_BR, target_BRH, close_tokens)
    hidden_BRSD, _ = model.hidden(params, tail, cache)
    hidden_BRSD = jnp.concatenate([hidden_BRD[:, :, None], hidden_BRSD], 2)
    index_BRH = appended_BR1 + jnp.arange(target_BRH.shape[-1])
    hidden_BRHD = jnp.take_along_axis(hidden_BRSD, index_BRH[..., None], 2)
    return token_logprobs(model.unembedding(params), hidden_BRHD, target_BRH)


class Baseline(NamedTuple):
    """The no-think baseline's hidden states over plain documents, [B, T, D]: at t the state that predicts token t."""

    hidden_BTD: jax.Array


@jax.named_scope("baseline")
def read_plain(model: LanguageModel, params: Params, tokens_BT: jax.Array, template: TemplateTokens) -> Baseline:
    """One forward of the plain documents. Without a BOS token, position 0 is predicted by nothing: never ask for it."""
    hidden_BTD, _ = model.hidden(params, with_context(tokens_BT, template.plain))
    shift = len(template.plain) - 1
    if shift < 0:
        hidden_BTD = jnp.concatenate([jnp.zeros_like(hidden_BTD[:, :1]), hidden_BTD[:, :-1]], 1)
    else:
        hidden_BTD = hidden_BTD[:, shift : shift + tokens_BT.shape[1]]
    return Baseline(hidden_BTD)


@jax.named_scope("baseline")
def baseline_logprob(
    model: LanguageModel, params: Params, baseline: Baseline, position_BK: jax.Array, target_BKH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Equation (4): log p(x_t .. | x_<t) without a thought, [B, K, H], and whether the true token is the likeliest."""
    index_BKH = position_BK[..., None] + jnp.arange(target_BKH.shape[-1])
    index_BKH = jnp.minimum(index_BKH, baseline.hidden_BTD.shape[1] - 1)
    hidden_BKHD = jnp.take_along_axis(baseline.hidden_BTD[:, None], index_BKH[..., None], 2)
    scores = token_logprobs(model.unembedding(params), hidden_BKHD, target_BKH)
    return scores.logprob, scores.correct


@jax.named_scope("baseline")
def baseline_entropy(model: LanguageModel, params: Params, baseline: Baseline) -> jax.Array:
    """Entropy in nats of the baseline's next-token distribution at every position, [B, T]."""

    token_BT = jnp.zeros(baseline.hidden_BTD.shape[:2], jnp.int32)  # any: the entropy is the distribution's
    return token_logprobs(model.unembedding(params), baseline.hidden_BTD, token_BT).entropy
