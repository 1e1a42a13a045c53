# SPDX-License-Identifier: Apache-2.0
"""The decoder against a float64 numpy one, causality by gradient, padding, precision, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import FAMILIES, apply, relative_error, rough_params, tiny

from rlp_jax.models.blocks import REMAT
from rlp_jax.models.cache import fork

pytestmark = pytest.mark.usefixtures("quick_compiles")
families = pytest.mark.parametrize("family", list(FAMILIES))


def documents(model, B, T, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (B, T)).astype(np.int32)


def numpy_decoder(config, params, tokens_T):
    """Logits [T, V] in float64: the decoder written out once more, one head and one layer at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    T, half = len(tokens_T), config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    turn = np.exp(1j * np.arange(T)[:, None] * frequency)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotated(x):
        x = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([x.real, x.imag], -1)

    x = params["embed"]["embedding"][tokens_T]
    for y in range(config.n_layers):
        layer = jax.tree.map(lambda leaf, y=y: leaf[y], params["layers"])
        attention, mlp = layer["attention"], layer["mlp"]
        normed = norm(x, layer["attention_norm"]["scale"])
        update = 0
        for n in range(config.n_heads):
            m = n // (config.n_heads // config.n_kv_heads)
            q, k = normed @ attention["q"]["kernel"][:, n], normed @ attention["k"]["kernel"][:, m]
            if config.qk_norm:
                q, k = norm(q, attention["q_norm"]["scale"]), norm(k, attention["k_norm"]["scale"])
            score = rotated(q) @ rotated(k).T / np.sqrt(config.head_dim)
            weight = np.exp(score - score.max(-1, keepdims=True)) * np.tri(T)
            value = normed @ attention["v"]["kernel"][:, m]
            update = update + weight / weight.sum(-1, keepdims=True) @ value @ attention["o"]["kernel"][n]
        x = x + update
        normed = norm(x, layer["mlp_norm"]["scale"])
        gate = normed @ mlp["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    x = norm(x, params["final_norm"]["scale"])
    return x @ (params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"])


@families
def test_logits_against_float64(family):
    model = tiny(family)
    params, tokens = rough_params(model), documents(model, 2, 9)
    logits, _ = apply(model, params, tokens)
    exact = np.stack([numpy_decoder(model.config, params, row) for row in tokens])
    assert logits.dtype == jnp.float32 and np.std(exact) > 0.5
    np.testing.assert_allclose(logits, exact, rtol=1e-4, atol=2e-5)


@families
def test_the_parameter_tree(family):
    cfg = tiny(family).config
    V, D, F, N, M, E, Y = 50, 16, 20, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, 2
    V = cfg.vocab_size
    attention = {
        "q": {"kernel": (Y, D, N, E)}, "k": {"kernel": (Y, D, M, E)}, "v": {"kernel": (Y, D, M, E)},
        "o": {"kernel": (Y, N, E, D)},
    }  # fmt: skip
    if family == "qwen3":
        attention |= {"q_norm": {"scale": (Y, E)}, "k_norm": {"scale": (Y, E)}}
    expected = {
        "embed": {"embedding": (V, D)},
        "layers": {
            "attention_norm": {"scale": (Y, D)}, "mlp_norm": {"scale": (Y, D)}, "attention": attention,
            "mlp": {"gate": {"kernel": (Y, D, F)}, "up": {"kernel": (Y, D, F)}, "down": {"kernel": (Y, F, D)}},
        },
        "final_norm": {"scale": (D,)},
    }  # fmt: skip
    if family == "qwen3":
        expected["head"] = {"kernel": (D, V)}
    for dtype in ("float32", "bfloat16"):  # masters are float32 whatever the model computes in
        model = tiny(family, compute_dtype=dtype)
        params = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@families
def test_causality_by_gradient(family):
    model, T = tiny(family), 7
    params = rough_params(model)
    tokens = jnp.arange(T)[None]  # each token once, so an embedding row is a place of the sequence

    def read(embedding_TD):
        embedding = params["embed"]["embedding"].at[:T].set(embedding_TD)
        logits, _ = model.apply(params | {"embed": {"embedding": embedding}}, tokens)
        return jnp.tanh(logits[0, :, T:]).sum(-1)  # of other tokens: tied embeddings enter through the input alone

    jacobian_TTD = jax.jit(jax.jacrev(read))(params["embed"]["embedding"][:T])
    size_TT = np.abs(jacobian_TTD).max(-1)
    assert not np.triu(size_TT, 1).any()
    assert (size_TT[np.tril_indices(T)] > 1e-5).all()


@families
def test_padding_changes_nothing_before_it(family):
    model = tiny(family)
    params, tokens = rough_params(model), documents(model, 3, 10)
    length_B = np.array([10, 6, 1])
    logits, cache = apply(model, params, tokens)
    other = np.where(np.arange(10) < length_B[:, None], tokens, (tokens + 11) % model.config.vocab_size)
    other_logits, other_cache = apply(model, params, other)
    for b, length in enumerate(length_B):
        np.testing.assert_array_equal(logits[b, :length], other_logits[b, :length])
        np.testing.assert_array_equal(cache.prefix_k[:, b, :, :length], other_cache.prefix_k[:, b, :, :length])
        alone, _ = apply(model, params, tokens[b : b + 1, :length])
        np.testing.assert_allclose(logits[b, :length], alone[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits[1, 6:], other_logits[1, 6:])


@families
def test_remat_changes_memory_not_numbers(family):
    results = []
    for remat in REMAT:
        model = tiny(family, remat=remat)
        params, tokens = rough_params(model), documents(model, 2, 6)
        loss = jax.value_and_grad(lambda p, m=model, t=tokens: jnp.sin(m.apply(p, t)[0]).sum())
        results.append(jax.jit(loss)(params))
    (value, grads), *others = results
    for remat_value, remat_grads in others:
        np.testing.assert_allclose(value, remat_value, rtol=1e-5)
        assert relative_error(remat_grads, grads) < 1e-5
    with pytest.raises(ValueError, match="remat is 'all': choose from none, elementwise, layer"):
        apply(tiny(family, remat="all"), params, tokens)


@families
def test_bfloat16_compute(family):
    model, half = tiny(family), tiny(family, compute_dtype="bfloat16")
    params, tokens = rough_params(model), documents(model, 4, 12)
    exact, (logits, cache) = apply(model, params, tokens)[0], apply(half, params, tokens)
    assert logits.dtype == jnp.float32 and cache.prefix_k.dtype == jnp.bfloat16
    # 8 bits are good to 2^-9 = 0.2% an operation; some 20 roundings of independent sign in 2 layers, times the
    # sharpening of an attention with scores of several units, come to a few percent of the logits' spread.
    error = np.sqrt(np.mean((np.asarray(logits) - exact) ** 2)) / np.std(exact)
    assert 1e-4 < error < 0.04
    grads = jax.jit(jax.grad(lambda p: jnp.sin(half.apply(p, tokens)[0]).mean()))(params)
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_handle_is_a_static_argument():
    model = tiny()
    assert hash(model) == hash(tiny()) and model == tiny() != tiny("qwen3")
    logits, _ = apply(model, rough_params(model), jnp.zeros((2, 3), jnp.int32))  # jit with the model static
    assert logits.shape == (2, 3, 50)


def test_hidden_and_unembed_are_apply():
    model = tiny("qwen3")
    params, tokens = rough_params(model), documents(model, 2, 5)
    hidden, _ = jax.jit(model.hidden)(params, tokens)
    assert hidden.shape == (2, 5, 16)
    np.testing.assert_allclose(model.unembed(params, hidden), apply(model, params, tokens)[0], rtol=1e-6, atol=1e-6)


def test_refusals():
    model = tiny()
    params, tokens = rough_params(model), jnp.zeros((2, 4), jnp.int32)
    _, prefix = apply(model, params, tokens)
    with pytest.raises(ValueError, match="fork"):
        model.apply(params, tokens, prefix)
    for wrong in (tokens[0], tokens[:, None], tokens[:, None, None]):
        with pytest.raises(ValueError, match=f"{wrong.ndim} axes"):
            model.apply(params, wrong)
    branches = fork(prefix, jnp.zeros((2, 3), jnp.int32))
    for wrong in (tokens[:, None], tokens, jnp.zeros((2, 4, 1), jnp.int32), jnp.zeros((1, 3, 1), jnp.int32)):
        with pytest.raises(ValueError, match=r"forked for \(2, 3\)"):
            model.apply(params, wrong, branches)
    with pytest.raises(ValueError, match="1 axes"):
        model.apply(params, tokens[0], branches)
