# SPDX-License-Identifier: Apache-2.0
"""The dense decoder (Llama, SmolLM2, Qwen2, Qwen3, Gemma 3): one Linen module scanned over layers, an explicit cache.

Everything outside `models/` sees `LanguageModel` only: pure functions of (params, tokens, cache).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlp_jax.models import cache as cache_lib
from rlp_jax.models.blocks import (
    Attention,
    ModelConfig,
    View,
    embed,
    global_view,
    head_angles,
    make_embed,
    rematerialised,
    unembed,
)
from rlp_jax.models.cache import Cache
from rlp_jax.models.constraints import DOCUMENTS, HEADS, constrain
from rlp_jax.models.hybrid import Hybrid
from rlp_jax.models.layers import Dense, GatedMLP, RMSNorm
from rlp_jax.models.self_attention import Layout, causal

Params = dict[str, Any]


def local_view(cfg: ModelConfig, cache: Cache | None, position_BRS: jax.Array, everything: View) -> View:
    """The view of layers with a window: distances count positions of the sequence, across prefix and branch."""
    rotary = everything.rotary
    assert cfg.window is not None
    if cfg.local_rope_theta is not None:
        rotary = head_angles(position_BRS, cfg.head_dim, cfg.local_rope_theta)
    if cache is None:
        assert everything.ranges is not None
        return everything._replace(rotary=rotary, ranges=everything.ranges.within(cfg.window, position_BRS[:, 0]))
    s_S = jnp.arange(position_BRS.shape[-1])
    assert everything.new_mask is not None and cache.prefix_length_BR is not None and cache.start_BR is not None
    new_mask = everything.new_mask & (s_S[:, None] - s_S < cfg.window)
    prefix_mask = branch_mask = None
    if everything.prefix_mask is not None:
        t_T = jnp.arange(everything.prefix_mask.shape[-1])
        prefix_mask = everything.prefix_mask & (position_BRS[..., None] - t_T < cfg.window)
    if everything.branch_mask is not None:
        assert cache.written is not None
        written = cache.written if everything.column is None else cache.written + s_S.size
        number_C = cache_lib.token_numbers(everything.branch_mask.shape[-1], written)
        position_BR1C = number_C + (cache.prefix_length_BR - cache.start_BR)[..., None, None]
        branch_mask = everything.branch_mask & (position_BRS[..., None] - position_BR1C < cfg.window)
    return View(rotary, prefix_mask, branch_mask, new_mask, everything.column)


def choose_view(local: jax.Array | bool | None, everything: View, window: View | None) -> View:
    """The view of one layer; `local` is an array in a scan over layers, a Python bool in an unrolled model."""
    if local is None or isinstance(local, bool):
        if not local:
            return everything
        assert window is not None
        return window
    return jax.tree.map(lambda near, far: jnp.where(local, near, far), window, everything)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BRSD, past, local, shared):
        """One layer.

        `past` holds its cached keys and values, `local` whether it sees a window only (None: no layer does), `shared`
        the `View` of global layers and that of local ones.
        """
        cfg = self.config
        view = choose_view(local, *shared)

        def norm(name):
            return RMSNorm(cfg.norm_eps, cfg.norm_offset, name=name)

        normed = norm("attention_norm")(x_BRSD)
        update, new = Attention(cfg, name="attention")(normed, past, view)
        x_BRSD = x_BRSD + (norm("post_attention_norm")(update) if cfg.sandwich_norms else update)
        update = GatedMLP(cfg.d_ff, cfg.activation, name="mlp")(norm("mlp_norm")(x_BRSD))
        x_BRSD = x_BRSD + (norm("post_mlp_norm")(update) if cfg.sandwich_norms else update)
        return constrain(x_BRSD, DOCUMENTS), new


class Transformer(nn.Module):
    """Tokens in, final hidden states out. Callers ask `unembed` for logits where they need them."""

    config: ModelConfig

    def setup(self):
        cfg = self.config
        self.embed = make_embed(cfg)
        block = rematerialised(Block, cfg.remat)
        if cfg.scan_layers:
            self.layers: Any = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast),
                length=cfg.n_layers,
            )(cfg)
        else:
            self.layers = [block(cfg) for _ in range(cfg.n_layers)]
        self.final_norm = RMSNorm(cfg.norm_eps, cfg.norm_offset)
        if not cfg.tie_embeddings:
            self.head = Dense((cfg.vocab_size,))

    def __call__(self, tokens_BRS: jax.Array, cache: Cache | None, layout: Layout | None = None):
        """Hidden states [B, R, S, D] and the new keys and values [Y, B, M, R, S, E] (unrolled: the rings with them).

        `layout` says what stands where in packed sequences, which have no cache.
        """
        cfg = self.config
        position_BRS, past = jnp.arange(tokens_BRS.shape[2])[None, None], None
        if layout is not None:
            position_BRS = layout.position_BC[:, None]
        if cache is not None:
            assert cache.prefix_length_BR is not None  # `hidden` refuses one that was not forked
            past = (cache.prefix_k, cache.prefix_v, cache.branch_k, cache.branch_v)
            position_BRS = position_BRS + (cache.prefix_length_BR + cache_lib.own_tokens(cache))[..., None]
        x_BRSD = embed(self, tokens_BRS)
        if cfg.scale_embeddings:
            x_BRSD = x_BRSD * jnp.asarray(cfg.d_model**0.5, cfg.dtype)
        everything, local_Y = global_view(cfg, cache, position_BRS), cfg.local_Y
        if layout is not None:
            everything = everything._replace(ranges=layout.ranges)
        elif cache is None and local_Y:
            everything = everything._replace(ranges=causal(tokens_BRS.shape[2]))
        shared = (everything, local_view(cfg, cache, position_BRS, everything) if local_Y else None)
        if cfg.scan_layers:
            x_BRSD, new = self.layers(x_BRSD, past, jnp.asarray(local_Y) if local_Y else None, shared)
        else:
            new = []
            for y, layer in enumerate(self.layers):
                past_y = past and tuple(None if x is None else x[y] for x in past)
                x_BRSD, new_y = layer(x_BRSD, past_y, local_Y[y] if local_Y else None, shared)
                new.append(new_y)
            new = tuple(zip(*new, strict=True))
        return self.final_norm(x_BRSD), new

    def unembed(self, x_D: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from final hidden states [..., D]."""
        return unembed(self, x_D)

    def everything(self, tokens_BRS: jax.Array) -> jax.Array:
        """Touches every parameter: used by init alone."""
        return self.unembed(self(tokens_BRS, None)[0])


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A handle on pure functions; hashable, so it can be closed over or be a static argument of jit."""

    config: ModelConfig

    @property
    def module(self) -> nn.Module:
        return (Transformer if self.config.hybrid is None else Hybrid)(self.config)

    def unrolled(self) -> "LanguageModel":
        """The same function without the scan, for parameters from `unstack_layers`.

        A scan slices each layer's weights out of the stack at every call. For a decoding step on CPU those copies cost
        as much as the arithmetic; unrolled, they are made once. Compile time then grows with depth.
        """
        return LanguageModel(dataclasses.replace(self.config, scan_layers=False))

    def in_dtype(self, dtype: str) -> "LanguageModel":
        """The same function computing in another dtype; `cast_kernels` gives it weights that are stored so."""
        return LanguageModel(dataclasses.replace(self.config, compute_dtype=dtype))

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters, the tree of ARCHITECTURE.md."""
        return self.module.init(key, jnp.zeros((1, 1, 1), jnp.int32), method="everything")["params"]

    def apply(
        self, params: Params, tokens: jax.Array, cache: Cache | None = None, stops_BK: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Logits and the cache after these tokens.

        Args:
          params: from `init` or a checkpoint.
          tokens: without a cache, documents [B, T], right-padded. With a forked cache, continuations [B, R, S] of its
            branches ([B, S] where R is 1).
          cache: None, or from `fork`.
          stops_BK: without a cache, the prefix lengths (0 to T) that branches will start from: a hybrid keeps its
            recurrent states there, by default at T alone. Other models can start anywhere and need none.

        Returns:
          logits float32, shape of tokens + [V]; logits at position s predict token s + 1. The cache: a prefix to fork,
          or the branches with these tokens appended.

        Raises:
          ValueError: tokens of the wrong rank, or a cache that was not forked.
        """
        hidden, cache = self.hidden(params, tokens, cache, stops_BK)
        return self.unembed(params, hidden), cache

    def hidden(
        self, params: Params, tokens: jax.Array, cache: Cache | None = None, stops_BK: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """`apply` without the projection to the vocabulary: final hidden states, shape of tokens + [D]."""
        if cache is not None and cache.prefix_length_BR is None:
            raise ValueError("the cache is a prefix: fork(cache, prefix_length_BR, capacity) it before continuing")
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 and not (tokens.ndim == 3 and cache is not None):
            raise ValueError(f"tokens have {tokens.ndim} axes: expected [B, T], or [B, R, S] with a forked cache")
        tokens_BRS = tokens[:, None] if tokens.ndim == 2 else tokens
        forked = (
            tokens_BRS.shape[:2] if cache is None or cache.prefix_length_BR is None else cache.prefix_length_BR.shape
        )
        if forked != tokens_BRS.shape[:2]:
            raise ValueError(
                f"tokens are for {tokens_BRS.shape[:2]} (documents, branches), the cache was forked for {forked}"
            )
        states: Any = None
        inputs: tuple[Any, ...] = (tokens_BRS, cache)
        if self.config.hybrid is None:
            hidden, (k, v) = self.module.apply({"params": params}, *inputs)
        else:
            if cache is None:
                B, T = tokens.shape
                stops_BK = jnp.full((B, 1), T) if stops_BK is None else jnp.asarray(stops_BK)
                inputs = (*inputs, stops_BK)
            hidden, (k, v, states) = self.module.apply({"params": params}, *inputs)
        if cache is None:
            k, v = constrain(jax.tree.map(lambda x: x.squeeze(-3), (k, v)), None, DOCUMENTS, HEADS)
            cache = Cache(k, v) if states is None else Cache(k, v, stop_BK=stops_BK, states=states)
        else:
            cache = cache_lib.append(cache, tokens_BRS.shape[-1], k, v, states, in_place=not self.config.scan_layers)
        return (hidden[:, 0] if tokens.ndim == 2 else hidden), cache

    def hidden_packed(self, params: Params, tokens_BC: jax.Array, layout: Layout) -> jax.Array:
        """Final hidden states [B, C, D] of sequences that hold documents and branches one after another.

        Raises:
          ValueError: a hybrid, whose recurrent layers would carry one document's state into the next.
        """
        if self.config.hybrid is not None:
            raise ValueError("a model with recurrent layers cannot read packed sequences: use `hidden` and `fork`")
        return self.module.apply({"params": params}, tokens_BC[:, None], None, layout)[0][:, 0]

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V], float32, of final hidden states [..., D]."""
        logits: Any = self.module.apply({"params": params}, hidden, method="unembed")
        return logits

    def unembedding(self, params: Params) -> jax.tree_util.Partial:
        """`unembed` with the parameters that it reads, a pytree: it can be an argument of a transformed function."""
        name = "embed" if self.config.tie_embeddings else "head"
        return jax.tree_util.Partial(self.unembed, {name: params[name]})


def cast_kernels(params: Params, dtype: str) -> Params:
    """Kernels and embedding in another dtype, everything that float32 arithmetic reads (norms, decays) as it is."""

    def cast(path, leaf):
        name = getattr(path[-1], "key", None)  # an int8 kernel's parts are attributes
        return leaf.astype(dtype) if name in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def unstack_layers(params: Params) -> Params:
    """Parameters for `LanguageModel.unrolled`: one subtree a layer instead of a stack."""
    out: Params = {}
    for name, tree in params.items():
        if name == "layers" or name.startswith("segments_"):
            depth = jax.tree.leaves(tree)[0].shape[0]
            out |= {f"{name}_{y}": jax.tree.map(lambda x, y=y: x[y], tree) for y in range(depth)}
        else:
            out[name] = tree
    return out
