# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H (arXiv 2504.03624): layers x + mixer(norm(x)) with one mixer each, in the order of a pattern string.

"M" is Mamba-2, "*" attention without positions, "-" a squared-ReLU MLP. Groups of layers that repeat are scanned: the
pattern is cut into segments (unit, repeats) so that as few layers as possible are traced, and a segment's parameters
are stacked over its repeats.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlp_jax.models.blocks import Attention, ModelConfig, embed, global_view, make_embed, rematerialised, unembed
from rlp_jax.models.cache import Cache, gather_states
from rlp_jax.models.constraints import DOCUMENTS, constrain
from rlp_jax.models.layers import Dense, RMSNorm
from rlp_jax.models.mamba2 import Mamba2, MambaState

KINDS = {"M": "mamba", "*": "attention", "-": "mlp"}


@functools.lru_cache
def segments(pattern: str) -> tuple[tuple[str, int], ...]:
    """Cuts a pattern into (unit, repeats) with the least total length of units, then the fewest segments.

    >>> segments("M-M-M*M-M-M*-")
    (('M-M-M*', 2), ('-', 1))
    """
    best: list[tuple[int, tuple[tuple[str, int], ...]]] = [(0, ())]
    for end in range(1, len(pattern) + 1):
        found = []
        for start in range(end):
            cost, before = best[start]
            unit = _period(pattern[start:end])
            found.append((cost + unit, (*before, (pattern[start : start + unit], (end - start) // unit))))
        best.append(min(found, key=lambda option: (option[0], len(option[1]))))
    return best[-1][1]


def _period(text: str) -> int:
    """Length of the shortest unit that `text` repeats a whole number of times."""
    return next(n for n in range(1, len(text) + 1) if len(text) % n == 0 and text == text[:n] * (len(text) // n))


def layer_name(unit: str, place: int) -> str:
    """What the layer at a place of its unit is called in the tree: mamba_0, mlp_1, attention_2."""
    return f"{KINDS[unit[place]]}_{place}"


class SquaredReLUMLP(nn.Module):
    """down(relu(up(x))²) (So et al., arXiv 2109.08668)."""

    d_ff: int

    @nn.compact
    def __call__(self, x_D: jax.Array) -> jax.Array:
        up_F = Dense((self.d_ff,), name="up")(x_D)
        return Dense((x_D.shape[-1],), name="down")(jnp.square(nn.relu(up_F)))


class Layer(nn.Module):
    """One layer of any kind. `past` is its part of the cache; what it returns besides x is what the cache gains."""

    config: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x_BRSD, past, shared):
        cfg = self.config
        view, stop_BK, index_BR = shared
        normed = RMSNorm(cfg.norm_eps, name="norm")(x_BRSD)
        if self.kind == "-":
            update, new = SquaredReLUMLP(cfg.d_ff, name="mixer")(normed), None
        elif self.kind == "*":
            update, new = Attention(cfg, name="mixer")(normed, past, view)
        else:
            update, new = self._mamba(normed, past, stop_BK, index_BR)
        return constrain(x_BRSD + update, DOCUMENTS), new

    def _mamba(self, x_BRSD, past, stop_BK, index_BR):
        mixer = Mamba2(self.config.hybrid, self.config.norm_eps, name="mixer")
        B, R = x_BRSD.shape[:2]
        if past is None:  # a document, R = 1: its states at the stops
            out, new = mixer(x_BRSD[:, 0], None, stop_BK)
            return out[:, None], new
        if index_BR is not None:  # a fork without room: the branches' states live inside this layer alone
            past = gather_states(past, index_BR)
        out, new = mixer(_flat(x_BRSD), jax.tree.map(_flat, past))
        new = None if index_BR is not None else jax.tree.map(lambda x: x.reshape(B, R, *x.shape[1:]), new)
        return out.reshape(x_BRSD.shape), new


def _flat(x_BR: jax.Array) -> jax.Array:
    return x_BR.reshape(-1, *x_BR.shape[2:])


class Unit(nn.Module):
    """The layers of one repeat of a segment. Parts of the cache go in and come out by layer name."""

    config: ModelConfig
    unit: str

    @nn.compact
    def __call__(self, x_BRSD, past: dict[str, Any], shared):
        layer = rematerialised(Layer, self.config.remat)
        news = {}
        for place, kind in enumerate(self.unit):
            name = layer_name(self.unit, place)
            x_BRSD, new = layer(self.config, kind, name=name)(x_BRSD, past.get(name), shared)
            if new is not None:
                news[name] = new
        return x_BRSD, news


class Hybrid(nn.Module):
    """The interface of `Transformer`, with the layers of a pattern."""

    config: ModelConfig

    def setup(self):
        cfg = self.config
        self.embed = make_embed(cfg)
        if cfg.scan_layers:
            self.segments = [
                nn.scan(
                    Unit,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=(0, nn.broadcast),
                    length=repeats,
                )(cfg, unit)
                for unit, repeats in segments(cfg.hybrid.pattern)
            ]
        else:
            self.segments = [
                [Unit(cfg, unit) for _ in range(repeats)] for unit, repeats in segments(cfg.hybrid.pattern)
            ]
        self.final_norm = RMSNorm(cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.head = Dense((cfg.vocab_size,))

    def __call__(self, tokens_BRS: jax.Array, cache: Cache | None, stop_BK: jax.Array | None = None):
        """Hidden states [B, R, S, D]; the new keys, values and Mamba states by "segments_<s>/<layer name>", stacked
        over repeats."""
        cfg = self.config
        x_BRSD = embed(self, tokens_BRS)
        view = global_view(cfg, cache, jnp.arange(tokens_BRS.shape[2])[None, None])
        shared = (view, stop_BK, None if cache is None else cache.index_BR)
        k, v, states = {}, {}, {}
        for s, (unit, repeats) in enumerate(segments(cfg.hybrid.pattern)):
            names = {layer_name(unit, place): f"segments_{s}/{layer_name(unit, place)}" for place in range(len(unit))}
            past = {name: _past(cache, path) for name, path in names.items()}
            if cfg.scan_layers:
                x_BRSD, new = self.segments[s](x_BRSD, past, shared)
            else:
                news = []
                for repeat in range(repeats):
                    x_BRSD, new = self.segments[s][repeat](x_BRSD, _repeat(past, repeat), shared)
                    news.append(new)
                new = jax.tree.map(lambda *x: x, *news)
            for name, part in new.items():
                if name.startswith("attention"):
                    k[names[name]], v[names[name]] = part
                else:
                    states[names[name]] = part
        return self.final_norm(x_BRSD), (k, v, states)

    def unembed(self, x_D: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from final hidden states [..., D]."""
        return unembed(self, x_D)

    def everything(self, tokens_BRS: jax.Array) -> jax.Array:
        """Touches every parameter: used by init alone."""
        stop_BK = jnp.zeros((tokens_BRS.shape[0], 1), jnp.int32)
        return self.unembed(self(tokens_BRS, None, stop_BK)[0])


def _past(cache: Cache | None, path: str):
    """A layer's part of the cache, None where it has none (an MLP, or no cache)."""
    if cache is None:
        return None
    if path in cache.prefix_k:
        room = (None, None) if cache.branch_k is None else (cache.branch_k[path], cache.branch_v[path])
        return (cache.prefix_k[path], cache.prefix_v[path], *room)
    return cache.states.get(path)


def _repeat(past: dict[str, Any], repeat: int) -> dict[str, Any]:
    """One repeat's part of an unrolled cache, whose leaves are tuples over repeats."""

    def pick(part):
        if part is None:
            return None
        if isinstance(part, MambaState):
            return MambaState(part.ssm[repeat], part.conv[repeat])
        return tuple(None if x is None else x[repeat] for x in part)

    return {name: pick(part) for name, part in past.items()}
