# SPDX-License-Identifier: Apache-2.0
"""Small layers shared by every family: RMS norm, rotary embedding, gated MLP. Master parameters are float32."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_kernel_init = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + scale) over the last axis, in float32 (Zhang and Sennrich, arXiv 1910.07467).

    The offset is 1 in Gemma, whose checkpoints store the scale less 1.
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x_D: jax.Array) -> jax.Array:
        start = nn.initializers.constant(1.0 - self.offset)
        scale_D = self.param("scale", start, (x_D.shape[-1],), jnp.float32)
        if self.offset:
            scale_D = self.offset + scale_D
        x32_D = x_D.astype(jnp.float32)
        x32_D = x32_D * jax.lax.rsqrt(jnp.mean(jnp.square(x32_D), -1, keepdims=True) + self.eps)
        return (x32_D * scale_D).astype(x_D.dtype)


def matmul(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """tensordot over the last `n_in` axes of x, as one product of two matrices.

    XLA's CPU backend differentiates it 1.5 times faster than products over several axes. An int8 kernel
    (models/quantised.py) is for sampling alone.
    """
    if hasattr(kernel, "qvalue"):
        import qwix  # optional

        axes = tuple(range(x.ndim - n_in, x.ndim)), tuple(range(n_in))
        return qwix.dot_general(x, kernel, (axes, ((), ())))
    free, contracted = x.shape[: x.ndim - n_in], kernel.shape[:n_in]
    size = math.prod(contracted)
    return (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*free, *kernel.shape[n_in:])


class Dense(nn.Module):
    """Linear map from the last `n_in` axes of x to `out_shape`, in the dtype of x; with a bias where asked."""

    out_shape: tuple[int, ...]
    n_in: int = 1
    use_bias: bool = False
    initializer: nn.initializers.Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        in_shape = x.shape[-self.n_in :]
        kernel = self.param("kernel", self.initializer, (*in_shape, *self.out_shape), jnp.float32)
        out = matmul(x, kernel.astype(x.dtype), self.n_in)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, self.out_shape, jnp.float32).astype(x.dtype)
        return out


ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU in Llama and Qwen, GeGLU in Gemma (Shazeer, arXiv 2002.05202)."""

    d_ff: int
    activation: str = "silu"  # a key of ACTIVATIONS

    @nn.compact
    def __call__(self, x_D: jax.Array) -> jax.Array:
        gate_F = Dense((self.d_ff,), name="gate")(x_D)
        up_F = Dense((self.d_ff,), name="up")(x_D)
        return Dense((x_D.shape[-1],), name="down")(ACTIVATIONS[self.activation](gate_F) * up_F)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    "linear": all of them by `factor`. "llama3": those that turn less than `low_frequency_factor` times in
    `original_positions` by `factor`, those that turn more than `high_frequency_factor` times not at all, and between
    the two a mixture (Llama 3.1; the formula of transformers' `modeling_rope_utils`).
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8_192


def rope_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """What each of the E/2 rotary frequencies is divided by, float64."""
    if scaling.kind == "linear":
        return np.full(head_dim // 2, scaling.factor)
    turns = scaling.original_positions * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (kept + (1 - kept) / scaling.factor)


def rotary_angles(
    position_S: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., S, E/2], float32, of rotary position embedding (Su et al., arXiv 2104.09864)."""
    inverse_frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        inverse_frequency = inverse_frequency / jnp.asarray(rope_divisors(head_dim, theta, scaling), jnp.float32)
    angle = position_S[..., None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_E: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (x_i, x_{i+E/2}), the half-split layout of Hugging Face checkpoints. cos, sin broadcast to x."""
    first, second = jnp.split(x_E.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_E.dtype)


def pad_axis(x: jax.Array, more: int, axis: int) -> jax.Array:
    """The array with `more` zeros after the end of one axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, more)
    return jnp.pad(x, widths)
