# SPDX-License-Identifier: Apache-2.0
"""The rollout engine: one jitted program that samples all thoughts of a batch of documents.

A document is read once (the caller's prefill) and the opening tag once a position; every thought continues from both.
Thoughts are decoded in slots. A document with more thoughts than slots has a queue: when a slot's thought ends, the
next one takes the slot, inside the loop (continuous batching), so time follows the number of tokens rather than the
longest thought of each round. A thought's randomness comes from its own key, so it does not depend on slot or batch.

All slots write their keys and values into the same column of a ring, which needs no scatter: a slot knows the number of
its thought's first token, and sees what came after it. The ring starts small and grows when a thought outlives it.

Where every thought has a slot of its own, the ring still holds all of them at the end: the true tokens after them are
then scored from there, without reading documents and thoughts again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax.models import backend
from rlp_jax.models.cache import Cache, capacity, fork, gather_states, unstack_cache, write
from rlp_jax.models.mamba2 import MambaState
from rlp_jax.models.transformer import LanguageModel, Params, unstack_layers
from rlp_jax.rollout.filters import KEEP_ALL, Filter
from rlp_jax.rollout.sampling import Rollout, inverse_cdf
from rlp_jax.rollout.scoring import score_ended

SMALLEST_RING = 64  # thought tokens that the first ring has room for
GROWTH = 4  # each ring to the next; every size is compiled
FEW = 16  # opening tokens that are written to the ring one by one
LONG = 1024  # where thoughts may be so long, the last rings grow by quarters: a ring is read whole for every token


class Slots(NamedTuple):
    """What each of Q slots a document is doing. An idle slot's request is R, one past the last."""

    request_BQ: jax.Array  # the thought it decodes
    taken_BQ: jax.Array  # tokens sampled of it
    live_BQ: jax.Array
    hidden_BQD: jax.Array  # predicts its next token
    recent_BQC: jax.Array  # its last tokens, to see the closing tag
    ending_BQ: jax.Array  # state of the automaton `ends`


class Own(NamedTuple):
    """Tokens of each position's own between its prefix and its thoughts: the end of a prompt, say, of which all
    prompts of a batch share the beginning.

    Attributes:
      tokens_BKS: int32, at the right of their row; what stands before `start_BK` is not read. At least one each.
      start_BK: int32.
    """

    tokens_BKS: jax.Array
    start_BK: jax.Array


class Carry(NamedTuple):
    cache: Cache
    slots: Slots
    next_B: jax.Array  # the first request that no slot has taken yet
    out: Rollout


