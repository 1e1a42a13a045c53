"""Documents and their thoughts packed into sequences without padding, for the learner.

A bin is one sequence: a document's tokens up to its last position, all its thoughts, then the next document. What a
token sees are two ranges of the sequence (`models/self_attention.py`), so a prefix is still computed once for all its
thoughts. Bins have one size, but how many there are depends on the lengths that came out, and the learner computes no
more than those.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.self_attention import Layout, Ranges
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import token_logprobs
from rlp_jax.rollout.filters import KEEP_ALL, Filter
from rlp_jax.rollout.scoring import BranchScores, Thoughts, lay_out

MULTIPLE = 128  # bins are a multiple of this: a block of attention kernels
SCORED = 512  # places whose logits are held together: also what may be scored too much at the end


class Bin(NamedTuple):
    """One packed sequence of D documents.

    Attributes:
      tokens_C, layout: what the model reads; layout without a batch axis.
      place_DRL: where thought token l is predicted, C past its end.
      place_DRH: where target h is predicted, C in an absent branch.
    """

    tokens_C: jax.Array
    layout: Layout
    place_DRL: jax.Array
    place_DRH: jax.Array


def branch_tokens(thoughts: Thoughts, template: TemplateTokens, horizon: int) -> jax.Array:
    """Tokens of each branch, [..., R]: opening tag, thought, closing tag where it is appended, known targets."""
    closing = jnp.where(thoughts.stopped_BR, 0, len(template.close))
    return len(template.open) + thoughts.length_BR + closing + horizon - 1


def longest_branch(thought_tokens: int, template: TemplateTokens, horizon: int) -> int:
    """What `branch_tokens` is at most."""
    return len(template.open) + thought_tokens + len(template.close) + horizon - 1


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
        used_P, count_P, index_PD = carry
        room_P = (used_P + tokens_B[b] <= capacity) & (count_P < documents)
        p = room_P.argmax()
        index_PD = index_PD.at[p, count_P[p]].set(b)
        return (used_P.at[p].add(tokens_B[b]), count_P.at[p].add(1), index_PD), None

    nothing_P = jnp.zeros(bins, jnp.int32)
    start = nothing_P, nothing_P, jnp.full((bins, documents), B)
    (_, count_P, index_PD), _ = jax.lax.scan(put, start, jnp.argsort(-tokens_B))
    return index_PD, (count_P > 0).sum()


def pack(
    tokens_DT: jax.Array,
    prefix_length_DR: jax.Array,
    present_DR: jax.Array,
    thoughts: Thoughts,
    target_DRH: jax.Array,
    template: TemplateTokens,
    capacity: int,
) -> Bin:
    """The sequence of a bin's documents, which together need at most `capacity` tokens.

    Args:
      tokens_DT: documents with what stands before them (instruction).
      prefix_length_DR: what each branch sees of them.
      present_DR: whether the branch is there; a document without any takes no room.
    """
    T, H, C = tokens_DT.shape[1], target_DRH.shape[-1], capacity
    read_D = jnp.where(present_DR, prefix_length_DR, 0).max(-1)
    size_DR = jnp.where(present_DR, branch_tokens(thoughts, template, H), 0)
    size_D = read_D + size_DR.sum(-1)
    start_D = jnp.cumsum(size_D) - size_D
    start_DR = (start_D + read_D)[:, None] + jnp.cumsum(size_DR, -1) - size_DR

    t_T = jnp.arange(T)
    place_DT = jnp.where(t_T < read_D[:, None], start_D[:, None] + t_T, C)
    tokens_DRS, index_DRH = lay_out(thoughts, target_DRH, template)
    s_S = jnp.arange(tokens_DRS.shape[-1])
    place_DRS = jnp.where(s_S < size_DR[..., None], start_DR[..., None] + s_S, C)

    def scatter(of_documents_DT, of_branches_DRS, rest_C=None):
        rest_C = jnp.zeros(C, jnp.int32) if rest_C is None else rest_C
        rest_C = rest_C.at[place_DT].set(jnp.broadcast_to(of_documents_DT, place_DT.shape), mode="drop")
        return rest_C.at[place_DRS].set(jnp.broadcast_to(of_branches_DRS, place_DRS.shape), mode="drop")

    ranges = Ranges(
        scatter(0, start_D[:, None, None]),
        scatter(0, (start_D[:, None] + prefix_length_DR)[..., None]),
        scatter(start_D[:, None], start_DR[..., None], jnp.arange(C)),  # padding sees itself alone
    )
    position_C = scatter(t_T, prefix_length_DR[..., None] + s_S)
    l_L = jnp.arange(thoughts.thought_BRL.shape[-1])
    there_DRL = present_DR[..., None] & (l_L < thoughts.length_BR[..., None])
    return Bin(
        scatter(tokens_DT, tokens_DRS),
        Layout(position_C, ranges),
        jnp.where(there_DRL, start_DR[..., None] + len(template.open) - 1 + l_L, C),
        jnp.where(present_DR[..., None], start_DR[..., None] + index_DRH, C),
    )


def score_bins(
    model: LanguageModel,
    params: Params,
    bins: Bin,
    thought_ADRL: jax.Array,
    target_ADRH: jax.Array,
    temperature: float,
    keep: Filter = KEEP_ALL,
) -> BranchScores:
    """`scoring.score_branches` of A bins side by side (leaves of `bins` have that axis in front), [A, D, R, ...].

    What a thought's end or an absent branch leaves empty is 0.
    """
    hidden_ACD = model.hidden_packed(params, bins.tokens_C, bins.layout)
    unembed = functools.partial(model.unembed, params)

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
        chunk = max(1, min(SCORED, n))
        scores = token_logprobs(unembed, hidden_AnD, token_An, temperature, filter_fn, chunk, wanted)
        back = jax.vmap(lambda value, rank: value.at[rank].get(mode="fill", fill_value=0))
        return jax.tree.map(lambda x: back(x, rank).reshape(shape), scores)

    of_thought = score(bins.place_DRL, thought_ADRL, temperature, None if keep.everything else keep)
    of_target = score(bins.place_DRH, target_ADRH, 1.0, None)
    return BranchScores(of_thought.logprob, of_thought.entropy, of_target.logprob, of_target.correct)
