# SPDX-License-Identifier: Apache-2.0
"""Next-token loss over a batch of plain documents, and the step of the algorithms that need nothing else.

Documents are packed whole into sequences without seeing each other, positions starting again with each; a loop computes
one sequence a device at a time and sums gradients, as many sequences as hold something. Models with recurrent layers
would carry a document's state into the next: there a document has a row of its own, padded.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlp_jax.config import Config
from rlp_jax.data.template import TemplateTokens
from rlp_jax.learner import SPARE, Batch, in_shards, take_rows
from rlp_jax.models.self_attention import Layout, Ranges
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import chunk_tokens, token_logprobs
from rlp_jax.optimizer import apply_gradient
from rlp_jax.rollout import packing
from rlp_jax.rollout.scoring import with_context
from rlp_jax.sharding import constrain_state, document_shards, over


class Texts(NamedTuple):
    """Documents as the model reads them, [..., T]: with BOS where there is one.

    target_T: the token after each. wanted_T: whether predicting it counts. length: tokens, 0 for an absent document.
    """

    tokens_T: jax.Array
    target_T: jax.Array
    wanted_T: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True)
class NextToken:
    """What the gradient is taken of.

    Attributes:
      sequence_tokens: what a device reads at a time, at least the longest document.
      shards: in how many runs of neighbouring documents the batch is spread over devices. Each packs sequences of its
        own, if they divide the batch.
    """

    model: LanguageModel
    template: TemplateTokens
    sequence_tokens: int
    shards: int = 1

    @property
    def packs(self) -> bool:
        return self.model.config.hybrid is None

    @jax.named_scope("gradient")
    def gradient(self, params: Params, batch: Batch, wanted_BT: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
        """Gradient of the mean of -log p(x_t | x_<t) over the wanted tokens of the whole batch, nats.

        Args:
          wanted_BT: tokens whose prediction counts. Padding never does, nor a first token that no BOS precedes.

        Returns:
          The gradient, and metrics: loss, tokens (that counted), padding (share of what was computed).
        """
        texts = self.texts(batch, wanted_BT)
        total = jnp.maximum(texts.wanted_T.sum(), 1).astype(jnp.float32)
        A, capacity, index_APd, used = self.assign(texts)
        texts = in_shards(texts, A)

        def one_turn(p, carry):
            part = take_texts(texts, index_APd[:, p])
            loss, grads = jax.value_and_grad(self._loss)(params, part, capacity, total)
            return jax.tree.map(jnp.add, carry, (loss, constrain_state(grads)))

        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        with jax.named_scope("sequences"):
            loss, grads = jax.lax.fori_loop(0, used, one_turn, nothing)
        read, computed = texts.length.sum(), used * A * capacity
        padding = 1.0 - read.astype(jnp.float32) / jnp.maximum(computed, 1).astype(jnp.float32)
        return grads, {"loss": loss, "tokens": texts.wanted_T.sum().astype(jnp.float32), "padding": padding}

    def texts(self, batch: Batch, wanted_BT: jax.Array) -> Texts:
        before, (B, T) = self.template.plain, batch["tokens_BT"].shape
        known_BT = jnp.arange(T) < batch["length_B"][:, None]
        tokens_BT = with_context(batch["tokens_BT"], before)
        wanted_BT = jnp.concatenate([jnp.zeros((B, len(before)), bool), wanted_BT & known_BT], 1)
        length_B = jnp.asarray(batch["length_B"]) + len(before)
        ahead = functools.partial(jnp.pad, pad_width=((0, 0), (0, 1)))
        return Texts(tokens_BT, ahead(tokens_BT[:, 1:]), ahead(wanted_BT[:, 1:]), length_B)

    def assign(self, texts: Texts) -> tuple[int, int, jax.Array, jax.Array]:
        """Which documents are computed together.

        Returns:
          Shards, tokens of a turn, the documents of each turn [A, P, d] counted in their shard (one more than there
          are: none), and how many turns hold something.
        """
        B, T = texts.tokens_T.shape
        A = self.shards if B % self.shards == 0 else 1
        per_shard = B // A
        room = min(max(self.sequence_tokens, T), per_shard * T)
        fit = room // T
        turns = -(-per_shard // fit)
        if not self.packs:
            index_Pd = jnp.pad(jnp.arange(per_shard), (0, turns * fit - per_shard), constant_values=per_shard)
            return A, fit * T, jnp.broadcast_to(index_Pd.reshape(turns, fit), (A, turns, fit)), jnp.int32(turns)
        capacity, documents = packing.bin_size(room), min(SPARE * fit, per_shard)
        pack = jax.vmap(lambda length_B: packing.assign(length_B, turns, capacity, documents))
        index_APd, used_A = pack(in_shards(texts.length, A))
        return A, capacity, index_APd, used_A.max()

    def _loss(self, params: Params, part: Texts, capacity: int, total: jax.Array) -> jax.Array:
        """The part's share of the batch's mean, of documents [A, d, T]."""
        if self.packs:
            part, layout = jax.vmap(lambda part: pack(part, capacity))(part)
            hidden_ACD = self.model.hidden_packed(params, part.tokens_T, layout)
        else:
            part = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part)
            hidden_ACD, _ = self.model.hidden(params, part.tokens_T)
        # Those that count first: the others' logits are not computed.
        order_AC = jnp.argsort(~part.wanted_T, axis=-1)
        wanted_AC, target_AC = (jnp.take_along_axis(x, order_AC, -1) for x in (part.wanted_T, part.target_T))
        hidden_ACD = jnp.take_along_axis(hidden_ACD, order_AC[..., None], 1)
        chunk = min(packing.SCORED, chunk_tokens(self.model.config.vocab_size), target_AC.shape[-1])
        with jax.named_scope("target_scores"):
            count = wanted_AC.sum(-1).max()
            unembed = self.model.unembedding(params)
            logprob_AC = token_logprobs(unembed, hidden_ACD, target_AC, chunk=chunk, count=count).logprob
        return -jnp.sum(jnp.where(wanted_AC, logprob_AC, 0.0)) / total


def take_texts(texts: Texts, index_Ad: jax.Array) -> Texts:
    """Documents [A, d] of texts [A, n]; those of index n are absent: no tokens, nothing wanted."""
    n = texts.length.shape[1]
    part, there_Ad = take_rows(texts, jnp.minimum(index_Ad, n - 1)), index_Ad < n
    return part._replace(length=jnp.where(there_Ad, part.length, 0), wanted_T=part.wanted_T & there_Ad[..., None])


def pack(texts: Texts, capacity: int) -> tuple[Texts, Layout]:
    """Documents [d, T] one after another in a sequence of `capacity` places, and who sees whom there."""
    T, C = texts.tokens_T.shape[1], capacity
    start_d = jnp.cumsum(texts.length) - texts.length
    t_T = jnp.arange(T)
    place_dT = jnp.where(t_T < texts.length[:, None], start_d[:, None] + t_T, C)

    def scatter(value_dT, rest_C):
        return rest_C.at[place_dT].set(jnp.broadcast_to(value_dT, place_dT.shape), mode="drop")

    nothing_C = jnp.zeros(C, jnp.int32)
    own_start_C = scatter(start_d[:, None], jnp.arange(C))  # padding sees itself alone
    layout = Layout(scatter(t_T, nothing_C), Ranges(nothing_C, nothing_C, own_start_C))
    tokens_C, target_C = (scatter(x, nothing_C) for x in (texts.tokens_T, texts.target_T))
    return Texts(tokens_C, target_C, scatter(texts.wanted_T, nothing_C > 0), texts.length.sum()), layout


class Step:
    """A step without thoughts: `learn(state, batch, None) -> (state, metrics, None)`, jitted, donates the state.

    Args:
      wanted: (batch) -> [B, T] bool, the tokens to learn from.
      sequence_tokens: see `NextToken`.
    """

    judge = None

    def __init__(
        self,
        model: LanguageModel,
        optimizer: optax.GradientTransformation,
        template: TemplateTokens,
        config: Config,
        mesh: jax.sharding.Mesh | None,
        wanted: Callable[[Batch], jax.Array],
        sequence_tokens: int,
    ):
        learner = NextToken(model, template, sequence_tokens, document_shards(mesh))

        def _learn(state, batch, _):
            with over(mesh):
                grads, metrics = learner.gradient(state.params, batch, wanted(batch))
                grad_norm = optax.tree.norm(grads)
                finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
                state = apply_gradient(optimizer, config.rlp.ema_decay, state, state.step + 1, grads, finite)
            return state, metrics | {"grad_norm": grad_norm, "finite": finite.astype(jnp.float32)}, None

        self.learn = jax.jit(_learn, donate_argnums=0)

    def sample(self, params: Params, ema_params: Params, batch: Batch, key: jax.Array) -> None:
        return None