@jax.named_scope("rollout")
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
    *,
    group_size: int = 1,
    slots: int | None = None,
    keep: Filter = KEEP_ALL,
    limit_BR: jax.Array | None = None,
    unroll: bool | None = None,
    target_BRH: jax.Array | None = None,
    ends: jax.Array | None = None,
    own: Own | None = None,
) -> Rollout:
    """Samples R thoughts a document: step 1 of the algorithm, c ~ pi(. | x_<t) (RLP, arXiv 2510.01265, section 3).

    Args:
      cache: the documents' prefix, from a prefill with `params`.
      prefix_length_BR: [B, R], what each thought sees of its document.
      open_tokens: fed before the thought, not part of it; at least one.
      close_tokens: a thought that has sampled these tokens in a row ends; none: no tag ends it.
      key_BR: one key a thought.
      max_tokens: L.
      temperature: > 0; near 0 this is greedy.
      group_size: G where each G neighbours in R start at one position: the opening tag is then read once for them.
      slots: Q, thoughts of a document decoded at a time; None: all R.
      keep: which tokens may be drawn.
      limit_BR: thoughts end after this many tokens, at most L; for workloads of known lengths.
      unroll: decode with unrolled layers (`LanguageModel.unrolled`); None: on CPU, where it pays.
      target_BRH: the true tokens after each thought, to be scored as well; every thought needs a slot of its own.
      ends: [states, V], an automaton over tokens that every thought starts in state 0: ends[s, v] is the state after
        token v, and a thought that reaches the last state has stopped.
      own: what each position has between prefix and thought in place of the opening tag; not in hybrids, whose states
        would run through the padding.

    Raises:
      ValueError: no opening tag, R is no multiple of G, true tokens to score with fewer slots than thoughts or after
        tokens of each position's own, or such tokens in a hybrid.
    """
    B, R = prefix_length_BR.shape
    if not (open_tokens or own) or R % group_size:
        raise ValueError(f"need an opening tag (got {len(open_tokens)} tokens) and {R} a multiple of {group_size}")
    if own and (model.config.hybrid is not None or target_BRH is not None):
        raise ValueError("tokens of each position's own are for models without recurrent layers, and without targets")
    if backend.platform() == "cpu" if unroll is None else unroll:
        model, params, cache = model.unrolled(), unstack_layers(params), unstack_cache(cache)
    limit_BR = jnp.full((B, R), max_tokens) if limit_BR is None else jnp.minimum(limit_BR, max_tokens)
    Q = R if slots is None else min(slots, R)
    if target_BRH is not None and Q < R:
        raise ValueError(f"{R} thoughts in {Q} slots overwrite each other: without them true tokens cannot be scored")
    prefix_length_BK = prefix_length_BR[:, ::group_size]
    if own is None:
        tokens_BKS = jnp.broadcast_to(jnp.asarray(open_tokens, jnp.int32), (*prefix_length_BK.shape, len(open_tokens)))
    else:
        tokens_BKS = own.tokens_BKS
    n_open = tokens_BKS.shape[-1]
    opening = read_opening(model, params, cache, prefix_length_BK, tokens_BKS, own and own.start_BK)
    close_C = jnp.asarray(close_tokens, jnp.int32)
    engine = Engine(
        model, params, opening, prefix_length_BK, group_size, key_BR, limit_BR, close_C, temperature, keep,
        hold=target_BRH is not None, ends_SV=ends, start_BK=own and own.start_BK,
    )  # fmt: skip
    sizes = ring_sizes(max_tokens)
    carry = engine.refill(engine.idle(Q, max_tokens, n_open + sizes[0]))
    for size in sizes:
        carry = carry._replace(cache=grow(carry.cache, n_open + size))

        def going_on(carry, size=size):
            has_room = carry.slots.taken_BQ < size
            return carry.slots.live_BQ.any() & jnp.all(has_room | ~carry.slots.live_BQ)

        if Q == R:
            with jax.named_scope(f"ring_{size}"):
                carry = jax.lax.while_loop(going_on, engine.one_token, carry)
            continue

        def until_one_ends(carry, going_on=going_on):
            return going_on(carry) & ~(~carry.slots.live_BQ & (carry.next_B < R)[:, None]).any()

        def stretch(carry, until_one_ends=until_one_ends, size=size):
            with jax.named_scope(f"ring_{size}"):
                carry = jax.lax.while_loop(until_one_ends, engine.one_token, carry)
            return engine.refill(carry)

        with jax.named_scope(f"refills_{size}"):
            carry = jax.lax.while_loop(going_on, stretch, carry)
    if target_BRH is None:
        return carry.out
    cache = carry.cache._replace(end_BR=carry.cache.start_BR + n_open + carry.out.length_BR)
    scores = score_ended(model, params, cache, carry.slots.hidden_BQD, carry.out.stopped_BR, target_BRH, close_tokens)
    return carry.out._replace(target_logprob_BRH=scores.logprob, target_correct_BRH=scores.correct)


