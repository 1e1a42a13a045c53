# SPDX-License-Identifier: Apache-2.0
"""Which tokens may be drawn: top-k, top-p and min-p, the same in the sampler and in the trainer's log-probabilities.

A threshold on the logits decides. It is found by bisection over the float32 numbers, 32 passes over the vocabulary
instead of a sort, which no accelerator is good at and which on CPU costs more than a small model.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Filter:
    """Applied to logits at the sampling temperature, in this order; each sees what the one before it has left.

    Attributes:
      top_k: the k most likely tokens and those as likely as the last of them; 0: all.
      top_p: the fewest most likely tokens that hold this much probability (Holtzman et al., arXiv 1904.09751), and
        those as likely as the last of them; 1: all.
      min_p: tokens at least this likely, as a share of the most likely one (Nguyen et al., arXiv 2407.01082); 0: all.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def everything(self) -> bool:
        """Whether any token may be drawn."""
        return self == KEEP_ALL

    def __call__(self, logits_V: jax.Array, token: jax.Array | None = None) -> jax.Array:
        """Logits [..., V] with -inf where a token may not be drawn.

        Args:
          logits_V: float32.
          token: [...], tokens that were drawn: they stay even where rounding puts them just outside, so that the
            trainer never finds a sampled token impossible.
        """
        if self.everything:
            return logits_V
        drawn_V = False if token is None else jnp.arange(logits_V.shape[-1]) == token[..., None]
        frozen_V = jax.lax.stop_gradient(logits_V)
        left_V = jnp.ones(logits_V.shape, bool)
        if 0 < self.top_k < logits_V.shape[-1]:
            left_V &= frozen_V >= threshold(frozen_V, left_V.astype(jnp.float32), float(self.top_k))
        top_1 = frozen_V.max(-1, keepdims=True)
        if self.top_p < 1:
            weight_V = jnp.where(left_V, jnp.exp(frozen_V - top_1), 0.0)
            left_V &= frozen_V >= threshold(frozen_V, weight_V, self.top_p * weight_V.sum(-1, keepdims=True))
        if self.min_p > 0:
            left_V &= frozen_V >= top_1 + jnp.log(self.min_p)
        return jnp.where(left_V | drawn_V, logits_V, -jnp.inf)


KEEP_ALL = Filter()


def threshold(value_V: jax.Array, weight_V: jax.Array, target: jax.Array | float) -> jax.Array:
    """The largest of the values [..., 1] such that those at least as large weigh `target` or more."""
    order_V = _ordered(value_V)
    low, high = order_V.min(-1, keepdims=True), order_V.max(-1, keepdims=True)

    def halve(_, bounds):
        low, high = bounds
        middle = high - (high - low) // 2  # rounds up: it ends where low == high
        enough = jnp.sum(jnp.where(order_V >= middle, weight_V, 0.0), -1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, jnp.maximum(high, low)))
    # From a number between two values to the value above it, which has the same tokens at or above it.
    return jnp.min(jnp.where(order_V >= low, value_V, jnp.inf), -1, keepdims=True)


def _ordered(value: jax.Array) -> jax.Array:
    """uint32 numbers in the order of float32 ones."""
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)
