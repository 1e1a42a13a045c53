"""Small layers shared by every family: RMS norm, rotary embedding, gated MLP. Master parameters are float32."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

_kernel_init = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, the statistics in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x_D: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_D.shape[-1],), jnp.float32)
        x32_D = x_D.astype(jnp.float32)
        x32_D = x32_D * jax.lax.rsqrt(jnp.mean(jnp.square(x32_D), -1, keepdims=True) + self.eps)
        return (x32_D * scale_D).astype(x_D.dtype)


def matmul(x: jax.Array, kernel: jax.Array, n_in: int = 1) -> jax.Array:
    """tensordot over the last `n_in` axes of x, as one product of two matrices.

    XLA's CPU backend differentiates it 1.5 times faster than products over several axes.
    """
    free, contracted = x.shape[: x.ndim - n_in], kernel.shape[:n_in]
    size = math.prod(contracted)
    return (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*free, *kernel.shape[n_in:])


class Dense(nn.Module):
    """Linear map without bias from the last `n_in` axes of x to `out_shape`, in the dtype of x."""

    out_shape: tuple[int, ...]
    n_in: int = 1
    initializer: nn.initializers.Initializer = _kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        in_shape = x.shape[-self.n_in :]
        kernel = self.param("kernel", self.initializer, (*in_shape, *self.out_shape), jnp.float32)
        return matmul(x, kernel.astype(x.dtype), self.n_in)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), the SwiGLU of Llama and Qwen (Shazeer, arXiv 2002.05202)."""

    d_ff: int

    @nn.compact
    def __call__(self, x_D: jax.Array) -> jax.Array:
        gate_F = Dense((self.d_ff,), name="gate")(x_D)
        up_F = Dense((self.d_ff,), name="up")(x_D)
        return Dense((x_D.shape[-1],), name="down")(nn.silu(gate_F) * up_F)


def rotary_angles(position_S: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., S, E/2], float32, of rotary position embedding (Su et al., arXiv 2104.09864)."""
    inverse_frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = position_S[..., None].astype(jnp.float32) * inverse_frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_E: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (x_i, x_{i+E/2}), the half-split layout of Hugging Face checkpoints. cos, sin broadcast to x."""
    first, second = jnp.split(x_E.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_E.dtype)
