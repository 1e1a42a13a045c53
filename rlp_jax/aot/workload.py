# SPDX-License-Identifier: Apache-2.0
"""How much an RLP step computes, from its settings alone: turns of its loops, and the operations that it needs.

Everything is for documents of full length with positions at their ends, and thoughts of one length.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlp_jax.aot.jaxpr_cost import Turns
from rlp_jax.config import Config
from rlp_jax.data.template import TemplateTokens
from rlp_jax.learner import Bins, Learner
from rlp_jax.models.blocked_attention import visited_blocks
from rlp_jax.models.transformer import LanguageModel, ModelConfig, Params
from rlp_jax.models.vocabulary import chunk_tokens
from rlp_jax.rollout import packing
from rlp_jax.rollout.engine import ring_sizes
from rlp_jax.rollout.scoring import Thoughts

PHASES = ("baseline", "prefill", "rollout", "scoring", "gradient", "update")


def loop_turns(model: LanguageModel, template: TemplateTokens, config: Config, shards: int, tokens: int) -> Turns:
    """Turns of the loops whose end depends on what is sampled.

    Args:
      shards: runs of documents, as the learner gets them.
      tokens: sampled tokens of each thought.
    """
    rlp = config.rlp
    branches = rlp.positions * rlp.group_size
    learner, T = Learner(model, template, config, shards), config.data.document_tokens
    bins = learner.bins(rlp.microbatches, config.batch_documents // rlp.minibatches, T)
    of_batch = learner.bins(rlp.microbatches * rlp.minibatches, config.batch_documents, T)
    length = _length(template, config, tokens)

    def used_of(bins: Bins) -> int:
        return min(bins.most, -(-bins.per_shard // max(1, bins.capacity // length)))

    used = used_of(bins)
    held = -(-bins.per_shard // used)  # documents of a bin
    scored = {"thought_scores": branches * tokens, "target_scores": branches * rlp.horizon}
    chunk = min(packing.SCORED, chunk_tokens(model.config.vocab_size))
    chunks = {name: math.ceil(held * wanted / chunk) for name, wanted in scored.items()}
    visited: dict[tuple[int, int], float] = {}

    def kernel_steps(name: str, eqn: Any) -> float:
        blocks, block = _blocks(eqn)
        if -(-bins.capacity // block) != blocks:
            return causal_steps(name, eqn)
        if (blocks, block) not in visited:
            visited[blocks, block] = _visited_by_bin(template, config, bins, held, tokens, block)
        return visited[blocks, block]

    loops = {"bins": used, "all_bins": used_of(of_batch)}
    return Turns(_decoding_turns(rlp, branches, tokens) | loops | chunks, kernel_steps)


def _blocks(eqn: Any) -> tuple[int, int]:
    """Blocks of one sequence in `models/pallas_attention.py`, and their size: operands are steps and limits."""
    sequences, _, places = eqn.invars[2].aval.shape
    blocks = math.isqrt(eqn.invars[1].aval.size // sequences)
    return blocks, places // blocks


def causal_steps(name: str, eqn: Any) -> float:
    """Pairs of blocks that causal attention over one sequence visits, see `Turns.grid`."""
    blocks, _ = _blocks(eqn)
    return blocks * (blocks + 1) / 2


def _decoding_turns(rlp, branches: int, tokens: int) -> dict[str, float]:
    """Of the loop over each ring. With fewer slots than thoughts, all rounds but the first run in the last ring."""
    rounds = 1 if rlp.slots == 0 else -(-branches // rlp.slots)
    loops, before = {}, 0
    for size in ring_sizes(rlp.thought_tokens):
        here = max(0, min(size, tokens) - before)
        last = before < tokens <= size
        loops[f"refills_{size}"] = rounds if last else min(1, here)
        loops[f"ring_{size}"] = (here + (rounds - 1) * tokens) / rounds if last else here
        before = size
    return loops


def _length(template: TemplateTokens, config: Config, tokens: int) -> int:
    """Tokens of a document with its thoughts, without padding."""
    rlp = config.rlp
    branch = packing.longest_branch(tokens, template, rlp.horizon)
    return config.data.document_tokens + len(template.context) + rlp.positions * rlp.group_size * branch


def _visited_by_bin(template: TemplateTokens, config: Config, bins: Bins, held: int, tokens: int, block: int) -> float:
    """Pairs of blocks that attention over one bin of `held` documents computes."""
    rlp, T = config.rlp, config.data.document_tokens + len(template.context)
    shape = held, rlp.positions * rlp.group_size
    thoughts = Thoughts(
        jnp.zeros((*shape, rlp.thought_tokens), jnp.int32), jnp.full(shape, tokens), jnp.zeros(shape, bool)
    )
    target = jnp.zeros((*shape, rlp.horizon), jnp.int32)
    one = packing.pack(
        jnp.zeros((held, T), jnp.int32), jnp.full(shape, T), jnp.ones(shape, bool), thoughts, target, template,
        bins.capacity,
    )  # fmt: skip
    ranges = [jnp.pad(x, (0, -bins.capacity % block)) for x in one.layout.ranges]
    places = jnp.arange(ranges[2].size)
    own = jnp.where(places < bins.capacity, ranges[2], places)
    return float(visited_blocks(ranges[0][None], ranges[1][None], own[None], block, block).sum())


def needed_flops(
    model: ModelConfig, params: Params, template: TemplateTokens, config: Config, tokens: int
) -> dict[str, float]:
    """What each phase needs at least, over all devices: products of weights, attention over pairs that see each other,
    recurrences, and logits of tokens that are scored or drawn; of the gradient what `remat` computes again, too.

    Args:
      params: shapes are enough.
    """
    rlp, B = config.rlp, config.batch_documents
    branches, D = rlp.positions * rlp.group_size, model.d_model
    T = config.data.document_tokens
    prefix = T + len(template.context)
    branch = packing.longest_branch(tokens, template, rlp.horizon)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    layers = sum(x.size for path, x in leaves if path[-1].key == "kernel" and {"head", "conv"}.isdisjoint(_keys(path)))
    per_token, head = 2.0 * layers, 2.0 * D * model.vocab_size
    attending = model.n_layers if model.hybrid is None else model.hybrid.pattern.count("*")
    pair = 4.0 * model.n_heads * model.head_dim * attending  # two products
    mixing = _recurrence(model)

    def causal(n):
        return n * (n + 1) / 2

    def forward(n):
        return n * (per_token + mixing) + pair * causal(n)

    # A branch's token sees the prefix and its own branch.
    branch_pairs = branches * (branch * prefix + causal(branch))
    thought_pairs = branches * ((len(template.open) + tokens) * prefix + causal(len(template.open) + tokens))
    all_tokens = prefix + branches * branch
    again = 1.0 if config.remat == "layer" else 0.0
    scored = branches * (tokens + rlp.horizon)
    gradient = all_tokens * (per_token * (3 + again) + mixing * (4 + again)) + 4 * head * scored
    gradient += pair * (causal(prefix) + branch_pairs) * (1 + again + 2.5)  # backward: five products, not two
    scoring = all_tokens * (per_token + mixing) + pair * (causal(prefix) + branch_pairs) + head * scored
    rollout = branches * tokens * (per_token + _recurrence_step(model) + head) + pair * thought_pairs
    needed = {
        "baseline": forward(T + len(template.plain)) + rlp.positions * rlp.horizon * head,
        "prefill": forward(prefix),
        "rollout": rollout,
        "gradient": gradient * rlp.updates_per_batch,
    }
    if rlp.minibatches > 1:
        needed["scoring"] = scoring
    return {name: B * flops for name, flops in needed.items()}


def _keys(path) -> set[str]:
    return {entry.key for entry in path}


def _recurrence_step(model: ModelConfig) -> float:
    """Of a token through all Mamba-2 layers, one at a time: what is read out of their states."""
    hybrid = model.hybrid
    return 2.0 * hybrid.pattern.count("M") * hybrid.width * hybrid.state_size if hybrid else 0.0


def _recurrence(model: ModelConfig) -> float:
    """Of a token through all Mamba-2 layers, in chunks: inside its chunk, from the state before, into that after."""
    if model.hybrid is None:
        return 0.0
    hybrid = model.hybrid
    q, Z = hybrid.chunk_size, hybrid.state_size
    return 2.0 * hybrid.pattern.count("M") * (q * Z * hybrid.groups + q * hybrid.width + 2 * Z * hybrid.width)
