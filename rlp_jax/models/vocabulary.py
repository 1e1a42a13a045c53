# SPDX-License-Identifier: Apache-2.0
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
from jax.sharding import PartitionSpec as P

from rlp_jax.models.constraints import DOCUMENTS, mesh_axes, on_shards, spec
from rlp_jax.models.layers import pad_axis

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
    count: jax.Array | None = None,
) -> TokenScores:
    """log p(token) under softmax(filter(unembed(hidden) / temperature)); what a caller leaves unused is not computed.

    Args:
      unembed: hidden states [n, D] to float32 logits [n, V]; differentiated through, its parameters included. Over a
        mesh they must be arguments: `LanguageModel.unembedding`.
      hidden_D: final hidden states [..., D].
      token: [...] int32, the leading axes of hidden_D.
      temperature: divides the logits.
      filter_fn: (logits_V, token) -> logits_V of one token, after the temperature: -inf where it forbids.
      chunk: places along the last axis of `token` whose logits are held together; by default as many as CHUNK_BYTES
        hold. Where all fit, there is no loop and nothing is computed twice.
      count: int scalar, only the first `count` places along the last axis are wanted. Chunks beyond are not computed
        and give zeros. The temperature must then be a Python number.
    """
    if not mesh_axes():
        return _own_logprobs(unembed, hidden_D, token, temperature, filter_fn, chunk, count)
    # Each device loops over its own documents. Left to the compiler, a head's weights would be gathered for every
    # chunk, and its gradient summed over devices after every chunk.
    of_document = spec(token.shape, DOCUMENTS)

    def own(unembed, hidden_D, token, count):
        return _own_logprobs(unembed, hidden_D, token, temperature, filter_fn, chunk, count)

    function = on_shards(own, (P(), of_document, of_document, P()), of_document, DOCUMENTS)
    return function(unembed, hidden_D, token, count)


def _own_logprobs(unembed, hidden_D, token, temperature, filter_fn, chunk, count) -> TokenScores:
    """`token_logprobs` of a device's documents."""
    score = functools.partial(_score, unembed, temperature, filter_fn)
    n = token.shape[-1]
    if chunk is None:
        rows = max(1, token.size // max(n, 1))
        vocab_size = jax.eval_shape(unembed, hidden_D.reshape(-1, hidden_D.shape[-1])[:1]).shape[-1]
        chunk = max(1, chunk_tokens(vocab_size) // rows)
    if count is not None:
        pure_unembed, constants = jax.closure_convert(unembed, hidden_D.reshape(-1, hidden_D.shape[-1])[:1])
        return _first_places((pure_unembed, temperature, filter_fn, chunk), constants, hidden_D, token, count)
    if n <= chunk:
        return score(hidden_D, token)
    chunks = max(1, -(-n // chunk))
    chunk = -(-n // chunks)  # as even as can be: less padding

    def cut(x, axis):  # the axis of places into chunks, which come first
        axis += x.ndim
        x = pad_axis(x, chunks * chunk - n, axis)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, chunk, *x.shape[axis + 1 :]), axis, 0)

    kept = jax.checkpoint_policies.save_only_these_names(_KEPT)
    one_chunk = jax.checkpoint(score, policy=kept, prevent_cse=False)  # a scan's body: nothing to merge with
    scores = jax.lax.map(lambda inputs: one_chunk(*inputs), (cut(hidden_D, -2), cut(token, -1)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*token.shape[:-1], -1)[..., :n], scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _first_places(how, constants, hidden_D, token, count) -> TokenScores:
    """Scores of the first `count` places, in as many turns of a loop as they need.

    `how` is what does not change: unembed(hidden, *constants), temperature, filter and chunk. The gradient is the same
    loop again, since JAX cannot run one backwards whose turns it does not know.
    """
    *_, chunk = how
    n = token.shape[-1]
    hidden_D, token = pad_axis(hidden_D, -n % chunk, -2), pad_axis(token, -n % chunk, -1)

    def one_chunk(i, scores):
        new = _score_chunk(how, constants, _chunk(hidden_D, -2, i, chunk), _chunk(token, -1, i, chunk))
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * chunk, x.ndim - 1), scores, new)

    nothing = jnp.zeros(token.shape)
    start = TokenScores(nothing, nothing, jnp.zeros(token.shape, bool))
    scores = jax.lax.fori_loop(0, -(-count // chunk), one_chunk, start)
    return jax.tree.map(lambda x: x[..., :n], scores)


def _first_places_forward(how, constants, hidden_D, token, count):
    return _first_places(how, constants, hidden_D, token, count), (constants, hidden_D, token, count)


def _first_places_backward(how, residuals, d_scores: TokenScores):
    constants, hidden_D, token, count = residuals
    *_, chunk = how
    n = token.shape[-1]
    hidden_D, token = pad_axis(hidden_D, -n % chunk, -2), pad_axis(token, -n % chunk, -1)
    d_logprob = pad_axis(d_scores.logprob, -n % chunk, -1)

    def one_chunk(i, carry):
        d_constants, d_hidden_D = carry
        token_c = _chunk(token, -1, i, chunk)
        _, pull = jax.vjp(
            lambda *args: _score_chunk(how, *args, token_c).logprob, constants, _chunk(hidden_D, -2, i, chunk)
        )
        new_constants, new_D = pull(_chunk(d_logprob, -1, i, chunk))
        d_hidden_D = jax.lax.dynamic_update_slice_in_dim(d_hidden_D, new_D, i * chunk, d_hidden_D.ndim - 2)
        return jax.tree.map(jnp.add, d_constants, new_constants), d_hidden_D

    start = jax.tree.map(jnp.zeros_like, (constants, hidden_D))
    d_constants, d_hidden_D = jax.lax.fori_loop(0, -(-count // chunk), one_chunk, start)
    return d_constants, d_hidden_D[..., :n, :], None, None


_first_places.defvjp(_first_places_forward, _first_places_backward)


def _score_chunk(how, constants, hidden_D, token):
    unembed, temperature, filter_fn, _ = how
    return _score(lambda x: unembed(x, *constants), temperature, filter_fn, hidden_D, token)


def _chunk(x, axis: int, i, chunk: int):
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, x.ndim + axis)


def chunk_tokens(vocab_size: int) -> int:
    """How many tokens' logits CHUNK_BYTES hold, at least one."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def _score(unembed, temperature, filter_fn, hidden_D: jax.Array, token: jax.Array) -> TokenScores:
    hidden_nD, token_n = hidden_D.reshape(-1, hidden_D.shape[-1]), token.reshape(-1)
    scores = _score_flat(unembed, temperature, filter_fn, hidden_nD, token_n)
    return jax.tree.map(lambda x: x.reshape(token.shape), scores)


def _score_flat(unembed, temperature, filter_fn, hidden_nD: jax.Array, token_n: jax.Array) -> TokenScores:
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
