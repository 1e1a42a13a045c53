# SPDX-License-Identifier: Apache-2.0
"""What the makers of small base models share: a tokenizer of words, the first parameters, the loss and its update."""

import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
import tokenizers

from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.cache import fork
from rlp_jax.models.transformer import LanguageModel

PAD = 0


def word_tokenizer(tags: tuple[str, str], words: Sequence[str]) -> Tokenizer:
    """One token a word; the tags stand for themselves with or without spaces around them. Padding is token 0."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", *tags, *words))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", *tags])
    return Tokenizer(backend, pad_id=PAD)


def branch_logits(model: LanguageModel, params, data: dict) -> jax.Array:
    """Logits [B, R, S-1, V] over each branch, which see their document's prefix.

    A hybrid needs `stop_BK`, the prefixes' lengths without repetition.
    """
    _, cache = model.hidden(params, data["context_BT"], stops_BK=data.get("stop_BK"))
    hidden, _ = model.hidden(params, data["branch_BRS"][..., :-1], fork(cache, data["prefix_BR"]))
    return model.unembed(params, hidden)


def cross_entropy(logits, tokens, weight=None):
    """Summed over real tokens, and how many they are. Logits at s predict token s + 1 of `tokens`.

    With a weight for each token, of the shape of `tokens`, both are weighted.
    """
    mask = tokens[..., 1:] != PAD
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:])
    if weight is not None:
        return jnp.where(mask, loss * weight[..., 1:], 0).sum(), (mask * weight[..., 1:]).sum()
    return jnp.where(mask, loss, 0).sum(), mask.sum()


def first_params(model: LanguageModel, seed: int):
    """Kernels and embeddings of variance 1 / width: with the library's 0.02 a model this narrow attends to nothing for
    long. A hybrid's convolutions stay as they are."""

    def scale(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        wide = names[-1] in ("kernel", "embedding") and "conv" not in names
        return leaf * (model.config.d_model**-0.5 / 0.02 if wide else 1.0)

    return jax.tree_util.tree_map_with_path(scale, model.init(jax.random.key(seed)))


def make_update(model: LanguageModel, optimizer: optax.GradientTransformation, plain_weight: float = 1.0):
    """update(params, opt_state, data) -> (params, opt_state, (plain, thinking)): a step on the sum of two losses.

    They are nats a token of plain documents (`tokens_BT`), times their weight, and of branches (`branch_BRS`, by
    `weight_BRS` where there is one). Without branches the first is all.
    """

    def loss_fn(params, data):
        plain, n_plain = cross_entropy(model.apply(params, data["tokens_BT"])[0][:, :-1], data["tokens_BT"])
        if "branch_BRS" not in data:
            return plain / n_plain, (plain / n_plain, jnp.zeros(()))
        thinking, n_thinking = cross_entropy(
            branch_logits(model, params, data), data["branch_BRS"], data.get("weight_BRS")
        )
        return plain_weight * plain / n_plain + thinking / n_thinking, (plain / n_plain, thinking / n_thinking)

    @jax.jit
    def update(params, opt_state, data):
        (_, parts), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, data)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, change), opt_state, parts

    return update


def save(directory: pathlib.Path, model: LanguageModel, params, tokenizer: Tokenizer, dtype: str = "float32") -> None:
    """Writes a Hugging Face directory, in the place of one that is there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        save_hf(pathlib.Path(temporary) / "model", model, params, tokenizer, dtype)
        shutil.rmtree(directory, ignore_errors=True)
        (pathlib.Path(temporary) / "model").rename(directory)
