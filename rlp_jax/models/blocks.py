# SPDX-License-Identifier: Apache-2.0
"""What decoders and hybrids are built of: their configuration, attention and what it may see, embedding and head."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlp_jax.models.attention import Segment, attend
from rlp_jax.models.cache import Cache, capacity, token_numbers, write
from rlp_jax.models.causal_attention import KEPT
from rlp_jax.models.constraints import DOCUMENTS, HEADS, VOCABULARY, constrain
from rlp_jax.models.layers import Dense, RMSNorm, RopeScaling, rotary_angles, rotate
from rlp_jax.models.mamba2 import HybridConfig
from rlp_jax.models.self_attention import Ranges, self_attention

# What a layer keeps for its backward pass: everything; its products and its attention, from which the rest follows
# elementwise; or only its input.
REMAT = ("none", "elementwise", "layer")


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
    rope_theta: float | None = 10_000.0  # None: no rotary positions (Nemotron-H)
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
    hybrid: HybridConfig | None = None  # Mamba-2, attention and MLP layers in a pattern (Nemotron-H)
    max_positions: int = 2048
    compute_dtype: str = "float32"
    remat: str = "none"  # what the backward pass computes again, see REMAT
    attention: str | None = None  # implementation of `self_attention`; None: what suits the machine
    scan_layers: bool = True  # False: `unstack_layers` the parameters; see `LanguageModel.unrolled`

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def local_Y(self) -> tuple[bool, ...] | None:
        """Which layers are local, None where none is (then no window is ever computed)."""
        local_Y = tuple(y in self.local_layers for y in range(self.n_layers))
        return local_Y if any(local_Y) else None


def rematerialised(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer's module that computes again in its backward pass what `remat` says.

    Raises:
      ValueError: a policy that does not exist.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}: choose from {', '.join(REMAT)}")
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
    )
    return nn.remat(layer, prevent_cse=False, policy=keep if remat == "elementwise" else None)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BRSD, past, view):
        """Returns the output and the new keys and values [B, M, R, S, E], or the rings that hold them.

        `past` is what came before, this layer's (prefix_k, prefix_v, branch_k, branch_v) with None for a fork without
        room, or None for whole sequences (R = 1), which see themselves alone.
        """
        cfg = self.config
        q_BRSNE = Dense((cfg.n_heads, cfg.head_dim), use_bias=cfg.qkv_bias, name="q")(x_BRSD)
        k_BRSME = Dense((cfg.n_kv_heads, cfg.head_dim), use_bias=cfg.qkv_bias, name="k")(x_BRSD)
        v_BRSME = Dense((cfg.n_kv_heads, cfg.head_dim), use_bias=cfg.qkv_bias, name="v")(x_BRSD)
        if cfg.qk_norm:
            q_BRSNE = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="q_norm")(q_BRSNE)
            k_BRSME = RMSNorm(cfg.norm_eps, cfg.norm_offset, name="k_norm")(k_BRSME)
        if view.rotary is not None:
            cos, sin = view.rotary
            q_BRSNE, k_BRSME = rotate(q_BRSNE, cos, sin), rotate(k_BRSME, cos, sin)
        q_BRSNE, k_BRSME, v_BRSME = constrain((q_BRSNE, k_BRSME, v_BRSME), DOCUMENTS, None, None, HEADS)
        k_BMRSE, v_BMRSE = (x.transpose(0, 3, 1, 2, 4) for x in (k_BRSME, v_BRSME))
        scale = None if cfg.query_scalar is None else cfg.query_scalar**-0.5
        out_proj = Dense((cfg.d_model,), n_in=2, name="o")
        if past is None:
            own = (x[:, 0] for x in (q_BRSNE, k_BRSME, v_BRSME))
            out_BCNE = self_attention(*own, view.ranges, scale, cfg.attention)
            return out_proj(out_BCNE[:, None]), (k_BMRSE, v_BMRSE)
        if view.column is None:
            segments, kept = [*seen(past, view), Segment(k_BMRSE, v_BMRSE, view.new_mask)], (k_BMRSE, v_BMRSE)
        else:
            kept = write(past[2], k_BMRSE, view.column), write(past[3], v_BMRSE, view.column)
            kept = constrain(kept, DOCUMENTS, HEADS)
            segments = seen((*past[:2], *kept), view)
        return out_proj(attend(q_BRSNE, segments, scale)), kept


class View(NamedTuple):
    """What a layer's queries may see and where they stand: rotary cosines and sines, and a mask for each segment.

    Whole sequences have `ranges` instead of masks, None where they are causal.
    With a `column` the layer writes its new keys and values into the branches' ring there before it looks, and sees
    them there: an unrolled decoding step then has one segment fewer, and the ring stays in its place. In a scan over
    layers rings would be copied, so there the new ones are handed out and written for all layers at once.
    """

    rotary: tuple[jax.Array, jax.Array] | None  # [B, R, S, 1, E/2]
    prefix_mask: jax.Array | None  # broadcast to [B, R, S, T]
    branch_mask: jax.Array | None  # [B, R, S, C]
    new_mask: jax.Array | None  # [.., S]
    column: jax.Array | None = None
    ranges: Ranges | None = None


def global_view(cfg: ModelConfig, cache: Cache | None, position_BRS: jax.Array) -> View:
    """The view of layers that see everything before."""
    rotary = None
    if cfg.rope_theta is not None:
        rotary = head_angles(position_BRS, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    if cache is None:
        return View(rotary, None, None, None)
    S, prefix_mask, branch_mask, column = position_BRS.shape[-1], None, None, None
    new_mask = jnp.tril(jnp.ones((S, S), bool))
    if keys := jax.tree.leaves(cache.prefix_k):  # a hybrid may have none
        T = keys[0].shape[-2]
        prefix_mask = (jnp.arange(T) < cache.prefix_length_BR[..., None])[:, :, None]
        if cache.branch_k is not None:
            number_C = token_numbers(capacity(cache), cache.written)
            if not cfg.scan_layers and cache.end_BR is None:
                column = cache.written % capacity(cache)
                number_C = token_numbers(capacity(cache), cache.written + S)
            own_BR1C = number_C >= cache.start_BR[..., None, None]
            last_S1 = cache.written + jnp.arange(S)[:, None]
            if cache.end_BR is not None:  # the new tokens lie outside the ring, where others wrote on after the end
                last_S1 = cache.end_BR[..., None, None] - 1
            branch_mask = own_BR1C & (number_C <= last_S1)
            if S > 1 and column is None and cache.end_BR is None:
                new_mask = new_mask & (cache.written + jnp.arange(S) >= cache.start_BR[..., None, None])
    return View(rotary, prefix_mask, branch_mask, new_mask, column)


def head_angles(position_BRS: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None):
    """Rotary cosines and sines [B, R, S, 1, E/2], with an axis for heads."""
    return tuple(x[..., None, :] for x in rotary_angles(position_BRS, head_dim, theta, scaling))


def seen(past: tuple | None, view: View) -> list[Segment]:
    """The keys and values before the new tokens."""
    prefix_k, prefix_v, branch_k, branch_v = past
    segments = [Segment(prefix_k, prefix_v, view.prefix_mask)]
    if branch_k is not None:
        segments.append(Segment(branch_k, branch_v, view.branch_mask))
    return segments


def make_embed(cfg: ModelConfig) -> nn.Embed:
    """The token embedding, a float32 table read in the compute dtype."""
    return nn.Embed(
        cfg.vocab_size, cfg.d_model, dtype=cfg.dtype, param_dtype=jnp.float32,
        embedding_init=nn.initializers.normal(0.02),
    )  # fmt: skip


def embed(module: nn.Module, tokens: jax.Array) -> jax.Array:
    """Rows of the module's embedding, [..., D] in the compute dtype.

    Over a mesh devices that share out D have different documents: D is gathered as any layer's weights are, or the
    compiler would gather the documents.
    """
    table_VD = constrain(module.embed.embedding.astype(module.config.dtype), VOCABULARY)
    return constrain(jnp.take(table_VD, tokens, axis=0), DOCUMENTS)


def unembed(module: nn.Module, x_D: jax.Array) -> jax.Array:
    """Logits [..., V] in float32 from final hidden states [..., D], by the module's head or its embedding."""
    cfg = module.config
    if cfg.tie_embeddings:
        flat_D = x_D.reshape(-1, x_D.shape[-1])
        logits_V = jnp.einsum(
            "sd,vd->sv", flat_D, module.embed.embedding.astype(cfg.dtype), preferred_element_type=jnp.float32
        )
        return logits_V.reshape(*x_D.shape[:-1], -1)
    return module.head(x_D).astype(jnp.float32)
