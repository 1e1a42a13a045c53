# SPDX-License-Identifier: Apache-2.0
"""Documents and their thoughts packed into sequences without padding, for the learner.

A bin is one sequence: a document's tokens up to its last position, all its thoughts, then the next document. What a
token sees are two ranges of the sequence (`models/self_attention.py`), so a prefix is still computed once for all its
thoughts. Bins have one size, but how many there are depends on the lengths that came out, and the learner computes no
more than those.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.self_attention import Layout, Ranges
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import chunk_tokens, token_logprobs
from rlp_jax.rollout.filters import KEEP_ALL, Filter
from rlp_jax.rollout.scoring import BranchScores, Thoughts, lay_out

MULTIPLE = 8  # bins are a multiple of this
COARSE = 128  # and of this, a block of attention kernels, once it costs at most 1/16
SCORED = 512  # places whose logits are held together: also what may be scored too much at the end


class Bin(NamedTuple):
    """One packed sequence of d documents.

    Attributes:
      tokens_C, layout: what the model reads; layout without a batch axis.
      place_dRL: where thought token l is predicted, C past its end.
      place_dRH: where target h is predicted, C in an absent branch.
    """

    tokens_C: jax.Array
    layout: Layout
    place_dRL: jax.Array
    place_dRH: jax.Array


def branch_tokens(thoughts: Thoughts, template: TemplateTokens, horizon: int) -> jax.Array:
    """Tokens of each branch, [..., R]: opening tag, thought, closing tag where it is appended, known targets."""
    closing = jnp.where(thoughts.stopped_BR, 0, len(template.close))
    return len(template.open) + thoughts.length_BR + closing + horizon - 1


def longest_branch(thought_tokens: int, template: TemplateTokens, horizon: int) -> int:
    """What `branch_tokens` is at most."""
    return len(template.open) + thought_tokens + len(template.close) + horizon - 1


def bin_size(tokens: int) -> int:
    """Places of a bin that has to hold this many tokens."""
    multiple = COARSE if tokens >= 16 * COARSE else MULTIPLE
    return -(-tokens // multiple) * multiple


def assign(tokens_B: jax.Array, bins: int, capacity: int, documents: int) -> tuple[jax.Array, jax.Array]:
    """First-fit decreasing: the largest document first, each into the first bin that has room.

    Args:
      tokens_B: what each document needs.
      bins, capacity, documents: how many bins there are, and how many tokens and documents one holds.

    Returns:
      The documents of each bin [bins, documents], B where there is none, and how many bins are used. All documents find
      a place if a bin holds ceil(B / bins) of the largest.
    """
    B = tokens_B.shape[0]

    def put(carry, b):
        used_P, count_P, index_Pd = carry
        room_P = (used_P + tokens_B[b] <= capacity) & (count_P < documents)
        p = room_P.argmax()
        index_Pd = index_Pd.at[p, count_P[p]].set(b)
        return (used_P.at[p].add(tokens_B[b]), count_P.at[p].add(1), index_Pd), None

    nothing_P = jnp.zeros(bins, jnp.int32)
    start = nothing_P, nothing_P, jnp.full((bins, documents), B)
    (_, count_P, index_Pd), _ = jax.lax.scan(put, start, jnp.argsort(-tokens_B))
    return index_Pd, (count_P > 0).sum()


def pack(
    tokens_dT: jax.Array,
    prefix_length_dR: jax.Array,
    present_dR: jax.Array,
    thoughts: Thoughts,
    target_dRH: jax.Array,
    template: TemplateTokens,
    capacity: int,
) -> Bin:
    """The sequence of a bin's documents, which together need at most `capacity` tokens.

    Args:
      tokens_dT: documents with what stands before them (instruction).
      prefix_length_dR: what each branch sees of them.
      present_dR: whether the branch is there; a document without any takes no room.
    """
    T, H, C = tokens_dT.shape[1], target_dRH.shape[-1], capacity
    read_d = jnp.where(present_dR, prefix_length_dR, 0).max(-1)
    size_dR = jnp.where(present_dR, branch_tokens(thoughts, template, H), 0)
    size_d = read_d + size_dR.sum(-1)
    start_d = jnp.cumsum(size_d) - size_d
    start_dR = (start_d + read_d)[:, None] + jnp.cumsum(size_dR, -1) - size_dR

    t_T = jnp.arange(T)
    place_dT = jnp.where(t_T < read_d[:, None], start_d[:, None] + t_T, C)
    tokens_dRS, index_dRH = lay_out(thoughts, target_dRH, template)
    s_S = jnp.arange(tokens_dRS.shape[-1])
    place_dRS = jnp.where(s_S < size_dR[..., None], start_dR[..., None] + s_S, C)

    def scatter(of_documents_dT, of_branches_dRS, rest_C=None):
        rest_C = jnp.zeros(C, jnp.int32) if rest_C is None else rest_C
        rest_C = rest_C.at[place_dT].set(jnp.broadcast_to(of_documents_dT, place_dT.shape), mode="drop")
        return rest_C.at[place_dRS].set(jnp.broadcast_to(of_branches_dRS, place_dRS.shape), mode="drop")

    ranges = Ranges(
        scatter(0, start_d[:, None, None]),
        scatter(0, (start_d[:, None] + prefix_length_dR)[..., None]),
        scatter(start_d[:, None], start_dR[..., None], jnp.arange(C)),  # padding sees itself alone
    )
    position_C = scatter(t_T, prefix_length_dR[..., None] + s_S)
    l_L = jnp.arange(thoughts.thought_BRL.shape[-1])
    there_dRL = present_dR[..., None] & (l_L < thoughts.length_BR[..., None])
    return Bin(
        scatter(tokens_dT, tokens_dRS),
        Layout(position_C, ranges),
        jnp.where(there_dRL, start_dR[..., None] + len(template.open) - 1 + l_L, C),
        jnp.where(present_dR[..., None], start_dR[..., None] + index_dRH, C),
    )


def score_bins(
    model: LanguageModel,
    params: Params,
    bins: Bin,
    thought_AdRL: jax.Array,
    target_AdRH: jax.Array,
    temperature: float,
    keep: Filter = KEEP_ALL,
) -> BranchScores:
    """`scoring.score_branches` of A bins side by side (leaves of `bins` have that axis in front), [A, d, R, ...].

    What a thought's end or an absent branch leaves empty is 0.
    """
    hidden_ACD = model.hidden_packed(params, bins.tokens_C, bins.layout)
    unembed = model.unembedding(params)

    def score(place, token, temperature, filter_fn):
        shape, (A, C) = place.shape, bins.tokens_C.shape
        place, token = place.reshape(A, -1), token.reshape(A, -1)
        rank = jnp.cumsum(place < C, -1) - 1  # those that are there first, and no room for others
        n = min(C, place.shape[-1])
        rank = jnp.where(place < C, rank, n)
        fill = jax.vmap(lambda rank, value: jnp.zeros(n, jnp.int32).at[rank].set(value, mode="drop"))
        place_An, token_An = fill(rank, place), fill(rank, token)
        hidden_AnD = jnp.take_along_axis(hidden_ACD, place_An[..., None], 1)
        wanted = (place < C).sum(-1).max()
        chunk = min(SCORED, chunk_tokens(model.config.vocab_size), n)  # of each bin: they lie on different devices
        scores = token_logprobs(unembed, hidden_AnD, token_An, temperature, filter_fn, chunk, wanted)
        back = jax.vmap(lambda value, rank: value.at[rank].get(mode="fill", fill_value=0))
        return jax.tree.map(lambda x: back(x, rank).reshape(shape), scores)

    with jax.named_scope("thought_scores"):
        of_thought = score(bins.place_dRL, thought_AdRL, temperature, None if keep.everything else keep)
    with jax.named_scope("target_scores"):
        of_target = score(bins.place_dRH, target_AdRH, 1.0, None)
    return BranchScores(of_thought.logprob, of_thought.entropy, of_target.logprob, of_target.correct)
