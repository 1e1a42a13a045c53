# SPDX-License-Identifier: Apache-2.0
"""Sampling with int8 weights: what is rounded and by how much, and a step that samples with them and learns in float32.

The bounds on log-probabilities are those of rounding: a kernel's entries are off by at most half a step, 1/255 of the
largest in their channel, which is some 0.4% of a channel's size (root mean square) for kernels of the tiny models.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import relative_error, rough_params, tiny
from slow_step import TEMPLATE, batch_of, configure, recorder, small, steps

from rlp_jax import rlp
from rlp_jax.config import Config, ConfigError, DataConfig
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.cache import fork
from rlp_jax.models.layers import Dense
from rlp_jax.models.quantised import quantise
from rlp_jax.models.transformer import unstack_layers
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.sampling import thought_keys
from rlp_jax.settings import override, validate
from rlp_jax.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODELS = {
    "tied": tiny("llama", vocab_size=16),
    "untied": tiny("qwen3", vocab_size=40),
    "hybrid": hybrid("M*-M*-M", vocab_size=16),
}
models = pytest.mark.parametrize("name", MODELS)


def paths(tree):
    """{"layers/mlp/up/kernel": leaf}, quantised kernels whole."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "qvalue"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# ---------------------------------------------------------------------------------------------------- kernels


@models
def test_kernels_are_within_half_a_step_and_the_rest_is_untouched(name):
    model, params = MODELS[name], rough_params(MODELS[name])
    quantised_model, quantised = quantise(model, params)
    before, after = paths(params), paths(quantised)
    assert not quantised_model.config.tie_embeddings
    if model.config.tie_embeddings:
        before["head/kernel"] = before["embed/embedding"].T
    assert before.keys() == after.keys()
    for path, kernel in before.items():
        if not path.endswith("kernel") or path.endswith("conv/kernel"):
            assert after[path] is kernel, path
            continue
        values, scale = np.asarray(after[path].qvalue), np.asarray(after[path].scale)
        assert values.dtype == jnp.int8 and scale.dtype == jnp.float32
        # A scale for each output of each layer: over the input axes alone it has size 1.
        stacked = not path.startswith("head")
        inputs = (2 if "/o/" in path else 1) if stacked else 1
        assert scale.shape == (*kernel.shape[:stacked], *[1] * inputs, *kernel.shape[stacked + inputs :]), path
        steps_off = np.abs(values - np.asarray(kernel, np.float64) / scale)
        assert 0.4 < steps_off.max() < 0.5 + 1e-5 and np.abs(values).max() == 127, path


def test_a_channel_of_zeros_stays_zero():
    kernel = jnp.zeros((1, 16, 20)).at[0, :, 1].set(0.5)
    _, quantised = quantise(MODELS["hybrid"], {"segments_0": {"mlp_0": {"mixer": {"up": {"kernel": kernel}}}}})
    quantised = quantised["segments_0"]["mlp_0"]["mixer"]["up"]["kernel"]
    np.testing.assert_allclose(quantised.qvalue * quantised.scale, kernel, rtol=0.5 / 127)


@pytest.mark.parametrize(("n_in", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_a_product_is_that_with_the_rounded_kernel(n_in, dtype):
    import qwix

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 6)), dtype)
    kernel = jnp.asarray(rng.normal(size=(5, 6, 4, 2)[2 - n_in :]), jnp.float32)
    quantised = qwix.quantize(kernel, jnp.int8, channelwise_axes=(n_in, n_in + 1))
    out = jax.jit(Dense((4, 2), n_in=n_in).apply)({"params": {"kernel": quantised}}, x)
    wanted = np.tensordot(
        np.asarray(x, np.float64), np.asarray(quantised.qvalue, np.float64) * np.asarray(quantised.scale), n_in
    )
    assert out.dtype == dtype and out.shape == wanted.shape
    assert relative_error(out, wanted) < (1e-6 if dtype == "float32" else 1e-2)


# ----------------------------------------------------------------------------------------------------- models


