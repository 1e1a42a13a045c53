# SPDX-License-Identifier: Apache-2.0
"""Tokens of each position's own before its thoughts: the thoughts are those of documents that hold them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import rough_params, tiny

from rlp_jax.rollout.engine import FEW, Own, sample_thoughts
from rlp_jax.rollout.sampling import thought_keys

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, K, G, T, L = 2, 3, 2, 7, 6
LAST, CLOSE = 9, (2,)


@functools.partial(jax.jit, static_argnames=("model", "open_tokens", "group_size", "settings"))
def think(model, params, tokens_BT, prefix_length_BR, key_BR, own, open_tokens=(), group_size=G, settings=()):
    _, cache = model.hidden(params, tokens_BT)
    return sample_thoughts(
        model, params, cache, prefix_length_BR, open_tokens, CLOSE, key_BR, L, 0.8, group_size=group_size, own=own,
        **dict(settings),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [(("unroll", True),), (("unroll", False),), (("unroll", False), ("slots", 2))])
@pytest.mark.parametrize(("family", "S"), [("llama", 5), ("llama", FEW + 4), ("gemma3", 8)])
def test_the_thoughts_of_whole_documents(family, S, settings):
    model = tiny(family)
    params, rng = rough_params(model), np.random.default_rng(S)
    prefix_BK = rng.integers(1, T + 1, (B, K))
    start_BK = rng.integers(0, S, (B, K))
    start_BK[0, 0], start_BK[1, 1] = S - 1, 0  # one that has the last token alone, one that fills its row
    tokens_BT, own_BKS = rng.integers(3, 50, (B, T)), rng.integers(3, 50, (B, K, S))
    own_BKS[..., -1] = LAST
    key_BKG = thought_keys(jax.random.key(0), jnp.arange(B), jnp.asarray(prefix_BK), G)

    whole_BKT, length_BK = np.zeros((B, K, T + S), np.int32), prefix_BK + S - 1 - start_BK
    for b, k in np.ndindex(B, K):
        text = [*tokens_BT[b, : prefix_BK[b, k]], *own_BKS[b, k, start_BK[b, k] : -1]]
        whole_BKT[b, k, : len(text)] = text
    lengths = np.repeat(length_BK.reshape(-1, 1), G, 1)
    wanted = think(model, params, whole_BKT.reshape(B * K, -1), lengths, key_BKG.reshape(-1, G), None, (LAST,))

    own = Own(jnp.asarray(own_BKS, jnp.int32), jnp.asarray(start_BK))  # any tokens stand before the start
    prefix_BR = np.repeat(prefix_BK, G, 1)
    found = think(model, params, tokens_BT, prefix_BR, key_BKG.reshape(B, -1), own, settings=settings)
    for name in ("thought_BRL", "length_BR", "stopped_BR"):
        np.testing.assert_array_equal(np.asarray(getattr(found, name)).ravel(), np.ravel(getattr(wanted, name)), name)
    np.testing.assert_allclose(np.ravel(found.logprob_BRL), np.ravel(wanted.logprob_BRL), atol=2e-4)


@pytest.mark.parametrize(("model", "targets"), [(hybrid(), {}), (tiny(), {"target_BRH": np.zeros((1, 1, 1), int)})])
def test_what_cannot_have_them(model, targets):
    own = Own(jnp.zeros((1, 1, 2), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    params = jax.eval_shape(model.init, jax.random.key(0))
    key_BR = jax.random.split(jax.random.key(0), 1)[None]
    with pytest.raises(ValueError, match="tokens of each position's own are for models without recurrent layers"):
        sample_thoughts(model, params, None, np.full((1, 1), 3), (), CLOSE, key_BR, L, 1.0, own=own, **targets)