def ring_sizes(max_tokens: int) -> tuple[int, ...]:
    """Thought tokens that the ring has room for, from the first ring to the last."""
    last = [max_tokens * quarters // 4 for quarters in range(1, 5)] if max_tokens >= LONG else [max_tokens]
    sizes = [min(SMALLEST_RING, last[0])]
    while sizes[-1] < last[0]:
        sizes.append(min(GROWTH * sizes[-1], last[0]))
    return (*sizes, *last[1:])


class Opening(NamedTuple):
    """The opening tag as the thoughts of each of K positions see it: a fork that has read it, with room for no more,
    and the hidden state that predicts the first token of a thought."""

    cache: Cache
    hidden_BKD: jax.Array


def read_opening(
    model: LanguageModel, params: Params, cache: Cache, prefix_length_BK: jax.Array, tokens_BKS: jax.Array,
    start_BK: jax.Array | None = None,
) -> Opening:  # fmt: skip
    """Reads the opening tag (or tokens of each position's own, from `start_BK`) after each prefix, once for all
    thoughts that start there."""
    branches = fork(cache, prefix_length_BK, tokens_BKS.shape[-1])
    if start_BK is not None:
        branches = branches._replace(start_BR=start_BK)
    # The barrier keeps XLA from evaluating attention over the still empty room at compile time.
    branches = jax.lax.optimization_barrier(branches)
    hidden_BKSD, branches = model.hidden(params, tokens_BKS, branches)
    return Opening(branches, hidden_BKSD[:, :, -1])


class Engine(NamedTuple):
    """What stays the same during a rollout, and the two things that happen in it: a token for every slot, and new
    thoughts for idle ones."""

    model: LanguageModel
    params: Params
    opening: Opening
    prefix_length_BK: jax.Array
    group_size: int
    key_BR: jax.Array
    limit_BR: jax.Array
    close_C: jax.Array
    temperature: float
    keep: Filter
    hold: bool  # an ended thought's hidden and recurrent states stay as they were after its last token
    ends_SV: jax.Array | None = None
    start_BK: jax.Array | None = None  # of `Own`

    def idle(self, Q: int, max_tokens: int, columns: int) -> Carry:
        """Before the first refill: Q idle slots a document, a ring of empty columns, the first of them for the tag."""
        (B, R), D = self.limit_BR.shape, self.opening.hidden_BKD.shape[-1]
        opened = self.opening.cache
        rows_BQ = jnp.zeros((B, Q), jnp.int32)

        def ring(opened):
            return jnp.zeros((*opened.shape[:-3], Q, columns, opened.shape[-1]), opened.dtype)

        cache = opened._replace(
            branch_k=jax.tree.map(ring, opened.branch_k), branch_v=jax.tree.map(ring, opened.branch_v),
            prefix_length_BR=rows_BQ, start_BR=rows_BQ, states=gather_states(opened.states, rows_BQ),
        )  # fmt: skip
        recent_BQC = jnp.full((B, Q, self.close_C.size), -1, jnp.int32)
        hidden_BQD = jnp.zeros((B, Q, D), self.opening.hidden_BKD.dtype)
        slots = Slots(rows_BQ + R, rows_BQ, rows_BQ > 0, hidden_BQD, recent_BQC, rows_BQ)
        tokens_BRL, rows_BR = jnp.zeros((B, R, max_tokens), jnp.int32), jnp.zeros((B, R), jnp.int32)
        out = Rollout(tokens_BRL, rows_BR, rows_BR > 0, jnp.zeros(tokens_BRL.shape, jnp.float32))
        return Carry(cache, slots, jnp.zeros((B,), jnp.int32), out)

    def refill(self, carry: Carry) -> Carry:
        """Gives idle slots the next thoughts of their document, as long as there are any."""
        cache, slots, R = carry.cache, carry.slots, self.limit_BR.shape[1]
        idle_BQ = ~slots.live_BQ
        next_BQ = carry.next_B[:, None] + jnp.cumsum(idle_BQ, -1) - 1
        new_BQ = idle_BQ & (next_BQ < R)
        request_BQ = jnp.where(new_BQ, next_BQ, jnp.where(idle_BQ, R, slots.request_BQ))
        position_BQ = jnp.minimum(request_BQ, R - 1) // self.group_size

        opened, columns = self.opening.cache, capacity(cache)

        def put(ring_CE, opened_SE):  # the opening tag into the columns just before the next token's
            index = position_BQ[:, None, :, None, None]
            own_SE = jnp.take_along_axis(opened_SE, index.reshape(*(1,) * (opened_SE.ndim - 5), *index.shape), -3)
            S = opened_SE.shape[-2]
            if S > FEW:
                s_C = (jnp.arange(columns) - (cache.written - opened.written)) % columns
                own_CE = jnp.take(own_SE, jnp.minimum(s_C, S - 1), -2)
                return jnp.where(new_BQ[:, None, :, None, None] & (s_C < S)[:, None], own_CE, ring_CE)
            for s in range(S):
                at = (cache.written - opened.written + s) % columns
                old_1E = jax.lax.dynamic_slice_in_dim(ring_CE, at, 1, -2)
                new_1E = jnp.where(new_BQ[:, None, :, None, None], own_SE[..., s : s + 1, :], old_1E)
                ring_CE = write(ring_CE, new_1E, at)
            return ring_CE

        hidden_BQD = jnp.take_along_axis(self.opening.hidden_BKD, position_BQ[..., None], 1)
        first_BQ = cache.written - opened.written
        if self.start_BK is not None:
            first_BQ = first_BQ + jnp.take_along_axis(self.start_BK, position_BQ, 1)
        cache = cache._replace(
            branch_k=jax.tree.map(put, cache.branch_k, opened.branch_k),
            branch_v=jax.tree.map(put, cache.branch_v, opened.branch_v),
            states=choose_states(new_BQ, gather_states(opened.states, position_BQ), cache.states),
            prefix_length_BR=jnp.where(
                new_BQ, jnp.take_along_axis(self.prefix_length_BK, position_BQ, 1), cache.prefix_length_BR
            ),
            start_BR=jnp.where(new_BQ, first_BQ, cache.start_BR),
        )  # fmt: skip
        slots = Slots(
            request_BQ,
            jnp.where(new_BQ, 0, slots.taken_BQ),
            slots.live_BQ | new_BQ,
            choose(new_BQ, hidden_BQD, slots.hidden_BQD, 1),
            jnp.where(new_BQ[..., None], -1, slots.recent_BQC),
            jnp.where(new_BQ, 0, slots.ending_BQ),
        )
        return Carry(cache, slots, carry.next_B + new_BQ.sum(-1), carry.out)

    def one_token(self, carry: Carry) -> Carry:
        """Samples a token in every live slot and reads it; thoughts that end leave their slots idle."""
        cache, slots, next_B, out = carry
        index_BQ = jnp.minimum(slots.request_BQ, self.limit_BR.shape[1] - 1)
        key_BQ = jax.vmap(lambda key_R, index_Q: key_R[index_Q])(self.key_BR, index_BQ)
        uniform_BQ = jax.vmap(jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n))))(
            key_BQ, slots.taken_BQ
        )
        logits_BQV = self.keep(self.model.unembed(self.params, slots.hidden_BQD) / self.temperature)
        token_BQ, logprob_BQ = inverse_cdf(logits_BQV, uniform_BQ)
        token_BQ = jnp.where(slots.live_BQ, token_BQ, 0)
        recent_BQC = jnp.concatenate([slots.recent_BQC, token_BQ[..., None]], -1)[..., 1:]
        taken_BQ = slots.taken_BQ + slots.live_BQ
        closed_BQ, ending_BQ = jnp.zeros_like(slots.live_BQ), slots.ending_BQ
        if self.close_C.size:
            closed_BQ = jnp.all(recent_BQC == self.close_C, -1)
        if self.ends_SV is not None:
            ending_BQ = self.ends_SV[ending_BQ, token_BQ].astype(jnp.int32)
            closed_BQ |= ending_BQ == self.ends_SV.shape[0] - 1
        stopped_BQ = slots.live_BQ & closed_BQ
        live_BQ = slots.live_BQ & ~stopped_BQ & (taken_BQ < jnp.take_along_axis(self.limit_BR, index_BQ, 1))

        def note(out_RL, value_Q, request_Q, at_Q):  # an idle slot's request lies outside and is dropped
            return out_RL.at[request_Q, at_Q].set(value_Q, mode="drop")

        def note_one(out_R, value_Q, request_Q):
            return out_R.at[request_Q].set(value_Q, mode="drop")

        where = jnp.where(slots.live_BQ, slots.request_BQ, self.limit_BR.shape[1])
        out = Rollout(
            jax.vmap(note)(out.thought_BRL, token_BQ, where, slots.taken_BQ),
            jax.vmap(note_one)(out.length_BR, taken_BQ, where),
            jax.vmap(note_one)(out.stopped_BR, stopped_BQ, where),
            jax.vmap(note)(out.logprob_BRL, logprob_BQ, where, slots.taken_BQ),
        )
        hidden_BQSD, read = self.model.hidden(self.params, token_BQ[..., None], cache)
        hidden_BQD = hidden_BQSD[:, :, 0]
        if self.hold:
            hidden_BQD = choose(slots.live_BQ, hidden_BQD, slots.hidden_BQD, 1)
            read = read._replace(states=choose_states(slots.live_BQ, read.states, cache.states))
        slots = Slots(slots.request_BQ, taken_BQ, live_BQ, hidden_BQD, recent_BQC, ending_BQ)
        return Carry(read, slots, next_B, out)


