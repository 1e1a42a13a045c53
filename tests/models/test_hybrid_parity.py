# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H against transformers: goldens of a tiny random model, and live where torch is installed.

Errors are relative: the largest difference over the largest reference value, or a norm over a norm for gradients.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import apply
from safetensors.numpy import save_file
from tiny_dense import relative_error

from rlp_jax.checkpoints_io.huggingface import read_directory, write_directory
from rlp_jax.checkpoints_io.names import disassemble
from rlp_jax.models.cache import fork
from rlp_jax.models.transformer import LanguageModel

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "nemotron_h.npz"
TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------------- goldens


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS, allow_pickle=False) as file:
        return dict(file)


def published(directory, goldens, style):
    """A checkpoint with the golden weights, in the style of published ones or of transformers 5."""
    fields = json.loads(str(goldens["config"]))
    weights = {name.removeprefix("weight "): value for name, value in goldens.items() if name.startswith("weight ")}
    if style == "published":
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
        fields["hybrid_override_pattern"] = "".join(letters[kind] for kind in fields.pop("layers_block_type"))
        fields.pop("layer_types", None)
        weights = {name.replace("model.", "backbone."): value for name, value in weights.items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(weights, directory / "model.safetensors")
    config, params = read_directory(directory)
    return LanguageModel(config), params


@pytest.fixture(scope="module")
def golden_model(goldens, tmp_path_factory):
    return published(tmp_path_factory.mktemp("goldens") / "published", goldens, "published")


def test_both_styles_of_checkpoints_are_read(goldens, golden_model, tmp_path):
    model, params = published(tmp_path / "native", goldens, "native")
    assert model == golden_model[0] and model.config.hybrid.pattern == "M-*M-*M-"
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(golden_model[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_golden_logits_whole_and_decoded(goldens, golden_model):
    (model, params), tokens, prompt = golden_model, goldens["tokens"], int(goldens["prompt"])
    B, T = tokens.shape
    logits, _ = apply(model, params, tokens)
    assert np.abs(goldens["logits"]).max() > 1
    assert relative_error(logits, goldens["logits"]) < TOLERANCE
    logits, cache = apply(model, params, tokens[:, :prompt])
    decoded, cache = [logits[:, -1]], fork(cache, jnp.full((B, 1), prompt), T - prompt)
    for t in range(prompt, T):
        logits, cache = apply(model, params, tokens[:, t : t + 1], cache)
        decoded.append(logits[:, 0])
    assert relative_error(np.stack(decoded, 1), goldens["decoded"]) < TOLERANCE


def test_golden_logits_forked(goldens, golden_model):
    """Branches at several positions of one document, each continued by the document's own tokens."""
    (model, params), tokens = golden_model, goldens["tokens"]
    start_BR, S = jnp.array([[3, 11, 3], [0, 16, 8]]), 5
    forked = jax.jit(
        lambda params: model.apply(
            params, new, fork(model.apply(params, tokens, stops_BK=start_BR)[1], start_BR)
        )[0]
    )  # fmt: skip
    new = np.stack([[tokens[b, t : t + S] for t in row] for b, row in enumerate(np.asarray(start_BR))])
    wanted = np.stack([[goldens["logits"][b, t : t + S] for t in row] for b, row in enumerate(np.asarray(start_BR))])
    assert relative_error(forked(params), wanted) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------- live


VARIANTS = {
    "groups": {"n_groups": 2, "layers": "M-M*-M*", "limit": 1e-30},
    # One group, no bias, steps cut from below (in whole sequences: transformers' decoding cuts none).
    "cut": {"n_groups": 1, "layers": "*M-M-M-", "limit": 0.6, "use_conv_bias": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def live(request, tmp_path_factory):
    """(transformers model, our model, our parameters), the latter read from what transformers saved."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    variant = dict(VARIANTS[request.param])
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    config = transformers.NemotronHConfig(
        vocab_size=61, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=40,
        mamba_num_heads=6, mamba_head_dim=5, ssm_state_size=7, conv_kernel=4, chunk_size=16, layer_norm_epsilon=1e-3,
        layers_block_type=[kinds[letter] for letter in variant.pop("layers")], attn_implementation="eager",
        time_step_limit=(variant["limit"] if variant["limit"] > 0.1 else 0.0, float("inf")),
        time_step_min=variant.pop("limit"), eos_token_id=None, pad_token_id=None, **variant,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "norm" in name else 0.0))
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory, max_shard_size="20KB")
    config, params = read_directory(directory)
    return model, LanguageModel(config), params


TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40))


@pytest.mark.parity
def test_logits_and_gradients(live):
    """Of the next-token loss, for every tensor, by its name in the checkpoint."""
    import torch

    theirs, model, params = live
    tokens = torch.from_numpy(TOKENS)
    output = theirs(tokens, labels=tokens)
    output.loss.backward()
    reference = {
        name.replace("model.", "backbone."): parameter.grad.numpy() for name, parameter in theirs.named_parameters()
    }

    @jax.jit
    def ours(params):
        def loss(params):
            logits_BTV, _ = model.apply(params, TOKENS)
            logprob_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
            return -jnp.take_along_axis(logprob_BTV, TOKENS[:, 1:, None], -1).mean(), logits_BTV

        return jax.grad(loss, has_aux=True)(params)

    grads, logits_BTV = ours(params)
    assert output.logits.abs().max() > 1
    assert relative_error(logits_BTV, output.logits.detach().numpy()) < TOLERANCE
    found = {name: read() for name, _, read in disassemble(model.config, grads)}
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert np.linalg.norm(gradient) > 0
        assert np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient) < TOLERANCE, name


@pytest.mark.parity
def test_transformers_reads_what_we_write_and_says_the_same(live, tmp_path):
    import torch
    import transformers

    theirs, model, params = live
    write_directory(tmp_path / "ours", model.config, params)
    config, again = read_directory(tmp_path / "ours")
    assert config == model.config
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(loaded) is type(theirs) and loaded.dtype == torch.float32
    reference = theirs.state_dict()
    assert loaded.state_dict().keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in loaded.state_dict().items())
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    if model.config.hybrid.time_step_limit[0] > 0:
        return  # its decoding does not cut steps, so it would not say what its own prefill says
    generated = loaded.generate(
        tokens[:, :9],
        attention_mask=torch.ones(2, 9, dtype=torch.long),  # nothing is padding, token 0 neither
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    sequence = jnp.asarray(TOKENS[:, :9])
    logits, cache = apply(model, params, sequence)
    cache = fork(cache, jnp.full((2, 1), 9), 8)
    for _ in range(8):
        token = logits[:, -1:].argmax(-1)
        sequence = jnp.concatenate([sequence, token], 1)
        logits, cache = apply(model, params, token, cache)
    np.testing.assert_array_equal(sequence, generated.numpy())
