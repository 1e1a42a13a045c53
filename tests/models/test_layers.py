"""Small layers against float64 numpy, and the rotary embedding by its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.models.layers import Dense, GatedMLP, RMSNorm, rotary_angles, rotate


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_by_hand():
    # rms of (3, 4) is sqrt(25/2) = 3.535534; scaled by (1, 10)
    out = RMSNorm(0.0).apply({"params": {"scale": jnp.array([1.0, 10.0])}}, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(out, [[0.848528, 11.313708]], rtol=1e-6)
    # eps keeps zeros finite, value and gradient
    norm = RMSNorm(1e-6)
    params = {"params": {"scale": jnp.ones(4)}}
    assert jnp.all(norm.apply(params, jnp.zeros(4)) == 0)
    assert jnp.isfinite(jax.grad(lambda x: norm.apply(params, x).sum())(jnp.zeros(4))).all()


def test_rms_norm_against_float64_and_in_bfloat16():
    x, scale = normal(0, 5, 64) * 3, normal(1, 64)
    exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    out = RMSNorm(1e-5).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-6)
    # Statistics in float32: what is left is the rounding of input and output to 8 bits, half a unit each.
    half = RMSNorm(1e-5).apply({"params": {"scale": scale}}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float64), exact, rtol=2 * 2**-8, atol=1e-6)


def test_dense_contracts_its_last_axes_without_bias():
    x = normal(0, 2, 3, 4, 5)
    one, two = Dense((6, 7)), Dense((8,), n_in=2)
    params = one.init(jax.random.key(0), x)
    assert params["params"]["kernel"].shape == (5, 6, 7) and list(params["params"]) == ["kernel"]
    np.testing.assert_allclose(one.apply(params, x), np.einsum("abcd,dfg->abcfg", x, params["params"]["kernel"]), 1e-4)
    params = two.init(jax.random.key(0), x)
    assert params["params"]["kernel"].shape == (4, 5, 8)
    exact = np.einsum("abcd,cdf->abf", x.astype(np.float64), params["params"]["kernel"])
    np.testing.assert_allclose(two.apply(params, x), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_keep_the_dtype_of_their_input_and_float32_masters(dtype):
    x = jnp.ones((2, 8), dtype)
    for layer in (RMSNorm(1e-5), Dense((4,)), GatedMLP(12)):
        params = layer.init(jax.random.key(0), x)
        assert layer.apply(params, x).dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_gated_mlp_against_float64():
    x, gate, up, down = normal(0, 3, 4), normal(1, 4, 9), normal(2, 4, 9), normal(3, 9, 4)
    params = {"params": {name: {"kernel": value} for name, value in (("gate", gate), ("up", up), ("down", down))}}
    x64 = x.astype(np.float64)
    exact = ((x64 @ gate) / (1 + np.exp(-(x64 @ gate))) * (x64 @ up)) @ down
    np.testing.assert_allclose(GatedMLP(9).apply(params, x), exact, rtol=1e-4, atol=1e-5)


def turned(x_SE, positions, theta=50.0):
    cos, sin = rotary_angles(jnp.asarray(positions), x_SE.shape[-1], theta)
    return rotate(x_SE, cos, sin)


def test_rotation_is_multiplication_of_complex_halves():
    x = normal(0, 6, 8)
    positions = np.array([0, 1, 2, 7, 100, 3])
    frequency = 50.0 ** (-np.arange(4) / 4)
    numbers = x[:, :4].astype(np.float64) + 1j * x[:, 4:]
    exact = numbers * np.exp(1j * positions[:, None] * frequency)
    out = turned(x, positions)
    np.testing.assert_allclose(out, np.concatenate([exact.real, exact.imag], 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out[0], x[0])  # position 0 turns nothing


def test_rotated_products_depend_on_the_distance_alone():
    q, k = normal(1, 1, 8), normal(2, 1, 8)

    def product(m, n):
        return float((turned(q, [m]) * turned(k, [n])).sum())

    for distance in (0, 1, 5, 11):
        products = [product(start + distance, start) for start in (0, 3, 40)]
        np.testing.assert_allclose(products, products[0], rtol=1e-4, atol=1e-4)
    assert abs(product(5, 0) - product(0, 5)) > 1e-2  # and on its sign
    np.testing.assert_allclose(jnp.linalg.norm(turned(q, [17])), np.linalg.norm(q), rtol=1e-5)
