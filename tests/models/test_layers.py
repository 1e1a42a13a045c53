# SPDX-License-Identifier: Apache-2.0
"""Small layers against float64 numpy, and the rotary embedding by its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.models.layers import Dense, GatedMLP, RMSNorm, RopeScaling, rope_divisors, rotary_angles, rotate


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


def test_dense_with_a_bias():
    x, kernel, bias = normal(0, 3, 4), normal(1, 4, 2, 5), normal(2, 2, 5)
    dense = Dense((2, 5), use_bias=True)
    assert jax.tree.map(jnp.shape, dense.init(jax.random.key(0), x)["params"]) == {"kernel": (4, 2, 5), "bias": (2, 5)}
    out = dense.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(out, np.einsum("ad,dfg->afg", x.astype(np.float64), kernel) + bias, rtol=1e-4, atol=1e-5)


def test_norm_with_an_offset_starts_at_a_gain_of_one():
    x, scale = normal(0, 5, 8), normal(1, 8)
    norm = RMSNorm(1e-5, offset=1.0)
    assert not norm.init(jax.random.key(0), x)["params"]["scale"].any()
    np.testing.assert_allclose(
        norm.apply({"params": {"scale": scale}}, x), RMSNorm(1e-5).apply({"params": {"scale": 1 + scale}}, x), rtol=1e-6
    )


def test_gelu_mlp_against_float64():
    x, gate, up, down = normal(0, 3, 4), normal(1, 4, 9), normal(2, 4, 9), normal(3, 9, 4)
    params = {"params": {name: {"kernel": value} for name, value in (("gate", gate), ("up", up), ("down", down))}}
    g = x.astype(np.float64) @ gate
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    exact = (gelu * (x.astype(np.float64) @ up)) @ down
    np.testing.assert_allclose(GatedMLP(9, "gelu_tanh").apply(params, x), exact, rtol=1e-4, atol=1e-5)


def test_linear_scaling_turns_slower():
    cos, sin = rotary_angles(jnp.arange(12), 8, 50.0, RopeScaling("linear", 4.0))
    exact_cos, exact_sin = rotary_angles(jnp.arange(12) / 4, 8, 50.0)
    np.testing.assert_allclose(cos, exact_cos, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sin, exact_sin, rtol=1e-5, atol=1e-6)


def test_llama3_scaling_by_hand():
    """Llama 3.2 1B: 64 wide, base 500,000, factor 32; by the wavelengths of its definition."""
    divisors = rope_divisors(64, 500_000.0, RopeScaling("llama3", 32.0))
    wavelength = 2 * np.pi * 500_000.0 ** (np.arange(32) / 32)
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert (short.sum(), long.sum()) == (15, 14)
    np.testing.assert_array_equal(divisors[short], 1)
    np.testing.assert_array_equal(divisors[long], 32)
    smooth = (8192 / wavelength - 1) / (4 - 1)
    between = ~short & ~long
    np.testing.assert_allclose(1 / divisors[between], ((1 - smooth) / 32 + smooth)[between], rtol=1e-12)
    cos, _ = rotary_angles(jnp.array([1000]), 64, 500_000.0, RopeScaling("llama3", 32.0))
    np.testing.assert_allclose(cos[0], np.cos(1000 * 2 * np.pi / wavelength / divisors), atol=2e-4)
