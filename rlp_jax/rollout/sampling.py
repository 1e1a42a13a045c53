"""Sampling thoughts: one jitted loop over the branches of all documents.

The document is read once (the caller's prefill); every branch continues from the shared prefix. A branch's randomness
comes from its own key, so a thought does not depend on what else is in the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax.models.cache import Cache, fork, unstack_cache
from rlp_jax.models.transformer import LanguageModel, Params, unstack_layers

_CHUNK = 256  # vocabulary entries summed together in the first level of `inverse_cdf`


class Rollout(NamedTuple):
    """Sampled thoughts of R branches a document.

    Attributes:
      thought_BRL: int32, 0 after the end. A closing tag that the model sampled is part of the thought.
      length_BR: int32, sampled tokens, at least 1.
      stopped_BR: bool, True where the thought ended with the closing tag, False where it hit the cap.
      logprob_BRL: float32, log pi(token) at the sampling temperature, 0 after the end.
    """

    thought_BRL: jax.Array
    length_BR: jax.Array
    stopped_BR: jax.Array
    logprob_BRL: jax.Array


def thought_keys(key: jax.Array, document_B: jax.Array, position_BK: jax.Array, group_size: int) -> jax.Array:
    """One key for each (document, position, g) [B, K, G]: the same thought whatever else is in the batch."""

    def one_document(document, position_K):
        document_key = jax.random.fold_in(key, document)
        position_keys = jax.vmap(lambda position: jax.random.fold_in(document_key, position))(position_K)
        return jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(group_size)))(position_keys)

    return jax.vmap(one_document)(jnp.asarray(document_B).astype(jnp.uint32), position_BK)


def inverse_cdf(logits_V: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A categorical sample and its log-probability from ONE uniform number in [0, 1).

    Two levels of cumulative sums find the entry. The Gumbel trick would draw V random numbers a token, which on CPU
    costs more than a small model's forward pass.

    Args:
      logits_V: [..., V].
      uniform: [...].

    Returns:
      token [...] int32 and its log-probability [...] float32.
    """
    V = logits_V.shape[-1]
    logits_V = logits_V.astype(jnp.float32)
    top = logits_V.max(-1, keepdims=True)
    weight_V = jnp.exp(logits_V - top)
    n_chunks = -(-V // _CHUNK)
    weight_NC = jnp.pad(weight_V, [(0, 0)] * (weight_V.ndim - 1) + [(0, n_chunks * _CHUNK - V)])
    weight_NC = weight_NC.reshape(*weight_V.shape[:-1], n_chunks, _CHUNK)
    chunk_N = weight_NC.sum(-1)
    total = chunk_N.sum(-1)
    target = (uniform * total)[..., None]
    chunk, below = _find(chunk_N, target)
    weight_C = jnp.take_along_axis(weight_NC, chunk[..., None, None], -2)[..., 0, :]
    inner, _ = _find(weight_C, target - below)
    token = (chunk * _CHUNK + inner).astype(jnp.int32)
    picked = jnp.take_along_axis(logits_V, token[..., None], -1)[..., 0]
    return token, picked - top[..., 0] - jnp.log(total)


def _find(weight_C: jax.Array, target_1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of positive weight whose cumulative weight exceeds the target, and the weight before it [..., 1]."""
    cumulative_C = jnp.cumsum(weight_C, -1)
    # Rounding makes the sums not quite monotone and can put the target just outside of them, so ask for a weight too:
    # a token of probability 0 must never be drawn. Past the very end, take the heaviest entry.
    found_C = (cumulative_C > target_1) & (weight_C > 0)
    index = jnp.where(found_C.any(-1), found_C.argmax(-1), weight_C.argmax(-1))
    before = jnp.take_along_axis(cumulative_C - weight_C, index[..., None], -1)
    return index, before


def sample_thoughts(
    model: LanguageModel,
    params: Params,
    cache: Cache,
    prefix_length_BR: jax.Array,
    open_tokens: tuple[int, ...],
    close_tokens: tuple[int, ...],
    key_BR: jax.Array,
    max_tokens: int,
    temperature: float,
    unroll: bool | None = None,
) -> Rollout:
    """Samples one thought a branch: step 1 of the algorithm, c ~ pi(. | x_<t) (RLP, arXiv 2510.01265, section 3).

    Args:
      cache: the documents' prefix, from a prefill with `params`.
      prefix_length_BR: [B, R], what each branch sees of its document.
      open_tokens: fed before the thought, not part of it.
      close_tokens: a thought that has sampled these tokens in a row ends.
      key_BR: one key a branch.
      max_tokens: L.
      temperature: > 0; near 0 this is greedy.
      unroll: decode with unrolled layers (`LanguageModel.unrolled`); None: on CPU, where it pays.
    """
    if jax.default_backend() == "cpu" if unroll is None else unroll:
        model, params, cache = model.unrolled(), unstack_layers(params), unstack_cache(cache)
    B, R = prefix_length_BR.shape
    # The barrier keeps XLA from evaluating attention over the still empty room at compile time.
    branches = jax.lax.optimization_barrier(fork(cache, prefix_length_BR, len(open_tokens) + max_tokens))
    opening_BRS = jnp.broadcast_to(jnp.asarray(open_tokens, jnp.int32), (B, R, len(open_tokens)))
    hidden_BRSD, branches = model.hidden(params, opening_BRS, branches)
    close_C = jnp.asarray(close_tokens, jnp.int32)

    class Carry(NamedTuple):
        step: jax.Array
        cache: Cache
        hidden_BRD: jax.Array  # predicts the next token
        recent_BRC: jax.Array  # last tokens, to see the closing tag
        out: Rollout

    def going_on(carry: Carry):
        return (carry.step < max_tokens) & ~jnp.all(carry.out.stopped_BR)

    def one_token(carry: Carry) -> Carry:
        logits_BRV = model.unembed(params, carry.hidden_BRD) / temperature
        uniform_BR = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, carry.step))))(key_BR)
        token_BR, logprob_BR = inverse_cdf(logits_BRV, uniform_BR)
        live_BR = ~carry.out.stopped_BR
        token_BR = jnp.where(live_BR, token_BR, 0)
        recent_BRC = jnp.concatenate([carry.recent_BRC, token_BR[..., None]], -1)[..., 1:]
        out = Rollout(
            carry.out.thought_BRL.at[:, :, carry.step].set(token_BR),
            carry.out.length_BR + live_BR,
            carry.out.stopped_BR | jnp.all(recent_BRC == close_C, -1),
            carry.out.logprob_BRL.at[:, :, carry.step].set(jnp.where(live_BR, logprob_BR, 0.0)),
        )
        hidden_BRSD, cache = model.hidden(params, token_BR[..., None], carry.cache)
        return Carry(carry.step + 1, cache, hidden_BRSD[:, :, 0], recent_BRC, out)

    start = Carry(
        jnp.zeros((), jnp.int32),
        branches,
        hidden_BRSD[:, :, -1],
        jnp.full((B, R, len(close_tokens)), -1, jnp.int32),
        Rollout(
            jnp.zeros((B, R, max_tokens), jnp.int32),
            jnp.zeros((B, R), jnp.int32),
            jnp.zeros((B, R), bool),
            jnp.zeros((B, R, max_tokens), jnp.float32),
        ),
    )
    return jax.lax.while_loop(going_on, one_token, start).out
