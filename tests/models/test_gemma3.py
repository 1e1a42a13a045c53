# SPDX-License-Identifier: Apache-2.0
"""Gemma-3-270M, the real one: goldens of transformers from the same GGUF file, and its export read by transformers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.checkpoints_io.fetch import local_path
from rlp_jax.checkpoints_io.load import load, save_hf
from rlp_jax.models.presets import CONFIGS, WEIGHTS

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "gemma3_logits.npz"
TOLERANCE = 1e-4
pytestmark = pytest.mark.slow  # reading it alone takes half a minute of a core, and 2 GB


@pytest.fixture(scope="module")
def gemma3():
    if local_path(WEIGHTS["gemma3-270m"]) is None:
        pytest.skip("Gemma-3-270M is not on this machine: rlp convert gemma3-270m fetches it")
    return load("gemma3-270m")


def relative_error(ours, reference) -> float:
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def test_the_file_holds_the_published_shape(gemma3):
    assert gemma3.model.config == CONFIGS["gemma3-270m"]
    assert sum(leaf.size for leaf in jax.tree.leaves(gemma3.params)) == 268_098_176


def test_logits_equal_the_goldens(gemma3):
    """The last prompt is longer than the window of 512 tokens."""
    model, params, tokenizer = gemma3
    with np.load(GOLDENS, allow_pickle=False) as goldens:
        longest = max(len(goldens[f"ids_{n}"]) for n in range(3))
        assert longest > model.config.window + 32

        @jax.jit
        def logits_at(params, tokens, position_P):
            hidden, _ = model.hidden(params, tokens)
            return model.unembed(params, hidden[0, position_P])

        for n in range(3):
            ids, position_P = goldens[f"ids_{n}"], goldens[f"position_{n}"]
            assert ids[0] == tokenizer.bos_id
            logits_PV = np.array(logits_at(params, jnp.asarray(ids[None]), jnp.asarray(position_P)))
            top_ids = goldens[f"top_ids_{n}"]
            assert relative_error(np.take_along_axis(logits_PV, top_ids, -1), goldens[f"top_logits_{n}"]) < TOLERANCE
            assert relative_error(jax.nn.logsumexp(logits_PV, -1), goldens[f"logsumexp_{n}"]) < TOLERANCE
            assert np.array_equal(logits_PV.argmax(-1), top_ids[:, 0])
            np.put_along_axis(logits_PV, top_ids, -np.inf, -1)
            assert np.all(logits_PV.max(-1) <= goldens[f"top_logits_{n}"].min(-1) + 1e-3)


def greedy(model, params, ids, length):
    argmax = jax.jit(lambda params, tokens: model.hidden(params, tokens)[0][0])
    filled = np.zeros(length, np.int64)
    filled[: len(ids)] = ids
    for t in range(len(ids), length):
        hidden = argmax(params, filled[None])
        filled[t] = int(model.unembed(params, hidden[t - 1]).argmax())
    return filled.tolist()


@pytest.mark.parity
def test_transformers_reads_the_export_and_writes_the_same_text(gemma3, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = "Natalia sold clips to 48 of her friends in April,\n\nand then"
    ids = [gemma3.tokenizer.bos_id, *gemma3.tokenizer.encode(text)]
    ours = greedy(gemma3.model, gemma3.params, ids, len(ids) + 12)
    logits_TV = np.asarray(gemma3.model.apply(gemma3.params, jnp.asarray([ids]))[0][0])
    save_hf(tmp_path / "out", *gemma3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer(text, return_tensors="pt")
    assert asked.input_ids[0].tolist() == ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert relative_error(logits_TV, theirs(asked.input_ids).logits[0].numpy()) < TOLERANCE
    written = theirs.generate(**asked, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert written[0].tolist() == ours
