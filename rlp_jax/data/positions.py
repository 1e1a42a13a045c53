# SPDX-License-Identifier: Apache-2.0
"""Which positions of a document get a thought: the paper draws one uniformly; we offer more, and other ways to choose.

Position t means that the thought is asked for x_t: it follows the prefix x_<t, and x_t .. x_{t+H-1} are scored. Pure
jax, jit-able (K, horizon and mode static). The choice for a document depends on the key and the document's id alone,
never on its row, its batch mates or how far the batch is padded.
"""

import chex
import jax
import jax.numpy as jnp

from rlp_jax.config import PositionMode

# Weight of a candidate whose score is zero: it is taken only when nothing with a score is left.
SMALLEST_SCORE = 1e-30


def candidates(
    length_B: chex.Array, span_BT: chex.Array, first: int, horizon: int, mode: PositionMode = "uniform"
) -> chex.Array:
    """Positions that may get a thought: first <= t and t + horizon <= length, in mode "span" span tokens only.

    Args:
      length_B: [B] document tokens.
      span_BT: [B, T] bool, tokens that mode "span" may choose.
      first: 0 where a BOS token precedes the document, else 1 (something has to stand before x_t).
      horizon: H, tokens scored after the thought.
      mode: "uniform" and "entropy" allow every token.

    Returns:
      [B, T] bool.
    """
    chex.assert_rank([length_B, span_BT], [1, 2])
    t_1T = jnp.arange(span_BT.shape[1])[None]
    allowed_BT = (t_1T >= first) & (t_1T + horizon <= jnp.asarray(length_B)[:, None])
    return allowed_BT & jnp.asarray(span_BT, bool) if mode == "span" else allowed_BT


def choose_positions(
    key: chex.PRNGKey, document_B: chex.Array, candidate_BT: chex.Array, score_BT: chex.Array | None, positions: int
) -> tuple[chex.Array, chex.Array]:
    """Draw K distinct candidates a document without replacement, by the Gumbel top-k trick (Kool et al. 2019,
    "Stochastic Beams and Where to Find Them", section 3).

    Args:
      key: one key for the batch.
      document_B: [B] document ids. Only their low 32 bits count.
      candidate_BT: [B, T] bool, from `candidates`.
      score_BT: [B, T] each draw takes a remaining candidate with probability proportional to its score (the baseline's
        entropy in mode "entropy"; scores that are not positive count as almost zero). None: all are alike.
      positions: K. Where a document has at most K candidates, all of them are taken.

    Returns:
      position_BK int32, ascending, invalid ones last, and valid_BK bool. An invalid entry holds an index that is safe
      to read: the document's first candidate, or 1 (0 if T is 1) where it has none.
    """
    chex.assert_rank([document_B, candidate_BT], [1, 2])
    documents, tokens = candidate_BT.shape
    t_T = jnp.arange(tokens)

    def gumbel_T(document):
        document_key = jax.random.fold_in(key, document)
        # A key for each position: the draw at t must not depend on T, which follows the longest document of the batch.
        return jax.vmap(lambda t: jax.random.gumbel(jax.random.fold_in(document_key, t), mode="high"))(t_T)

    noisy_BT = jax.vmap(gumbel_T)(_low_bits(document_B))
    if score_BT is not None:
        chex.assert_equal_shape([candidate_BT, score_BT])
        noisy_BT += jnp.log(jnp.where(score_BT > 0, jnp.maximum(score_BT, SMALLEST_SCORE), SMALLEST_SCORE))
    noisy_BT = jnp.where(candidate_BT, noisy_BT, -jnp.inf)

    taken = min(positions, tokens)
    value_BK, index_BK = jax.lax.top_k(noisy_BT, taken)
    # T stands for "none" and sorts last; K > T leaves more of them.
    index_BK = jnp.where(value_BK > -jnp.inf, index_BK, tokens)
    index_BK = jnp.pad(index_BK, ((0, 0), (0, positions - taken)), constant_values=tokens)
    index_BK = jnp.sort(index_BK, axis=-1)
    valid_BK = index_BK < tokens

    safe_B = jnp.where(candidate_BT.any(-1), candidate_BT.argmax(-1), min(1, tokens - 1))
    position_BK = jnp.where(valid_BK, index_BK, safe_B[:, None]).astype(jnp.int32)
    chex.assert_shape([position_BK, valid_BK], (documents, positions))
    return position_BK, valid_BK


def _low_bits(document_B: chex.Array) -> chex.Array:
    """Ids as uint32, alike for int64 numpy arrays and for what jit makes of them."""
    return jnp.asarray(document_B).astype(jnp.uint32)
