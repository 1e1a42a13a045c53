"""The dense decoder (Llama, SmolLM2, Qwen2, Qwen3, Gemma 3): one Linen module scanned over layers, an explicit cache.

Everything outside `models/` sees `LanguageModel` only: pure functions of (params, tokens, cache).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlp_jax.models import cache as cache_lib
from rlp_jax.models.attention import Segment, attend
from rlp_jax.models.cache import Cache
from rlp_jax.models.layers import Dense, GatedMLP, RMSNorm, RopeScaling, rotary_angles, rotate

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder, and how to run it (the fields from `compute_dtype` on do not change the parameters)."""

    family: str  # "llama" (SmolLM2 too), "qwen2", "qwen3", "gemma3_text": names in checkpoints
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
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation (Qwen3, Gemma 3)
    qkv_bias: bool = False  # a bias on queries, keys and values (Qwen2)
    rope_scaling: RopeScaling | None = None  # of global layers
    local_layers: tuple[int, ...] = ()  # layers that see only the last `window` tokens, the token itself included
    window: int = 0
    local_rope_theta: float | None = None  # rotary base of local layers, unscaled; None: as in global ones
    query_scalar: int | None = None  # attention scores are divided by its square root; None: head_dim
    activation: str = "silu"  # or "gelu_tanh"
    norm_offset: float = 0.0  # norms multiply by offset + scale (Gemma: 1)
    sandwich_norms: bool = False  # RMS norms after attention and MLP too, before the residual sum (Gemma)
    scale_embeddings: bool = False  # embeddings times sqrt(d_model) (Gemma)
    max_positions: int = 2048
    compute_dtype: str = "float32"
    remat: bool = False  # recompute a layer's activations in the backward pass
    scan_layers: bool = True  # False: `unstack_layers` the parameters; see `LanguageModel.unrolled`

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def local_Y(self) -> tuple[bool, ...] | None:
        """Which layers are local, None where none is (then no window is ever computed)."""
        local_Y = tuple(y in self.local_layers for y in range(self.n_layers))
        return local_Y if any(local_Y) else None


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BRSD, rotary, segments, new_mask_SS):
        """Returns the output and the new keys and values [B, M, R, S, E]. `segments` is what came before."""
        cfg = self.config
        q_BRSNE = Dense((cfg.n_heads, cfg.head_dim), use_bias=cfg.qkv_bias, name="q")(x_BRSD)
        k_BRSME = Dense((cfg.n_kv_heads, cfg.head_dim), use_bias=cfg.qkv_bias, name="k")(x_BRSD)
        v_BRSME = Dense((cfg.n_kv_heads, cfg.head_dim), use_bias=cfg.qkv_bias, name="v")(x_BRSD)
        if cfg.qk_norm:
            q_BRSNE = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="q_norm")(q_BRSNE)
            k_BRSME = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="k_norm")(k_BRSME)
        cos, sin = rotary
        q_BRSNE, k_BRSME = rotate(q_BRSNE, cos, sin), rotate(k_BRSME, cos, sin)
        k_BMRSE, v_BMRSE = (x.transpose(0, 3, 1, 2, 4) for x in (k_BRSME, v_BRSME))
        scale = None if cfg.query_scalar is None else cfg.query_scalar**-0.5
        out_BRSNE = attend(q_BRSNE, [*segments, Segment(k_BMRSE, v_BMRSE, new_mask_SS)], scale)
        return Dense((cfg.d_model,), n_in=2, name="o")(out_BRSNE), (k_BMRSE, v_BMRSE)


class View(NamedTuple):
    """What a layer's queries may see and where they stand: rotary cosines and sines, and a mask for each segment."""

    rotary: tuple[jax.Array, jax.Array]  # [B, R, S, 1, E/2]
    prefix_mask: jax.Array | None  # broadcast to [B, R, S, T]
    branch_mask: jax.Array | None  # [.., C]
    new_mask: jax.Array  # [.., S]


