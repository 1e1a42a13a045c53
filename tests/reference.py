# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and plain references that several tests compare with: whole sequences, no cache, no fork.

A test that uses them says what the fast path must equal; padding on the right is proven harmless in
models/test_transformer.py, so the sequences of a reference may share one padded batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.layers import RopeScaling
from rlp_jax.models.transformer import LanguageModel, ModelConfig, Params

FAMILIES = {
    "llama": ModelConfig(
        family="llama", vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20,
        rope_theta=100.0,
    ),
    "qwen3": ModelConfig(
        family="qwen3", vocab_size=290, d_model=16, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=4, d_ff=20,
        rope_theta=1000.0, norm_eps=1e-6, tie_embeddings=False, qk_norm=True,
    ),
}  # fmt: skip

# For the tests that are about families; each costs a compilation in every other test.
MORE_FAMILIES = {
    "qwen2": ModelConfig(
        family="qwen2", vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20,
        rope_theta=1000.0, norm_eps=1e-6, qkv_bias=True,
    ),
    "llama3": ModelConfig(
        family="llama", vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20,
        rope_theta=100.0, rope_scaling=RopeScaling("llama3", 8.0, original_positions=32),
    ),
    # The first layer sees 4 tokens, the second all.
    "gemma3": ModelConfig(
        family="gemma3_text", vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=1, head_dim=6, d_ff=20,
        rope_theta=1000.0, local_rope_theta=50.0, local_layers=(0,), window=4, query_scalar=12, norm_eps=1e-6,
        qk_norm=True, activation="gelu_tanh", norm_offset=1.0, sandwich_norms=True, scale_embeddings=True,
    ),
}  # fmt: skip

PLAIN = TemplateTokens(plain=(), context=(), open=(1,), close=(2,))
RICH = TemplateTokens(plain=(3,), context=(3, 5, 7), open=(1, 4), close=(2, 6))


def tiny(family: str = "llama", **changes) -> LanguageModel:
    """A two-layer model of a family with some fields of its config changed."""
    return LanguageModel(dataclasses.replace((FAMILIES | MORE_FAMILIES)[family], **changes))


def rough_params(model: LanguageModel, seed: int = 0) -> Params:
    """Random parameters at which everything matters: logits of unit size, attention far from uniform, uneven norms."""

    # By numpy: compiling a random generator for each shape takes longer than many a test.
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(1.0 + noise if path[-1].key == "scale" else noise, jnp.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def apply(model: LanguageModel, params: Params, tokens, cache=None):
    """`model.apply` compiled; without a cache, for whole sequences that share nothing."""
    return model.apply(params, tokens, cache)


def padded(rows: list[list[int]], width: int | None = None) -> np.ndarray:
    """Rows of different lengths as one array, 0 on the right."""
    out = np.zeros((len(rows), width or max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


class Branch:
    """One branch as a sequence of its own: context, x_<t, opening tag, thought, closing tag, targets.

    `thought` holds sampled tokens only, its closing tag included where `stopped`.
    """

    def __init__(self, template, document, position, thought, stopped, targets):
        head = [*template.context, *document[:position], *template.open]
        asked = [*head, *thought, *(() if stopped else template.close)]
        self.thought, self.targets = [int(x) for x in thought], [int(x) for x in targets]
        self.sequence = [int(x) for x in [*asked, *targets[:-1]]]
        self.thought_at = [len(head) - 1 + i for i in range(len(thought))]  # what predicts each thought token
        self.targets_at = [len(asked) - 1 + h for h in range(len(targets))]


@functools.partial(jax.jit, static_argnums=0)
def _gathered(model, params, sequence_NS, thought_at_NL, thought_NL, targets_at_NH, target_NH, temperature):
    logits_NSV = model.apply(params, sequence_NS)[0]
    row_N1 = jnp.arange(len(sequence_NS))[:, None]
    cold_NLV = jax.nn.log_softmax(logits_NSV[row_N1, thought_at_NL] / temperature)
    plain_NHV = jax.nn.log_softmax(logits_NSV[row_N1, targets_at_NH])
    return (
        jnp.take_along_axis(cold_NLV, thought_NL[..., None], -1)[..., 0],
        jnp.take_along_axis(plain_NHV, target_NH[..., None], -1)[..., 0],
    )


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model, params, arrays, temperature, weight_NL):
    return jax.grad(lambda p: (weight_NL * _gathered(model, p, *arrays, temperature)[0]).sum())(params)


def _arrays(branches: list[Branch]):
    sequence_NS = padded([branch.sequence for branch in branches], 32)  # one width: fewer shapes to compile
    names = ("thought_at", "thought", "targets_at", "targets")
    return sequence_NS, *(padded([getattr(branch, name) for branch in branches]) for name in names)


def unshared_scores(model: LanguageModel, params: Params, branches: list[Branch], temperature: float):
    """For each branch the log-probabilities of its thought's tokens (at the temperature) and of its targets (at 1),
    from one forward of its whole sequence."""
    logprob_NL, target_NH = _gathered(model, params, *_arrays(branches), temperature)
    return [(logprob_NL[i, : len(branch.thought)], target_NH[i]) for i, branch in enumerate(branches)]


def unshared_gradient(model: LanguageModel, params: Params, branches: list[Branch], temperature: float, weights):
    """Gradient of sum_i sum_u weights[i][u] log pi(thought token u of branch i)."""
    arrays = _arrays(branches)
    weight_NL = np.zeros(arrays[1].shape, np.float32)
    for i, weight_u in enumerate(weights):
        weight_NL[i, : len(weight_u)] = weight_u
    return _gradient(model, params, arrays, temperature, weight_NL)


def relative_error(got, wanted) -> float:
    """The largest, over the leaves, of |got - wanted| / |wanted|, both as Euclidean norms."""

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(error, got, wanted)))


def next_token_loss(model: LanguageModel, params: Params, template: TemplateTokens, batch, wanted_BT):
    """Mean of -log p(x_t | x_<t) over the wanted tokens, in float64 from logits; its gradient; how many they are. Each
    document is a row of its own."""
    before = np.tile(np.asarray(template.plain, np.int32), (len(batch["length_B"]), 1))
    tokens = np.concatenate([before, batch["tokens_BT"]], 1)
    counted = [(b, t) for b, t in np.argwhere(wanted_BT) if template.first <= t < batch["length_B"][b]]
    at = np.array([(b, t + len(template.plain) - 1) for b, t in counted])
    target = [batch["tokens_BT"][b, t] for b, t in counted]
    logits_nV = np.asarray(model.apply(params, tokens)[0], np.float64)[tuple(at.T)]
    top_n1 = logits_nV.max(-1, keepdims=True)
    total_n = np.log(np.exp(logits_nV - top_n1).sum(-1)) + top_n1[:, 0]
    loss = np.mean(total_n - logits_nV[np.arange(len(at)), target])

    def mean(params):
        logits_nV = model.apply(params, tokens)[0][tuple(at.T)]
        return -jax.nn.log_softmax(logits_nV)[jnp.arange(len(at)), jnp.asarray(target)].mean()

    return loss, jax.jit(jax.grad(mean))(params), len(counted)
