# SPDX-License-Identifier: Apache-2.0
"""What sets the dense families apart: goldens of transformers for each, windows, and sharing and the step with them."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import MORE_FAMILIES, apply, relative_error, rough_params, tiny
from safetensors.numpy import save_file
from test_sharing import TOLERANCE as SHARING_TOLERANCE
from test_sharing import both_ways
from tiny_dense import TINY, draw

from rlp_jax.checkpoints_io.hf_config import config_from_json
from rlp_jax.checkpoints_io.huggingface import read_directory
from rlp_jax.checkpoints_io.names import disassemble
from rlp_jax.checkpoints_io.tables import tensors
from rlp_jax.models.cache import fork
from rlp_jax.models.transformer import LanguageModel, unstack_layers

pytestmark = pytest.mark.usefixtures("quick_compiles")
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "dense.npz"
TOLERANCE = 1e-4
families = pytest.mark.parametrize("family", list(MORE_FAMILIES))


# ------------------------------------------------------------------------------------------------------- goldens


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("key", ["rms_norm_eps", "tie_word_embeddings", "head_dim", "rope_theta"])
def test_null_is_as_absent(goldens, name, key):
    fields = json.loads(str(goldens[f"{name} config"]))
    absent = {field: value for field, value in fields.items() if field != key}
    assert config_from_json(fields | {key: None}, "here") == config_from_json(absent, "here")


@pytest.mark.parametrize("name", TINY)
def test_golden_logits_and_gradients(goldens, name, tmp_path):
    """The checkpoint is rebuilt from names alone, so that a wrong name would be missed in neither direction."""
    fields = json.loads(str(goldens[f"{name} config"]))
    config = config_from_json(fields, "config.json")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shapes = {
        tensor.name.huggingface.format(layer): tensor.stored
        for tensor in tensors(config)
        for layer in (tensor.layers or (None,))
    }
    gradients = {key.split(" ")[2]: value for key, value in goldens.items() if key.startswith(f"{name} gradient ")}
    assert shapes.keys() == gradients.keys()
    weights = {tensor: draw(tensor, shape, config.family) for tensor, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    config, params = read_directory(tmp_path)
    model, tokens_BT = LanguageModel(config), goldens["tokens"]

    def loss(params):
        logits_BTV = model.apply(params, tokens_BT)[0]
        logprob_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        return -jnp.take_along_axis(logprob_BTV, tokens_BT[:, 1:, None], -1).mean(), logits_BTV

    grads, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(params)
    wanted = goldens[f"{name} logits"]
    assert np.abs(wanted).max() > 1
    assert np.abs(logits_BTV - wanted).max() < TOLERANCE * np.abs(wanted).max()
    for tensor, _, give in disassemble(config, grads):
        gradient, (norm, along) = give().astype(np.float64), gradients[tensor]
        assert norm > 0
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=TOLERANCE, err_msg=tensor)
        # A product of two directions: its error is that of the gradient times the length of the weight.
        bound = TOLERANCE * norm * np.linalg.norm(weights[tensor])
        assert abs((gradient * weights[tensor]).sum() - along) < bound, tensor


# ------------------------------------------------------------------------------------------------------- windows


def windowed(**changes):
    """One local layer: what it can see is what its output depends on."""
    return tiny("gemma3", n_layers=1, local_layers=(0,), window=4, **changes)


def test_a_window_counts_positions_across_prefix_branch_and_new_tokens():
    """Prefix of 6 seen tokens (of 8), 3 tokens written, 5 new: query s stands at 6 + 3 + s and sees 4 tokens."""
    model = windowed()
    params = rough_params(model)
    rng = np.random.default_rng(0)
    document, written, new = (rng.integers(0, 20, (1, n)) for n in (8, 3, 5))

    def read(document, written, new):
        cache = fork(apply(model, params, document)[1], jnp.array([[6]]), 8)
        _, cache = apply(model, params, written[:, None], cache)
        return np.asarray(apply(model, params, new[:, None], cache)[0][0, 0])

    base = read(document, written, new)
    for key in range(14):
        pieces = [document.copy(), written.copy(), new.copy()]
        piece, at = (0, key) if key < 6 else (1, key - 6) if key < 9 else (2, key - 9)
        pieces[piece][0, at] = 40  # a token that no sequence has
        changed = np.abs(read(*pieces) - base).max(-1) > 0
        wanted = [key <= query < key + 4 for query in range(9, 14)]
        assert changed.tolist() == wanted, key


@pytest.mark.parametrize("local_layers", [(), (0,), (1,), (0, 1)])
def test_layers_are_local_one_by_one(local_layers):
    """Scanned and unrolled agree, for documents and for branches in two calls; and it matters which layer is local."""
    model = tiny("gemma3", local_layers=local_layers)
    params = rough_params(model)
    rng = np.random.default_rng(0)
    document, branch = rng.integers(0, 50, (2, 9)), rng.integers(0, 50, (2, 2, 5))
    results = []
    for variant, weights in ((model, params), (model.unrolled(), unstack_layers(params))):
        logits, cache = apply(variant, weights, document)
        cache = fork(cache, jnp.array([[9, 4], [2, 0]]), 5)
        first, cache = apply(variant, weights, branch[..., :3], cache)
        results.append((logits, first, apply(variant, weights, branch[..., 3:], cache)[0]))
    assert relative_error(*results) < 1e-5
    other = tiny("gemma3", local_layers={(): (0,), (0,): (1,), (1,): (0, 1), (0, 1): ()}[local_layers])
    assert relative_error(apply(other, params, document)[0], results[0][0]) > 1e-3


def test_a_window_of_the_whole_sequence_is_none():
    model = tiny("gemma3", window=9, local_rope_theta=None)
    params, tokens = rough_params(model), np.arange(9)[None]
    everything = LanguageModel(dataclasses.replace(model.config, local_layers=()))
    np.testing.assert_allclose(
        apply(model, params, tokens)[0], apply(everything, params, tokens)[0], rtol=1e-5, atol=1e-5
    )


# ----------------------------------------------------------------------------------------- sharing, numerics


@families
@pytest.mark.parametrize("several", [False, True])
def test_logprobs_and_gradients_of_shared_and_separate_sequences(family, several):
    (shared, shared_grads), (unshared, unshared_grads), length_BR = both_ways(family, "none", several)
    inside_BRL = np.arange(shared[0].shape[-1]) < length_BR[..., None]
    assert relative_error(np.where(inside_BRL, shared[0], 0), unshared[0]) < SHARING_TOLERANCE
    assert relative_error(shared[1], unshared[1]) < SHARING_TOLERANCE
    assert relative_error(shared_grads, unshared_grads) < SHARING_TOLERANCE


@families
def test_bfloat16_and_remat(family):
    model, half, again = tiny(family), tiny(family, compute_dtype="bfloat16"), tiny(family, remat="layer")
    params, tokens = rough_params(model), np.random.default_rng(0).integers(0, 50, (4, 12))
    exact = np.asarray(apply(model, params, tokens)[0])
    error = np.sqrt(np.mean((np.asarray(apply(half, params, tokens)[0]) - exact) ** 2)) / np.std(exact)
    assert 1e-4 < error < 0.06
    np.testing.assert_allclose(apply(again, params, tokens)[0], exact, rtol=1e-5, atol=1e-5)


def test_every_family_is_here():
    from rlp_jax.checkpoints_io.tables import STRUCTURE

    tested = {shape["family"] for shape in TINY.values()}
    assert tested == STRUCTURE.keys()
    assert {config.family for config in (*reference.FAMILIES.values(), *MORE_FAMILIES.values())} >= tested