def choose(new_BQ: jax.Array, new: Any, old: Any, own_axes: int) -> Any:
    """Leaves [..., B, Q, *own] with slots of `new` where the mask says so and of `old` elsewhere."""
    mask = new_BQ.reshape(*new_BQ.shape, *(1,) * own_axes)
    return jax.tree.map(lambda x, y: jnp.where(mask, x, y), new, old)


def choose_states(new_BQ: jax.Array, new: Any, old: Any) -> Any:
    """The same of a hybrid's recurrent states; None for other models."""

    def of_layer(new: MambaState, old: MambaState) -> MambaState:
        return MambaState(choose(new_BQ, new.ssm, old.ssm, 3), choose(new_BQ, new.conv, old.conv, 2))

    return jax.tree.map(of_layer, new, old, is_leaf=lambda x: isinstance(x, MambaState))


def grow(cache: Cache, columns: int) -> Cache:
    """The same cache with a ring of more columns: what lay at its number modulo the old size moves to the new one."""
    more = columns - capacity(cache)
    if not jax.tree.leaves(cache.branch_k) or more == 0:
        return cache
    oldest = cache.written - capacity(cache)

    def move(ring_CE):
        ring_CE = jnp.roll(ring_CE, -oldest, -2)
        ring_CE = jnp.pad(ring_CE, [(0, 0)] * (ring_CE.ndim - 2) + [(0, more), (0, 0)])
        return jnp.roll(ring_CE, oldest % columns, -2)

    return cache._replace(branch_k=jax.tree.map(move, cache.branch_k), branch_v=jax.tree.map(move, cache.branch_v))
