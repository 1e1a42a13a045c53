# SPDX-License-Identifier: Apache-2.0
"""Operations counted from a jaxpr, against programs counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from rlp_jax.aot.jaxpr_cost import Turns, UnknownTurns, count_flops, innermost

X, W = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 3 * 5 * 5  # of x @ w


def count(function, *args, phases=(), **turns):
    return count_flops(jax.jit(function).trace(*args).jaxpr, Turns(**turns), phases)


def test_products():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 3, 4, 5), (2, 6, 5, 4)))
    assert count(lambda a, b: jnp.einsum("bmqe,bnek->bmnqk", a, b), a, b).total() == 2 * 2 * 3 * 6 * 4 * 5 * 4
    assert count(jnp.matmul, X, W).total() == ONE
    image, kernel = jax.ShapeDtypeStruct((2, 3, 8), jnp.float32), jax.ShapeDtypeStruct((7, 3, 4), jnp.float32)
    valid = functools.partial(jax.lax.conv_general_dilated, window_strides=(1,), padding="VALID")
    assert count(valid, image, kernel).total() == 2 * (2 * 7 * 5) * (3 * 4)


def test_loops():
    def scan(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    def nested(x, w):
        return jax.lax.fori_loop(0, 4, lambda _, x: scan(x, w) @ w, x)  # bounds that are known become a scan

    assert count(scan, X, W).total() == 7 * ONE
    assert count(nested, X, W).total() == 4 * 8 * ONE


def test_while_takes_the_turns_of_its_scope():
    def inner(x, w, n):
        with jax.named_scope("short"):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)

    def outer(x, w, n):
        with jax.named_scope("long"):
            x = jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: inner(x, w, n) @ w, x)
        return x, jax.lax.while_loop(lambda n: n < 9, lambda n: n + 1, n)  # counts nothing and needs no number

    n = jax.ShapeDtypeStruct((), jnp.int32)
    assert count(outer, X, W, n, loops={"short": 3, "long": 10.5}).total() == 10.5 * 4 * ONE
    with pytest.raises(UnknownTurns, match="long"):
        count(outer, X, W, n, loops={"short": 3})


def test_of_branches_the_dearest():
    def function(x, w):
        return jax.lax.switch(x.sum().astype(int), [lambda x: x, lambda x: x @ w @ w, lambda x: x @ w], x)

    assert count(function, X, W).total() == 2 * ONE


def test_gradients_and_remat():
    def layers(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    assert count(jax.grad(layers, (0, 1)), X, W).total() == 6 * ONE
    again = jax.grad(jax.checkpoint(layers), (0, 1))
    assert count(again, X, W).total() == 8 * ONE


def test_custom_gradients_are_counted_as_written():
    @jax.custom_vjp
    def double(x, w):
        return x @ w

    double.defvjp(lambda x, w: (x @ w @ w, w), lambda w, d: (d @ w.T, jnp.zeros_like(w)))
    assert count(double, X, W).total() == ONE
    assert count(jax.grad(lambda x, w: double(x, w).sum()), X, W).total() == 3 * ONE


def test_phases_take_the_innermost_scope_through_transformations():
    def function(x, w):
        with jax.named_scope("outer"):
            x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=2)[0]
            with jax.named_scope("inner"):
                x = jnp.sin(x @ w)
        return (x @ w).sum()

    counted = count(jax.grad(function), X, W, phases=("outer", "inner"))
    assert counted == {"outer": 4 * ONE, "inner": 2 * ONE, "": 2 * ONE}
    assert innermost("jit(f)/transpose(jvp(ring_64))/while/ring_640x", {"ring_64": 1}) == "ring_64"
    assert innermost("jit(f)/ring_640", {"ring_64": 1}) is None


def test_shard_map_counts_every_device():
    mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((12, 5), jnp.float32)
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False)
    assert count(split, x, W).total() == 4 * 2 * ONE  # along "b" all do the same


def test_kernels_by_their_grid():
    def kernel(x_ref, out_ref):
        @pl.when(pl.program_id(0) > 0)
        def _():
            out_ref[...] = x_ref[...] @ x_ref[...]

    def run(x, n=3):
        block = pl.BlockSpec((8, 8), lambda i, j: (i, j))
        return pl.pallas_call(kernel, x, grid=(2, n), in_specs=[block], out_specs=block, name="square")(x)

    x = jax.ShapeDtypeStruct((16, 24), jnp.float32)
    assert count(run, x).total() == 2 * 3 * 2 * 8**3
    n = jax.ShapeDtypeStruct((), jnp.int32)
    asked = []

    def grid(name, eqn):
        asked.append((name, eqn.invars[1].aval.shape))
        return 2.5

    assert count(run, x, n, grid=grid).total() == 2 * 2.5 * 2 * 8**3
    assert asked == [("square", (16, 24))]
    with pytest.raises(UnknownTurns, match="square"):
        count(run, x, n)


def test_what_the_compiler_counts_without_loops():
    """Where there is no loop, its own count is the same."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 128), (128, 256)))
    compiled = jax.jit(jnp.matmul).lower(x, w).compile()
    assert count(jnp.matmul, x, w).total() == compiled.cost_analysis()["flops"]
