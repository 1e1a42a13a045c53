"""The decoder of Llama, SmolLM2 and Qwen3: one Linen module, scanned over layers, with an explicit cache.

Everything outside `models/` sees `LanguageModel` only: pure functions of (params, tokens, cache).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlp_jax.models import cache as cache_lib
from rlp_jax.models.attention import Segment, attend
from rlp_jax.models.cache import Cache
from rlp_jax.models.layers import Dense, GatedMLP, RMSNorm, rotary_angles, rotate

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, and how to run it (the fields from `compute_dtype` on do not change the parameters)."""

    family: str  # "llama" (SmolLM2 too) or "qwen3": names in checkpoints
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation (Qwen3)
    max_positions: int = 2048
    compute_dtype: str = "float32"
    remat: bool = False  # recompute a layer's activations in the backward pass
    scan_layers: bool = True  # False: `unstack_layers` the parameters; see `LanguageModel.unrolled`

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BRSD, rotary, segments):
        """Returns the output and the new keys and values [B, M, R, S, E]. `segments` is what came before."""
        cfg = self.config
        q_BRSNE = Dense((cfg.n_heads, cfg.head_dim), name="q")(x_BRSD)
        k_BRSME = Dense((cfg.n_kv_heads, cfg.head_dim), name="k")(x_BRSD)
        v_BRSME = Dense((cfg.n_kv_heads, cfg.head_dim), name="v")(x_BRSD)
        if cfg.qk_norm:
            q_BRSNE = RMSNorm(cfg.norm_eps, name="q_norm")(q_BRSNE)
            k_BRSME = RMSNorm(cfg.norm_eps, name="k_norm")(k_BRSME)
        cos, sin = rotary
        q_BRSNE, k_BRSME = rotate(q_BRSNE, cos, sin), rotate(k_BRSME, cos, sin)
        k_BMRSE, v_BMRSE = (x.transpose(0, 3, 1, 2, 4) for x in (k_BRSME, v_BRSME))
        S = x_BRSD.shape[2]
        causal_SS = jnp.tril(jnp.ones((S, S), bool))
        out_BRSNE = attend(q_BRSNE, [*segments, Segment(k_BMRSE, v_BMRSE, causal_SS)])
        return Dense((cfg.d_model,), n_in=2, name="o")(out_BRSNE), (k_BMRSE, v_BMRSE)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BRSD, past, shared):
        """One layer. `past` holds this layer's cached keys and values, `shared` what all layers have in common."""
        cfg, (rotary, prefix_mask, branch_mask) = self.config, shared
        prefix_k, prefix_v, branch_k, branch_v = past
        segments = []
        if prefix_k is not None:
            segments.append(Segment(prefix_k, prefix_v, prefix_mask))
        if branch_k is not None:
            segments.append(Segment(branch_k, branch_v, branch_mask))
        normed = RMSNorm(cfg.norm_eps, name="attention_norm")(x_BRSD)
        update, new = Attention(cfg, name="attention")(normed, rotary, segments)
        x_BRSD = x_BRSD + update
        normed = RMSNorm(cfg.norm_eps, name="mlp_norm")(x_BRSD)
        return x_BRSD + GatedMLP(cfg.d_ff, name="mlp")(normed), new


