# SPDX-License-Identifier: Apache-2.0
"""The decoder against transformers: logits of a real model from goldens, live logits and gradients of tiny ones.

Errors are relative: the largest difference over the largest reference value, or a norm over a norm for gradients.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_dense import TINY, reference_model, relative_error

from rlp_jax.checkpoints_io.fetch import local_path
from rlp_jax.checkpoints_io.huggingface import read_directory, write_directory
from rlp_jax.checkpoints_io.load import load, save_hf
from rlp_jax.checkpoints_io.names import disassemble
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.cache import fork
from rlp_jax.models.presets import WEIGHTS
from rlp_jax.models.transformer import LanguageModel

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "smollm2_logits.npz"
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    """(transformers model, our model, our parameters), the latter read from what transformers saved."""
    directory = tmp_path_factory.mktemp("theirs")
    theirs = reference_model(**TINY[request.param])
    theirs.save_pretrained(directory, max_shard_size="20KB")
    config, params = read_directory(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return theirs, LanguageModel(config), params


@pytest.fixture
def tokens_BT():
    return np.random.default_rng(0).integers(0, 101, (2, 60))


def greedy(model, params, tokens_BT, length):
    """The likeliest continuation up to a length, by whole forwards of one shape."""
    argmax = jax.jit(lambda tokens: model.apply(params, tokens)[0].argmax(-1))
    filled = np.zeros((len(tokens_BT), length), np.int64)
    filled[:, : tokens_BT.shape[1]] = tokens_BT
    for t in range(tokens_BT.shape[1], length):
        filled[:, t] = argmax(filled)[:, t - 1]
    return filled


@pytest.mark.parity
def test_tiny_logits(tiny, tokens_BT):
    import torch

    theirs, model, params = tiny
    with torch.no_grad():
        reference_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
    logits_BTV, _ = model.apply(params, jnp.asarray(tokens_BT))
    assert logits_BTV.dtype == jnp.float32
    assert relative_error(logits_BTV, reference_BTV) < TOLERANCE
    assert np.abs(reference_BTV).max() > 1


@pytest.mark.parity
def test_tiny_branches(tiny):
    """Prefixes of several lengths forked from one document and continued in two calls: each as a sequence alone."""
    import torch

    theirs, model, params = tiny
    rng = np.random.default_rng(1)
    document_BT, branch_BRS = rng.integers(0, 101, (2, 30)), rng.integers(0, 101, (2, 3, 9))
    length_BR = np.array([[30, 17, 2], [5, 0, 30]])
    _, prefix = model.apply(params, jnp.asarray(document_BT))
    cache = fork(prefix, jnp.asarray(length_BR), capacity=9)
    first_BRSV, cache = model.apply(params, jnp.asarray(branch_BRS[..., :5]), cache)
    second_BRSV, _ = model.apply(params, jnp.asarray(branch_BRS[..., 5:]), cache)
    at_once_BRSV, _ = model.apply(params, jnp.asarray(branch_BRS), fork(prefix, jnp.asarray(length_BR)))
    reference_BRSV = np.empty(at_once_BRSV.shape)
    for b, r in np.ndindex(2, 3):
        sequence = np.concatenate([document_BT[b, : length_BR[b, r]], branch_BRS[b, r]])
        with torch.no_grad():
            reference_BRSV[b, r] = theirs(torch.from_numpy(sequence[None])).logits[0, -9:].numpy()
    assert relative_error(jnp.concatenate([first_BRSV, second_BRSV], 2), reference_BRSV) < TOLERANCE
    assert relative_error(at_once_BRSV, reference_BRSV) < TOLERANCE


@pytest.mark.parity
def test_tiny_gradients(tiny, tokens_BT):
    """Of the next-token loss, for every tensor, by its name in the checkpoint."""
    import torch

    theirs, model, params = tiny
    tokens = torch.from_numpy(tokens_BT)
    theirs(tokens, labels=tokens).loss.backward()
    reference = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}

    def loss(params):
        logprob_BTV = jax.nn.log_softmax(model.apply(params, jnp.asarray(tokens_BT))[0][:, :-1])
        return -jnp.take_along_axis(logprob_BTV, tokens_BT[:, 1:, None], -1).mean()

    ours = {name: read() for name, _, read in disassemble(model.config, jax.grad(loss)(params))}
    assert ours.keys() == reference.keys()
    for name, gradient in reference.items():
        assert np.linalg.norm(gradient) > 0
        assert np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient) < TOLERANCE, name


@pytest.mark.parity
def test_remat_and_bfloat16_of_the_same_weights(tiny, tokens_BT):
    """Remat changes nothing; bfloat16 is as near as transformers' own, and far from float32's accuracy."""
    import copy

    import torch

    theirs, model, params = tiny
    with torch.no_grad():
        reference_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
        half_BTV = copy.deepcopy(theirs).bfloat16()(torch.from_numpy(tokens_BT)).logits.float().numpy()

    def error(**changes):
        variant = LanguageModel(dataclasses.replace(model.config, **changes))
        return relative_error(variant.apply(params, jnp.asarray(tokens_BT))[0], reference_BTV)

    assert error(remat="layer") < TOLERANCE
    ours, peer = error(compute_dtype="bfloat16"), relative_error(half_BTV, reference_BTV)
    assert 1e-4 < ours < 2 * peer


@pytest.mark.parity
def test_transformers_reads_what_we_write(tiny, tokens_BT, tmp_path):
    import torch
    import transformers

    theirs, model, params = tiny
    write_directory(tmp_path / "ours", model.config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    assert again.dtype == torch.float32
    reference = theirs.state_dict()
    assert again.state_dict().keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        tokens = torch.from_numpy(tokens_BT)
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    start, end = 20, 34
    written = again.generate(
        tokens[:, :start], max_new_tokens=end - start, min_new_tokens=end - start, do_sample=False, pad_token_id=0
    ).numpy()
    assert np.array_equal(greedy(model, params, tokens_BT[:, :start], end), written)


@pytest.mark.parity
def test_weights_that_transformers_saved_in_half_precision(tmp_path):
    torch = pytest.importorskip("torch")
    theirs = reference_model(**TINY["qwen3-untied"])
    for dtype in (torch.bfloat16, torch.float16):
        directory = tmp_path / str(dtype)
        theirs.to(dtype).save_pretrained(directory)
        config, params = read_directory(directory)
        ours = {name: read() for name, _, read in disassemble(config, params)}
        for name, value in theirs.state_dict().items():
            assert np.array_equal(ours[name], value.float().numpy())


@pytest.fixture(scope="module")
def smollm2():
    if local_path(WEIGHTS["smollm2-135m-instruct"]) is None:
        pytest.skip("SmolLM2-135M-Instruct is not on this machine: rlp convert smollm2-135m-instruct fetches it")
    return load("smollm2-135m-instruct")


@pytest.mark.slow
def test_smollm2_logits_equal_the_goldens(smollm2):
    """Made by transformers from the same GGUF file: tests/goldens/make.py."""
    apply = jax.jit(lambda params, tokens: smollm2.model.apply(params, tokens)[0])
    with np.load(GOLDENS, allow_pickle=False) as goldens:
        prompts = sum(name.startswith("ids_") for name in goldens)
        assert prompts == 4
        for n in range(prompts):
            ids, position = goldens[f"ids_{n}"], goldens[f"position_{n}"]
            logits_PV = np.asarray(apply(smollm2.params, jnp.asarray(ids[None])))[0, position]
            top_ids = goldens[f"top_ids_{n}"]
            assert relative_error(np.take_along_axis(logits_PV, top_ids, -1), goldens[f"top_logits_{n}"]) < TOLERANCE
            assert relative_error(jax.nn.logsumexp(logits_PV, -1), goldens[f"logsumexp_{n}"]) < TOLERANCE
            # Nothing outside the stored 64 is larger than the smallest of them.
            assert np.array_equal(logits_PV.argmax(-1), top_ids[:, 0])
            np.put_along_axis(logits_PV, top_ids, -np.inf, -1)
            assert np.all(logits_PV.max(-1) <= goldens[f"top_logits_{n}"].min(-1) + 1e-3)


@pytest.mark.slow
def test_smollm2_expects_digits_apart(smollm2):
    """The model itself tells which splitting rule it was trained with: its own tokens are far more likely to it."""
    from gguf import GGUFReader

    path = local_path(WEIGHTS["smollm2-135m-instruct"])
    fields = {key: f.contents() for key, f in GGUFReader(path).fields.items() if "tokenizer" in key}
    other = Tokenizer.from_gguf(fields | {"tokenizer.ggml.pre": "gpt-2"}, str(path))
    text = "Here are three tips for staying healthy:\n\n1. Eat a balanced diet.\n\n2. Exercise.\n\n3. Sleep well."

    def cost(tokenizer) -> float:
        ids = jnp.asarray([tokenizer.encode(text)])
        logprob_TV = jax.nn.log_softmax(smollm2.model.apply(smollm2.params, ids)[0][0, :-1])
        return -float(jnp.take_along_axis(logprob_TV, ids[0, 1:, None], -1).sum())

    assert cost(smollm2.tokenizer) < cost(other) - 5  # nats


@pytest.mark.slow
@pytest.mark.parity
def test_smollm2_export_in_transformers(smollm2, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save_hf(tmp_path / "out", *smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Once upon a time, in 1842, there was a\n\n1. small model"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == smollm2.tokenizer.encode(text)
    with torch.no_grad():
        reference_BTV = theirs(ids).logits.numpy()
    logits_BTV, _ = smollm2.model.apply(smollm2.params, jnp.asarray(ids.numpy()))
    assert relative_error(logits_BTV, reference_BTV) < TOLERANCE
