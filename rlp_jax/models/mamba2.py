# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 mixer: a linear recurrence over a state, run as matrix products over chunks of tokens.

State space duality (Dao and Gu, arXiv 2405.21060, section 6): inside a chunk every token reads those before it through
a [chunk, chunk] matrix, as attention does; across chunks one state is handed on. A single new token takes one step of
the recurrence instead. States and decays are float32 whatever the model computes in.

Dimensions beside the legend of ARCHITECTURE.md: n sequences (documents, or documents and branches together), J heads
in U groups of O, P width of a head, Z state size, W taps of the convolution, I its channels (J·P + 2·U·Z); a sequence
of S tokens is cut into c chunks of q tokens (k where they are read). g: the groups of all sequences; p: O·P.
"""

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlp_jax.models import backend
from rlp_jax.models.constraints import DOCUMENTS, HEADS, constrain, on_shards, spec
from rlp_jax.models.layers import Dense

CPU_CHUNK = 64  # the most tokens a chunk on CPU, whatever a config says


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """What a Nemotron-H model has beyond a decoder: its pattern of layers, and the shape of its Mamba-2 mixers."""

    pattern: str  # one letter a layer: "M" Mamba-2, "*" attention, "-" MLP
    heads: int
    head_dim: int
    state_size: int
    groups: int  # heads of a group share B and C, and the norm before the output
    conv_kernel: int = 4
    conv_bias: bool = True
    chunk_size: int = 128  # how the scan is cut, not what it computes
    time_step_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def width(self) -> int:
        """J·P, what enters and leaves the recurrence."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """I, what the convolution sees: x, B and C."""
        return self.width + 2 * self.groups * self.state_size


class MambaState(NamedTuple):
    """What a sequence leaves behind: ssm [..., J, P, Z] float32, and conv [..., W - 1, I], the convolution's last
    inputs. Leading axes are [n], or [B, K] at K places of B documents."""

    ssm: jax.Array
    conv: jax.Array


class Chunks(NamedTuple):
    """A scanned sequence, from which its state at any token can be had.

    x: [c, n, q, J, P]; dt: [c, n, J, q]; log_decay: [c, n, J, q], sum of dt·A from the chunk's start to each token,
    that token included; b: [c, n, U, q, Z]; start: [c, n, U, Z, O·P], the state before each chunk.
    """

    x: jax.Array
    dt: jax.Array
    log_decay: jax.Array
    b: jax.Array
    start: jax.Array


def ssd(
    x_nSJP: jax.Array,
    dt_nSJ: jax.Array,
    a_J: jax.Array,
    b_nSUZ: jax.Array,
    c_nSUZ: jax.Array,
    start_nJPZ: jax.Array,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array, Chunks]:
    """y_s = C_s h_s with h_s = exp(dt_s A) h_{s-1} + dt_s x_s B_s, all float32, for every token of n sequences.

    Chunks are taken in turn: what one needs fits into a CPU's cache, and the heads and sequences of one chunk are
    products enough to fill an accelerator.

    Args:
      x_nSJP, b_nSUZ, c_nSUZ: inputs, and the state's way in and out.
      dt_nSJ: step lengths; 0 leaves the state as it is.
      a_J: A, negative.
      start_nJPZ: h before the first token.
      chunk_size: tokens a chunk (on CPU at most CPU_CHUNK); the cost inside chunks grows with it, that across falls.

    Returns:
      y_nSJP; the state after the last token [n, J, P, Z]; and the chunks.
    """
    n, S, J, P = x_nSJP.shape
    U, Z = b_nSUZ.shape[2:]
    O, q = J // U, min(chunk_size, S, CPU_CHUNK if _on_cpu() else S)
    g = n * U  # groups of all sequences. An axis of one sequence would be laid out anew, at the cost of copying x

    def chunked(array_nS):  # whole chunks first, padded with zero steps
        array_nS = array_nS.astype(jnp.float32)
        array_nS = jnp.pad(array_nS, [(0, 0), (0, -S % q)] + [(0, 0)] * (array_nS.ndim - 2))
        return array_nS.reshape(n, -1, q, *array_nS.shape[2:]).swapaxes(0, 1)

    x = chunked(x_nSJP).reshape(-1, n * q, J, P)
    dt_cnJq = chunked(dt_nSJ).swapaxes(2, 3)
    dt, log_decay = (array.reshape(-1, g, O, q) for array in (dt_cnJq, jnp.cumsum(dt_cnJq * a_J[:, None], -1)))
    b, c = (chunked(array).swapaxes(2, 3).reshape(-1, g, q, Z) for array in (b_nSUZ, c_nSUZ))
    causal_qk = jnp.tril(jnp.ones((q, q), bool))

    def times(x_gqp, factor_gOq):  # each head by a factor of its own
        return (x_gqp.reshape(g, q, O, P) * factor_gOq.swapaxes(1, 2)[..., None]).reshape(g, q, O * P)

    def one_chunk(state_gZp, x, dt_gOq, log_decay_gOq, b_gqZ, c_gqZ):
        x_nqUOP = x.reshape(n, q, U, O, P)
        # Inside the chunk: token q reads token k <= q through C_q B_k, decayed by what lies between.
        between = log_decay_gOq[..., :, None] - log_decay_gOq[..., None, :]
        between = jnp.exp(jnp.where(causal_qk, between, -jnp.inf)) * dt_gOq[..., None, :]
        weight_gOqk = (c_gqZ @ b_gqZ.swapaxes(1, 2))[:, None] * between
        y_gOqP = weight_gOqk @ x_nqUOP.transpose(0, 2, 3, 1, 4).reshape(g, O, q, P)
        # From the state before it, and what it adds to the state after it: one product for all heads of a group.
        from_state = times(c_gqZ @ state_gZp, jnp.exp(log_decay_gOq))
        y_gqp = y_gOqP.swapaxes(1, 2).reshape(g, q, O * P) + from_state
        left_gOq = jnp.exp(log_decay_gOq[..., -1:] - log_decay_gOq) * dt_gOq
        added_gZp = b_gqZ.swapaxes(1, 2) @ times(x_nqUOP.swapaxes(1, 2), left_gOq)
        return y_gqp.reshape(n, U, q, O * P).swapaxes(1, 2).reshape(x.shape), added_gZp

    one_chunk = _on_buffers(jax.checkpoint(one_chunk))  # recomputed for the gradient: cheaper than keeping weights

    def step(carry, chunk):
        state_gZp, index = carry
        y, added_gZp = one_chunk(index, state_gZp, *chunk)
        _, _, log_decay_gOq, _, _ = chunk
        decay_g1p = jnp.repeat(jnp.exp(log_decay_gOq[..., -1]), P, -1)[:, None]
        return (state_gZp * decay_g1p + added_gZp, index + 1), (y, state_gZp)

    start_gZp = start_nJPZ.astype(jnp.float32).reshape(g, O * P, Z).swapaxes(1, 2)
    (end_gZp, _), (y, start) = jax.lax.scan(step, (start_gZp, 0), (x, dt, log_decay, b, c))
    y_nSJP = y.reshape(-1, n, q, J, P).swapaxes(0, 1).reshape(n, -1, J, P)[:, :S]
    dt, log_decay = (array.reshape(-1, n, J, q) for array in (dt, log_decay))
    b, start = (array.reshape(-1, n, U, *array.shape[2:]) for array in (b, start))
    chunks = Chunks(x.reshape(-1, n, q, J, P), dt, log_decay, b, start)
    return y_nSJP, end_gZp.swapaxes(1, 2).reshape(n, J, P, Z), chunks


def _on_cpu() -> bool:
    return backend.platform() == "cpu"


def _on_buffers(one_chunk):
    """`one_chunk(index, *arrays)` that, on CPU, finds its arrays in buffers of their own.

    XLA merges the loop's reads and writes at `index` into whatever computes with them, and LLVM vectorises none of
    that: each element loads the index again. A branch is not merged into, though this one is always taken.
    """

    def branched(index, *arrays):
        def never(*arrays):
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(one_chunk, *arrays))

        return jax.lax.cond(index >= 0, one_chunk, never, *arrays)

    return branched if _on_cpu() else lambda index, *arrays: one_chunk(*arrays)


def states_at(chunks: Chunks, stop_nK: jax.Array) -> jax.Array:
    """The state after the first `stop` tokens (0 to S), [n, K, J, P, Z]: from its chunk's start and what follows."""
    c, _, q, J, P = chunks.x.shape
    U, Z = chunks.b.shape[2], chunks.b.shape[-1]

    def one(x, dt, log_decay, b, start, stop):
        chunk = jnp.clip((stop - 1) // q, 0, c - 1)
        log_decay_Jq = log_decay[chunk]
        # Decay up to the stop: entry `stop - 1` within the chunk, nothing where the stop is the chunk's start.
        inside = stop - chunk * q
        up_to_J = jnp.where(inside > 0, log_decay_Jq[:, jnp.maximum(inside - 1, 0)], 0.0)
        left_Jq = jnp.exp(jnp.where(jnp.arange(q) < inside, up_to_J[:, None] - log_decay_Jq, -jnp.inf)) * dt[chunk]
        left_qUp = (x[chunk] * left_Jq.T[..., None]).reshape(q, U, -1)
        added_UpZ = jnp.einsum("qup,uqz->upz", left_qUp, b[chunk])
        start_UpZ = start[chunk].swapaxes(1, 2) * jnp.repeat(jnp.exp(up_to_J), P).reshape(U, -1, 1)
        return (start_UpZ + added_UpZ).reshape(J, P, Z)

    over_stops = jax.vmap(one, (None,) * 5 + (0,))
    return jax.vmap(over_stops, (1,) * 5 + (0,))(*chunks, stop_nK)


def scan_on_shards(x_nSJP, dt_nSJ, a_J, b_nSUZ, c_nSUZ, start_nJPZ, stop_nK, chunk_size: int):
    """`ssd` of each device's own sequences and heads, and the state at the stops [n, K, J, P, Z], or the last one.

    Heads are split where their groups are, or where they all are of one group. `ssd` merges axes that are split in
    different ways, which the compiler could only do by gathering them.
    """

    def scan(x, dt, a, b, c, start, *stops):
        y, end, chunks = ssd(x, dt, a, b, c, start, chunk_size)
        return y, states_at(chunks, *stops) if stops else end

    of_groups = spec(b_nSUZ.shape, DOCUMENTS, None, HEADS)
    heads = HEADS if of_groups[2] or b_nSUZ.shape[2] == 1 else None
    of_heads, of_states = spec(x_nSJP.shape, DOCUMENTS, None, heads), spec(start_nJPZ.shape, DOCUMENTS, heads)
    arrays, stops = (x_nSJP, dt_nSJ, a_J, b_nSUZ, c_nSUZ, start_nJPZ), ()
    specs = (of_heads, of_heads, spec(a_J.shape, heads), of_groups, of_groups, of_states)
    if stop_nK is not None:
        stops, specs = (stop_nK,), (*specs, spec(stop_nK.shape, DOCUMENTS))
    return on_shards(scan, specs, (of_heads, of_states if stop_nK is None else of_heads))(*arrays, *stops)


def ssd_step(
    x_nJP: jax.Array, dt_nJ: jax.Array, a_J: jax.Array, b_nUZ: jax.Array, c_nUZ: jax.Array, state_nJPZ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token of `ssd`: y [n, J, P] and the state after it."""
    n, J, P = x_nJP.shape
    U, Z = b_nUZ.shape[1:]
    x = (x_nJP.astype(jnp.float32) * dt_nJ[..., None]).reshape(n, U, J // U, P)
    b, c = b_nUZ.astype(jnp.float32), c_nUZ.astype(jnp.float32)
    decay = jnp.exp(dt_nJ * a_J).reshape(n, U, J // U, 1, 1)
    state = state_nJPZ.reshape(n, U, J // U, P, Z) * decay + x[..., None] * b[:, :, None, None]
    y = jnp.einsum("nuopz,nuz->nuop", state, c)
    return y.reshape(n, J, P), state.reshape(n, J, P, Z)


def causal_convolution(joined_nTI: jax.Array, kernel_WI: jax.Array) -> jax.Array:
    """Depthwise: each channel's last W values, weighted. The first W - 1 of T tokens are history: [n, T - W + 1, I]."""
    W = kernel_WI.shape[0]
    S = joined_nTI.shape[1] - (W - 1)
    return sum(joined_nTI[:, w : w + S] * kernel_WI[w] for w in range(W))


class GatedGroupNorm(nn.Module):
    """RMS norm of y · silu(z) within each of U groups of channels, times a scale; float32 inside."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (y.shape[-1],), jnp.float32)
        gated = y.astype(jnp.float32) * nn.silu(z.astype(jnp.float32))
        grouped = gated.reshape(*y.shape[:-1], self.groups, -1)
        grouped *= jax.lax.rsqrt(jnp.mean(jnp.square(grouped), -1, keepdims=True) + self.eps)
        return (grouped.reshape(y.shape) * scale).astype(z.dtype)


class Convolution(nn.Module):
    """Parameters of the depthwise convolution, and its silu."""

    config: HybridConfig

    @nn.compact
    def __call__(self, joined_nTI: jax.Array) -> jax.Array:
        cfg, dtype = self.config, joined_nTI.dtype
        kernel_WI = self.param("kernel", _conv_init, (cfg.conv_kernel, cfg.channels), jnp.float32)
        out_nSI = causal_convolution(joined_nTI, kernel_WI.astype(dtype))
        if cfg.conv_bias:
            out_nSI += self.param("bias", nn.initializers.zeros, (cfg.channels,), jnp.float32).astype(dtype)
        return nn.silu(out_nSI)


class Mamba2(nn.Module):
    """The mixer: [n, S, D] to [n, S, D], from a past state to a new one."""

    config: HybridConfig
    norm_eps: float

    @nn.compact
    def __call__(
        self, x_nSD: jax.Array, past: MambaState | None = None, stop_nK: jax.Array | None = None
    ) -> tuple[jax.Array, MambaState]:
        """Returns the output, and the state after the first `stop` tokens for each stop [n, K, ...], or without stops
        after the last token [n, ...]. `past` is the state before the first token, None at the start of a document."""
        cfg = self.config
        n, S, D = x_nSD.shape
        J, P, U, Z, W, I = cfg.heads, cfg.head_dim, cfg.groups, cfg.state_size, cfg.conv_kernel, cfg.channels
        a_J = -jnp.exp(self.param("A_log", _a_init, (J,), jnp.float32))
        dt_bias_J = self.param("dt_bias", _dt_init, (J,), jnp.float32)
        skip_J = self.param("D", nn.initializers.ones, (J,), jnp.float32)

        # Over a mesh each device makes some columns. They are gathered before they are taken apart, since they are not
        # those of its heads; the scan and all after it are for a device's own heads again.
        projected = constrain(Dense((cfg.width + I + J,), name="in_proj")(x_nSD), DOCUMENTS)
        z, new_nSI, dt_nSJ = constrain(jnp.split(projected, (cfg.width, cfg.width + I), -1), DOCUMENTS)
        history = jnp.zeros((n, W - 1, I), new_nSI.dtype) if past is None else past.conv
        joined_nTI = jnp.concatenate([history, new_nSI], 1)
        mixed_nSI = Convolution(cfg, name="conv")(joined_nTI)
        x, b, c = constrain(jnp.split(mixed_nSI, (cfg.width, cfg.width + U * Z), -1), DOCUMENTS)
        x, b, c = x.reshape(n, S, J, P), b.reshape(n, S, U, Z), c.reshape(n, S, U, Z)
        dt_nSJ = jnp.clip(nn.softplus(dt_nSJ.astype(jnp.float32) + dt_bias_J), *cfg.time_step_limit)

        start = jnp.zeros((n, J, P, Z), jnp.float32) if past is None else past.ssm
        if S == 1 and stop_nK is None:
            y, end = ssd_step(x[:, 0], dt_nSJ[:, 0], a_J, b[:, 0], c[:, 0], start)
            y = y[:, None]
        else:
            y, end = scan_on_shards(x, dt_nSJ, a_J, b, c, start, stop_nK, cfg.chunk_size)
        y = (y + skip_J[:, None] * x.astype(jnp.float32)).reshape(n, S, cfg.width)
        out_nSD = Dense((D,), name="out_proj")(GatedGroupNorm(U, self.norm_eps, name="gate_norm")(y, z))
        end = constrain(end, DOCUMENTS, *((HEADS,) if stop_nK is None else (None, HEADS)))
        if stop_nK is None:
            return out_nSD, MambaState(end, joined_nTI[:, S:])
        last_nKW = stop_nK[..., None] + jnp.arange(W - 1)
        conv = jax.vmap(lambda joined_TI, last_KW: joined_TI[last_KW])(joined_nTI, last_nKW)
        return out_nSD, MambaState(end, conv)


def _a_init(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """log of A uniform in [1, 16], as in the reference implementation of Mamba-2."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _dt_init(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Inverse softplus of a step that is log-uniform in [0.001, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


def _conv_init(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Uniform within 1/sqrt(W), what the reference implementation leaves its convolutions at."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