@models
def test_scanned_and_unrolled_models_of_rounded_weights(name):
    """Both equal the float32 model of the same rounded weights, for documents and for branches."""
    model, params = MODELS[name], rough_params(MODELS[name])
    quantised_model, quantised = quantise(model, params)
    rounded = jax.tree.map(
        lambda x: x.qvalue * x.scale if hasattr(x, "qvalue") else x, quantised, is_leaf=lambda x: hasattr(x, "qvalue")
    )
    rng = np.random.default_rng(0)
    document, branch = rng.integers(0, 16, (2, 9)), rng.integers(0, 16, (2, 2, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def read(model, params):
        _, cache = model.apply(params, document, stops_BK=jnp.array([[9, 4], [2, 0]]))
        logits, _ = model.apply(params, branch, fork(cache, jnp.array([[9, 4], [2, 0]])))
        return logits

    wanted = read(quantised_model, rounded)
    scanned = read(quantised_model, quantised)
    unrolled = read(quantised_model.unrolled(), unstack_layers(quantised))
    assert relative_error(scanned, wanted) < 1e-5 and relative_error(unrolled, wanted) < 1e-5
    assert 1e-4 < relative_error(wanted, read(model, params)) < 0.05


@pytest.mark.parametrize(("name", "unroll"), [("tied", True), ("untied", False), ("hybrid", False)])
def test_the_sampler_is_near_the_trainer(name, unroll):
    """What the sampler says of its tokens against the float32 forward, and how often it picks the same."""
    model, params = MODELS[name], rough_params(MODELS[name])
    B, G, L = 4, 4, 6
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(8, 16, (B, 9)))
    position_BK = jnp.asarray([[9, 4], [2, 5], [7, 3], [8, 1]])
    template = TemplateTokens(plain=(), context=(), open=(1,), close=(2, 2))
    key_BR = thought_keys(jax.random.key(0), jnp.arange(B), position_BK, G).reshape(B, -1)
    prefix_BR = jnp.repeat(position_BK, G, 1)

    @functools.partial(jax.jit, static_argnums=0)
    def think(quantised, temperature):
        used, weights = quantise(model, params) if quantised else (model, params)
        _, cache = used.hidden(weights, tokens_BT, stops_BK=position_BK)
        return sample_thoughts(
            used, weights, cache, prefix_BR, template.open, template.close, key_BR, L, temperature, group_size=G,
            unroll=unroll,
        )  # fmt: skip

    @jax.jit
    def score(rollout):
        thoughts = scoring.Thoughts(rollout.thought_BRL, rollout.length_BR, rollout.stopped_BR)
        _, cache = model.hidden(params, tokens_BT, stops_BK=position_BK)
        target_BRH = jnp.zeros((*prefix_BR.shape, 1), jnp.int32)
        return scoring.score_branches(model, params, cache, prefix_BR, thoughts, target_BRH, template, 1.0).logprob_BRL

    rollout = think(True, 1.0)
    inside_BRL = np.arange(L) < rollout.length_BR[..., None]
    gap = np.abs(np.asarray(score(rollout) - rollout.logprob_BRL))[inside_BRL]
    assert 1e-4 < gap.mean() < 0.05 and gap.max() < 0.5
    for temperature in (1.0, 1e-3):  # the same uniform numbers decide; near 0 they hardly matter
        equal_BRL = np.asarray(think(True, temperature).thought_BRL) == think(False, temperature).thought_BRL
        so_far_BRL = np.cumprod(np.roll(equal_BRL, 1, -1) | (np.arange(L) == 0), -1, dtype=bool)
        assert equal_BRL[so_far_BRL].mean() > 0.9


# ------------------------------------------------------------------------------------------- step and settings


@pytest.mark.parametrize("model", [small(), hybrid("M*-", vocab_size=16)], ids=["llama", "hybrid"])
def test_a_step_samples_in_int8_and_learns_in_float32(model):
    config, optimizer, batch = configure(rollout_dtype="int8", importance_cap=2.0), recorder(0.1), batch_of(16)
    state = init_state(rough_params(model), optimizer)
    step = rlp.make_step(model, optimizer, TEMPLATE, config)
    samples = step.sample(state.params, state.ema_params, batch, jax.random.key(3))
    new, metrics, _ = step.learn(jax.tree.map(jnp.array, state), batch, samples)
    assert metrics["finite"] == 1.0 and 1e-4 < metrics["logprob_gap"] < 0.05
    assert jax.tree.structure(new.params) == jax.tree.structure(state.params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.params))
    # The next step's weights are rounded anew, by the same program.
    step.sample(new.params, new.ema_params, batch, jax.random.key(4))
    assert step.sample._cache_size() == 1


def test_float32_thoughts_are_as_they_were():
    """To the bit, whether float32 is asked for or the default; int8 leaves the baseline and the positions alone."""
    model, batch = small(), batch_of(16)
    params = rough_params(model)
    configs = configure(), configure(rollout_dtype="float32"), configure(rollout_dtype="int8")
    default, asked, rounded = (steps(model, TEMPLATE, c)[1](params, params, batch, jax.random.key(3)) for c in configs)
    jax.tree.map(np.testing.assert_array_equal, default, asked)
    np.testing.assert_array_equal(rounded.s_ema_BKH, default.s_ema_BKH)
    np.testing.assert_array_equal(rounded.position_BK, default.position_BK)
    assert np.any(rounded.logprob_BKGL != default.logprob_BKGL)


def test_the_setting_is_checked(monkeypatch):
    message = r"^rlp\.rollout_dtype is 'int4': choose one of float32, bfloat16, int8 \(did you mean int8\?\)"
    with pytest.raises(ConfigError, match=message):
        override(Config(), ["rlp.rollout_dtype=int4"])
    usable = Config(model="tiny", data=DataConfig(sources=("compose",)))
    config = override(usable, ["rlp.rollout_dtype=int8"])
    validate(config)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"^rlp\.rollout_dtype is 'int8'.*: pip install 'rlp_jax\[int8\]'$"):
        validate(config)
    with pytest.raises(ImportError, match=r"pip install 'rlp_jax\[int8\]'"):
        quantise(MODELS["tied"], {})
