"""Log-probabilities of tokens from hidden states, without the logits of all tokens at once.

Logits are by far the largest array of a language model: 8 x 512 tokens over Qwen's 151,936 are 2.5 GB, and their
log-softmax and its gradient as much again each. Here a chunk of tokens is projected at a time, and projected again in
the backward pass.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CHUNK_BYTES = 128 << 20  # float32 logits of one chunk
_KEPT = "vocabulary_normaliser"  # two numbers a token, so that the backward pass repeats the product alone


class TokenScores(NamedTuple):
    """Of each token, shape [...].

    Attributes:
      logprob: log p(token), nats, at the temperature and after the filter; differentiable.
      entropy: of the same distribution, nats, no gradient.
      correct: bool, the token is the most likely one (the first of equals, as in argmax).
    """

    logprob: jax.Array
    entropy: jax.Array
    correct: jax.Array


def token_logprobs(
    unembed: Callable[[jax.Array], jax.Array],
    hidden_D: jax.Array,
    token: jax.Array,
    temperature: float | jax.Array = 1.0,
    filter_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    chunk: int | None = None,
) -> TokenScores:
    """log p(token) under softmax(filter(unembed(hidden) / temperature)); what a caller leaves unused is not computed.

    Args:
      unembed: hidden states [n, D] to float32 logits [n, V]; differentiated through, its parameters included.
      hidden_D: final hidden states [..., D].
      token: [...] int32, the leading axes of hidden_D.
      temperature: divides the logits.
      filter_fn: (logits_V, token) -> logits_V of one token, after the temperature: -inf where it forbids.
      chunk: tokens whose logits are held together; by default as many as CHUNK_BYTES hold. Where all tokens fit, there
        is no loop and nothing is computed twice.
    """
    shape, D = token.shape, hidden_D.shape[-1]
    hidden_nD, token_n = hidden_D.reshape(-1, D), token.reshape(-1)
    score = functools.partial(_score, unembed, temperature, filter_fn)
    n = token_n.size
    if chunk is None:
        chunk = chunk_tokens(jax.eval_shape(unembed, hidden_nD[:1]).shape[-1])
    if n <= chunk:
        scores = score(hidden_nD, token_n)
    else:
        count = -(-n // chunk)
        chunk = -(-n // count)  # as even as can be: less padding
        pad = count * chunk - n
        hidden_cnD = jnp.pad(hidden_nD, ((0, pad), (0, 0))).reshape(count, chunk, D)
        token_cn = jnp.pad(token_n, (0, pad)).reshape(count, chunk)
        kept = jax.checkpoint_policies.save_only_these_names(_KEPT)
        one_chunk = jax.checkpoint(score, policy=kept, prevent_cse=False)  # a scan's body: nothing to merge with
        scores = jax.lax.map(lambda inputs: one_chunk(*inputs), (hidden_cnD, token_cn))
        scores = jax.tree.map(lambda x: x.reshape(-1)[:n], scores)
    return jax.tree.map(lambda x: x.reshape(shape), scores)


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens' logits CHUNK_BYTES hold, at least one."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def _score(unembed, temperature, filter_fn, hidden_nD: jax.Array, token_n: jax.Array) -> TokenScores:
    logits_nV = unembed(hidden_nD)
    if not (isinstance(temperature, float) and temperature == 1.0):
        logits_nV = logits_nV / temperature
    if filter_fn is not None:
        logits_nV = jax.vmap(filter_fn)(logits_nV, token_n)
    picked_n = _pick(logits_nV, token_n)
    top_n1 = checkpoint_name(jax.lax.stop_gradient(logits_nV.max(-1, keepdims=True)), _KEPT)
    above_nV = logits_nV - top_n1
    # Rounding to float32 changes nothing, but without it XLA's CPU backend joins exp to the sum after it, in a kernel
    # that takes three times as long.
    exp_nV = jax.lax.reduce_precision(jnp.exp(above_nV), 8, 23)
    total_n = checkpoint_name(exp_nV.sum(-1), _KEPT)
    log_total_n = jnp.log(total_n)
    logprob_n = (picked_n - top_n1[:, 0]) - log_total_n
    # -sum p log p = log total - sum p (logits - top); a forbidden token, whose logit is -inf, adds nothing.
    mean_n = jnp.sum(jnp.where(exp_nV > 0, exp_nV * above_nV, 0.0), -1) / total_n
    entropy_n = jax.lax.stop_gradient(log_total_n - mean_n)
    # The token is argmax where no logit before it is as large, none after it larger: one pass, and no indices.
    v_V, token_n1 = jnp.arange(logits_nV.shape[-1]), token_n[:, None]
    beaten_nV = jnp.where(v_V < token_n1, logits_nV < picked_n[:, None], logits_nV <= picked_n[:, None])
    return TokenScores(logprob_n, entropy_n, jax.lax.stop_gradient(beaten_nV.all(-1)))


@jax.custom_jvp
def _pick(logits_nV: jax.Array, token_n: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_nV, token_n[:, None], -1)[:, 0]


@_pick.defjvp
def _pick_jvp(primals, tangents):
    """By comparison: the gradient is then part of the same pass as the softmax's, no scatter into zeros."""
    (logits_nV, token_n), (tangent_nV, _) = primals, tangents
    chosen_nV = jnp.arange(logits_nV.shape[-1]) == token_n[:, None]
    return _pick(logits_nV, token_n), jnp.sum(jnp.where(chosen_nV, tangent_nV, 0.0), -1)
