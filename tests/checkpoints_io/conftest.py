# SPDX-License-Identifier: Apache-2.0
"""A tiny model of each family with random weights, and a tiny tokenizer."""

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import LanguageModel, ModelConfig

LLAMA = ModelConfig(
    family="llama", vocab_size=280, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=4, d_ff=40,
    rope_theta=5_000.0, norm_eps=1e-5, tie_embeddings=True, max_positions=128,
)  # fmt: skip
QWEN3 = ModelConfig(
    family="qwen3", vocab_size=280, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40,
    rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, qk_norm=True, max_positions=128,
)  # fmt: skip


@pytest.fixture(params=[LLAMA, QWEN3], ids=["llama", "qwen3"])
def model(request) -> LanguageModel:
    return LanguageModel(request.param)


@pytest.fixture
def params(model):
    """Random numpy parameters, norm scales not all one."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The 256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return Tokenizer(backend, eos_ids=(257,), pad_id=258)


def assert_same_tree(left, right):
    """Bitwise equality of two parameter trees, structure and dtype included."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype == np.float32
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def same_tree():
    return assert_same_tree