def global_view(cfg: ModelConfig, cache: Cache | None, position_BRS: jax.Array) -> View:
    """The view of layers that see everything before."""
    S, prefix_mask, branch_mask = position_BRS.shape[-1], None, None
    if cache is not None:
        T = jax.tree.leaves(cache.prefix_k)[0].shape[-2]
        prefix_mask = (jnp.arange(T) < cache.prefix_length_BR[..., None])[:, :, None]
        if cache.branch_k is not None:
            branch_mask = jnp.arange(jax.tree.leaves(cache.branch_k)[0].shape[-2]) < cache.written
    rotary = _rotary(position_BRS, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    return View(rotary, prefix_mask, branch_mask, jnp.tril(jnp.ones((S, S), bool)))


def local_view(cfg: ModelConfig, cache: Cache | None, position_BRS: jax.Array, everything: View) -> View:
    """The view of layers with a window: distances count positions of the sequence, across prefix and branch."""
    s_S = jnp.arange(position_BRS.shape[-1])
    new_mask = everything.new_mask & (s_S[:, None] - s_S < cfg.window)
    prefix_mask = branch_mask = None
    if everything.prefix_mask is not None:
        t_T = jnp.arange(everything.prefix_mask.shape[-1])
        prefix_mask = everything.prefix_mask & (position_BRS[..., None] - t_T < cfg.window)
    if everything.branch_mask is not None:
        c_C = jnp.arange(everything.branch_mask.shape[-1])
        branch_mask = everything.branch_mask & (cache.written + s_S[:, None] - c_C < cfg.window)
    rotary = everything.rotary
    if cfg.local_rope_theta is not None:
        rotary = _rotary(position_BRS, cfg.head_dim, cfg.local_rope_theta)
    return View(rotary, prefix_mask, branch_mask, new_mask)


def choose_view(local: jax.Array | bool | None, everything: View, window: View | None) -> View:
    """The view of one layer; `local` is an array in a scan over layers, a Python bool in an unrolled model."""
    if local is None or isinstance(local, bool):
        return window if local else everything
    return jax.tree.map(lambda near, far: jnp.where(local, near, far), window, everything)


def _rotary(position_BRS: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None):
    # Head axis between S and E.
    return tuple(x[..., None, :] for x in rotary_angles(position_BRS, head_dim, theta, scaling))


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BRSD, past, local, shared):
        """One layer.

        `past` holds its cached keys and values, `local` whether it sees a window only (None: no layer does), `shared`
        the `View` of global layers and that of local ones.
        """
        cfg = self.config
        rotary, prefix_mask, branch_mask, new_mask = choose_view(local, *shared)
        prefix_k, prefix_v, branch_k, branch_v = past

        def norm(name):
            return RMSNorm(cfg.norm_eps, cfg.norm_offset, name=name)

        segments = []
        if prefix_k is not None:
            segments.append(Segment(prefix_k, prefix_v, prefix_mask))
        if branch_k is not None:
            segments.append(Segment(branch_k, branch_v, branch_mask))
        update, new = Attention(cfg, name="attention")(norm("attention_norm")(x_BRSD), rotary, segments, new_mask)
        x_BRSD = x_BRSD + (norm("post_attention_norm")(update) if cfg.sandwich_norms else update)
        update = GatedMLP(cfg.d_ff, cfg.activation, name="mlp")(norm("mlp_norm")(x_BRSD))
        return x_BRSD + (norm("post_mlp_norm")(update) if cfg.sandwich_norms else update), new


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
                in_axes=(0, 0, nn.broadcast),
                length=cfg.n_layers,
            )(cfg)
        else:
            self.layers = [block(cfg) for _ in range(cfg.n_layers)]
        self.final_norm = RMSNorm(cfg.norm_eps, cfg.norm_offset)
        if not cfg.tie_embeddings:
            self.head = Dense((cfg.vocab_size,))

    def __call__(self, tokens_BRS: jax.Array, cache: Cache | None):
        """Hidden states [B, R, S, D] and the new keys and values [Y, B, M, R, S, E]."""
        cfg = self.config
        position_BRS = jnp.arange(tokens_BRS.shape[2])[None, None]
        past = (None, None, None, None)
        if cache is not None:
            past = (cache.prefix_k, cache.prefix_v, cache.branch_k, cache.branch_v)
            position_BRS = position_BRS + cache.prefix_length_BR[..., None] + cache.written
        x_BRSD = self.embed(tokens_BRS)
        if cfg.scale_embeddings:
            x_BRSD = x_BRSD * jnp.asarray(cfg.d_model**0.5, cfg.dtype)
        everything, local_Y = global_view(cfg, cache, position_BRS), cfg.local_Y
        shared = (everything, local_view(cfg, cache, position_BRS, everything) if local_Y else None)
        if cfg.scan_layers:
            x_BRSD, new = self.layers(x_BRSD, past, jnp.asarray(local_Y) if local_Y else None, shared)
        else:
            new = []
            for y, layer in enumerate(self.layers):
                past_y = tuple(None if x is None else x[y] for x in past)
                x_BRSD, new_y = layer(x_BRSD, past_y, local_Y[y] if local_Y else None, shared)
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