class Transformer(nn.Module):
    """Tokens in, final hidden states out. Callers ask `unembed` for logits where they need them."""

    config: ModelConfig

    def setup(self):
        cfg = self.config
        self.embed = nn.Embed(
            cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(0.02),
        )  # fmt: skip
        block = nn.remat(Block, prevent_cse=False) if cfg.remat else Block
        if cfg.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=cfg.n_layers,
            )(cfg)
        else:
            self.layers = [block(cfg) for _ in range(cfg.n_layers)]
        self.final_norm = RMSNorm(cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.head = Dense((cfg.vocab_size,))

    def __call__(self, tokens_BRS: jax.Array, cache: Cache | None):
        """Hidden states [B, R, S, D] and the new keys and values [Y, B, M, R, S, E]."""
        cfg, S = self.config, tokens_BRS.shape[2]
        position_BRS = jnp.arange(S)[None, None]
        past, prefix_mask, branch_mask = (None, None, None, None), None, None
        if cache is not None:
            past = (cache.prefix_k, cache.prefix_v, cache.branch_k, cache.branch_v)
            position_BRS = position_BRS + cache.prefix_length_BR[..., None] + cache.written
            T = jax.tree.leaves(cache.prefix_k)[0].shape[-2]
            prefix_mask = (jnp.arange(T) < cache.prefix_length_BR[..., None])[:, :, None]
            if cache.branch_k is not None:
                branch_mask = jnp.arange(jax.tree.leaves(cache.branch_k)[0].shape[-2]) < cache.written
        # Head axis between S and E: [B, R, S, 1, E/2].
        rotary = tuple(x[..., None, :] for x in rotary_angles(position_BRS, cfg.head_dim, cfg.rope_theta))
        x_BRSD = self.embed(tokens_BRS)
        shared = (rotary, prefix_mask, branch_mask)
        if cfg.scan_layers:
            x_BRSD, new = self.layers(x_BRSD, past, shared)
        else:
            new = []
            for y, layer in enumerate(self.layers):
                x_BRSD, new_y = layer(x_BRSD, tuple(None if x is None else x[y] for x in past), shared)
                new.append(new_y)
            new = tuple(zip(*new, strict=True))
        return self.final_norm(x_BRSD), new

    def unembed(self, x_D: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 from final hidden states [..., D]."""
        cfg = self.config
        if cfg.tie_embeddings:
            flat_D = x_D.reshape(-1, x_D.shape[-1])
            logits_V = jnp.einsum(
                "sd,vd->sv", flat_D, self.embed.embedding.astype(cfg.dtype), preferred_element_type=jnp.float32
            )
            return logits_V.reshape(*x_D.shape[:-1], -1)
        return self.head(x_D).astype(jnp.float32)

    def everything(self, tokens_BRS: jax.Array) -> jax.Array:
        """Touches every parameter: used by init alone."""
        return self.unembed(self(tokens_BRS, None)[0])


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A handle on pure functions; hashable, so it can be closed over or be a static argument of jit."""

    config: ModelConfig

    @property
    def module(self) -> Transformer:
        return Transformer(self.config)

    def unrolled(self) -> "LanguageModel":
        """The same function without the scan, for parameters from `unstack_layers`.

        A scan slices each layer's weights out of the stack at every call. For a decoding step on CPU those copies cost
        as much as the arithmetic; unrolled, they are made once. Compile time then grows with depth.
        """
        return LanguageModel(dataclasses.replace(self.config, scan_layers=False))

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters, the tree of ARCHITECTURE.md."""
        return self.module.init(key, jnp.zeros((1, 1, 1), jnp.int32), method="everything")["params"]

    def apply(self, params: Params, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        """Logits and the cache after these tokens.

        Args:
          params: from `init` or a checkpoint.
          tokens: without a cache, documents [B, T], right-padded. With a forked cache, continuations [B, R, S] of its
            branches ([B, S] where R is 1).
          cache: None, or from `fork`.

        Returns:
          logits float32, shape of tokens + [V]; logits at position s predict token s + 1. The cache: a prefix to fork,
          or the branches with these tokens appended.

        Raises:
          ValueError: tokens of the wrong rank, or a cache that was not forked.
        """
        hidden, cache = self.hidden(params, tokens, cache)
        return self.unembed(params, hidden), cache

    def hidden(self, params: Params, tokens: jax.Array, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
        """`apply` without the projection to the vocabulary: final hidden states, shape of tokens + [D]."""
        if cache is not None and cache.prefix_length_BR is None:
            raise ValueError("the cache is a prefix: fork(cache, prefix_length_BR, capacity) it before continuing")
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 and not (tokens.ndim == 3 and cache is not None):
            raise ValueError(f"tokens have {tokens.ndim} axes: expected [B, T], or [B, R, S] with a forked cache")
        tokens_BRS = tokens[:, None] if tokens.ndim == 2 else tokens
        if cache is not None and cache.prefix_length_BR.shape != tokens_BRS.shape[:2]:
            raise ValueError(
                f"tokens are for {tokens_BRS.shape[:2]} (documents, branches), the cache was forked for "
                f"{cache.prefix_length_BR.shape}"
            )
        hidden, (k, v) = self.module.apply({"params": params}, tokens_BRS, cache)
        if cache is None:
            cache = Cache(*jax.tree.map(lambda x: x.squeeze(-3), (k, v)))
        else:
            cache = cache_lib.append(cache, k, v)
        return (hidden[:, 0] if tokens.ndim == 2 else hidden), cache

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V], float32, of final hidden states [..., D]."""
        return self.module.apply({"params": params}, hidden, method="unembed")


def unstack_layers(params: Params) -> Params:
    """Parameters for `LanguageModel.unrolled`: one subtree a layer instead of a stack."""
    layers = params["layers"]
    depth = jax.tree.leaves(layers)[0].shape[0]
    rest = {name: value for name, value in params.items() if name != "layers"}
    return rest | {f"layers_{y}": jax.tree.map(lambda x, y=y: x[y], layers) for y in range(depth)}
