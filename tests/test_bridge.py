# SPDX-License-Identifier: Apache-2.0
"""Modules of flax.nnx as functions and our model as a module: the same numbers on both sides, and the way back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hybrids import CONFIG as HYBRID
from tiny_run import LLAMA

import rlp_jax
from rlp_jax import bridge, objective
from rlp_jax.models.transformer import LanguageModel

pytestmark = pytest.mark.usefixtures("quick_compiles")
X_BD = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


class Net(nnx.Module):
    """A list, a parameter in two places, running statistics and a random stream: everything that is not plain."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.tied = self.layers[0].kernel

    def __call__(self, x_BD):
        return self.dropout(jnp.tanh(self.layers[1](self.norm(self.layers[0](x_BD))))) @ self.tied

    def first(self, x_BD, scale=1.0):
        return self.layers[0](x_BD) * scale


@pytest.fixture
def net():
    return Net(nnx.Rngs(1))


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32).tolist(), tree)


def test_the_function_gives_the_modules_numbers_and_gradients(net):
    params, apply_fn = bridge.functional(net)
    there = bits(nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    out_BD, jitted_BD = apply_fn(params, X_BD), jax.jit(apply_fn)(params, X_BD)
    gradient = jax.jit(jax.grad(lambda params: (apply_fn(params, X_BD) ** 2).sum()))(params)
    of_module = nnx.grad(lambda module: (module(X_BD) ** 2).sum())(nnx.clone(net))
    chex.assert_trees_all_close(gradient, nnx.to_pure_dict(of_module), rtol=1e-5, atol=1e-6)
    assert np.abs(gradient["layers"][0]["kernel"]).max() > 0.1  # not the closeness of zeros
    assert bits(nnx.to_pure_dict(nnx.state(net, nnx.Param))) == there
    assert (net.norm.mean[...] == 0).all()  # no call of the function has moved the running statistics
    np.testing.assert_array_equal(out_BD, net(X_BD))
    np.testing.assert_allclose(jitted_BD, out_BD, rtol=1e-5, atol=1e-6)


def test_a_function_repeats_itself_where_the_module_moves_on(net):
    params, apply_fn = bridge.functional(net)
    out_BD = apply_fn(params, X_BD)
    first_BD, second_BD = net(X_BD), net(X_BD)
    np.testing.assert_array_equal(out_BD, first_BD)
    assert (first_BD != second_BD).any()  # another dropout mask
    np.testing.assert_array_equal(apply_fn(params, X_BD), out_BD)


def test_other_methods_and_transformations(net):
    params, apply_fn = bridge.functional(net)
    named_BD = apply_fn(params, X_BD, method="first", scale=2.0)
    np.testing.assert_array_equal(named_BD, net.first(X_BD, scale=2.0))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    mapped_2BD = jax.vmap(lambda params: apply_fn(params, X_BD, method="first"))(both)
    np.testing.assert_allclose(mapped_2BD[1], 2 * mapped_2BD[0], rtol=1e-5)
    total, _ = jax.lax.scan(lambda total, _: (total + apply_fn(params, X_BD).sum(), None), 0.0, length=3)
    np.testing.assert_allclose(total, 3 * apply_fn(params, X_BD).sum(), rtol=1e-5)


def test_params_are_plain_and_come_back_exactly(net):
    params, apply_fn = bridge.functional(net)
    assert set(params) == {"layers", "norm"}  # the tied kernel once, where it stands first
    optimizer = optax.adam(1e-2)
    gradient = jax.grad(lambda params: apply_fn(params, X_BD).sum())(params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    average = objective.ema_update(params, moved, 0.5)
    assert jax.tree.structure(average) == jax.tree.structure(params)
    bridge.write_back(net, moved)
    assert bits(bridge.functional(net).params) == bits(moved)
    assert net.tied is net.layers[0].kernel
    np.testing.assert_array_equal(net(X_BD), apply_fn(moved, X_BD))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params | {"head": X_BD}, "parameter head is not in the module"),
        (lambda params: {"layers": params["layers"]}, "parameter norm.bias is missing"),
        (lambda params: params | {"norm": {"bias": X_BD, "scale": X_BD}}, r"parameter norm.bias has shape \(5, 3\)"),
    ],
)
def test_parameters_of_another_module_are_refused(net, change, message):
    params, _ = bridge.functional(net)
    with pytest.raises(ValueError, match=message):
        bridge.write_back(net, change(jax.tree.map(lambda leaf: leaf + 1, params)))
    assert bits(bridge.functional(net).params) == bits(params)


def test_a_filter_says_what_is_trained(net):
    net.adapter = nnx.LoRA(3, 2, 3, rngs=nnx.Rngs(2))
    params, apply_fn = bridge.functional(net, nnx.LoRAParam)
    assert set(params) == {"adapter"}
    assert apply_fn(params, X_BD, method="first").shape == X_BD.shape
    with pytest.raises(ValueError, match="Net has no variables"):
        bridge.functional(net, nnx.Intermediate)


TOKENS_BT = np.random.default_rng(3).integers(0, 50, (2, 8))


def cross_entropy(logits_BTV):
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], TOKENS_BT[:, 1:]).mean()


@pytest.fixture
def decoder():
    model = LanguageModel(LLAMA)
    abstract, random = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(5)
    return model, jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.0, 0.3, leaf.shape), leaf.dtype), abstract)


def test_our_model_as_a_module_gives_the_same_logits(decoder):
    model, params = decoder

    def whole_and_branches(apply):
        _, cache = apply(TOKENS_BT)
        return apply(TOKENS_BT[:, None, :2], rlp_jax.fork(cache, np.full((2, 1), TOKENS_BT.shape[1])))[0]

    expected = jax.jit(lambda params: whole_and_branches(lambda *args: model.apply(params, *args)))(params)
    np.testing.assert_array_equal(nnx.jit(whole_and_branches)(bridge.as_module(model, params)), expected)


def test_our_model_as_a_module_is_trained_as_our_model_is(decoder):
    model, params = decoder
    module = bridge.as_module(model, params)
    gradient = jax.jit(jax.grad(lambda params: cross_entropy(model.apply(params, TOKENS_BT)[0])))(params)
    of_module = nnx.jit(nnx.grad(lambda module: cross_entropy(module(TOKENS_BT)[0])))(module)
    chex.assert_trees_all_close(nnx.to_pure_dict(of_module)["params"], gradient, rtol=1e-5, atol=1e-7)

    transformation = optax.sgd(1e-1, momentum=0.9)
    nnx.Optimizer(module, transformation, wrt=nnx.Param).update(module, of_module)
    trained = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient)
    chex.assert_trees_all_close(module.tree(), trained, rtol=1e-6, atol=1e-8)
    assert np.abs(gradient["final_norm"]["scale"]).max() > 1e-3  # it moved


@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["decoder", "hybrid"])
def test_there_and_back(config):
    model = LanguageModel(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, leaf.size, leaf.dtype), abstract)
    module = bridge.as_module(model, params)
    assert jax.tree.structure(module.tree()) == jax.tree.structure(params)
    assert all(ours is theirs for ours, theirs in zip(*map(jax.tree.leaves, (params, module.tree())), strict=True))
    taken, apply_fn = bridge.functional(module)
    assert bits(taken["params"]) == bits(params)
    assert jax.eval_shape(apply_fn, taken, TOKENS_BT)[0].shape == (*TOKENS_BT.shape, config.vocab_size)
    bridge.write_back(module, jax.tree.map(lambda leaf: leaf + 1, taken))
    assert bits(module.tree()) == bits(jax.tree.map(lambda leaf: leaf + 1, params))
