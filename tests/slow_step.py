# SPDX-License-Identifier: Apache-2.0
"""A tiny step that tests share, and its slow reference: loops over documents, positions and thoughts, whole unshared
sequences, equation by equation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reference import RICH, Branch, rough_params, tiny, unshared_gradient, unshared_scores

from rlp_jax import rlp
from rlp_jax.config import Config, RLPConfig
from rlp_jax.state import init_state

TEMPLATE = RICH._replace(close=(2,))
SETTINGS = RLPConfig(
    group_size=3, positions=2, horizon=2, thought_tokens=5, temperature=0.7, ema_decay=0.9, clip_low=0.1, clip_high=0.2
)
CONFIG = Config(rlp=SETTINGS)
ADAM = optax.adam(1e-2)


def small(family="llama", **changes):
    """One layer: depth is proven in models/, and compiles are most of these tests' time. The small vocabulary of the
    llama makes closing tags common."""
    return tiny(family, **{"n_layers": 1, **({"vocab_size": 16} if family == "llama" else {}), **changes})


def configure(**changes):
    return Config(rlp=RLPConfig(**{**SETTINGS.__dict__, **changes}))


def batch_of(vocab_size, length_B=(9, 7, 2, 9), T=9, seed=0):
    """Documents; the third has room for two targets once, after a BOS token, and not at all without."""
    rng = np.random.default_rng(seed)
    length_B = np.asarray(length_B, np.int32)
    tokens_BT = rng.integers(8, vocab_size, (len(length_B), T)).astype(np.int32)
    inside_BT = np.arange(T) < length_B[:, None]
    return {
        "tokens_BT": np.where(inside_BT, tokens_BT, 0),
        "length_B": length_B,
        "span_BT": inside_BT & (np.arange(T) >= 4),
        "document_B": np.arange(len(length_B)) + 50,
    }


def recorder(learning_rate=0.0):
    """Plain gradient descent that keeps the last gradient in its state, where a test can see it."""

    def update(grads, state, params=None):
        del state, params
        return jax.tree.map(lambda g: -learning_rate * g, grads), grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


@functools.cache
def steps(model, template, config, optimizer=None, learning_rate=0.0):
    """Compiled halves of a step; the learner without donation, so that a test can use a state twice."""
    optimizer = recorder(learning_rate) if optimizer is None else optimizer
    sample = jax.jit(functools.partial(rlp.sample, model, template, config))
    return optimizer, sample, jax.jit(functools.partial(rlp.learn, model, optimizer, template, config))


def prepared(family="llama", template=TEMPLATE, config=CONFIG, remat="none", **batch):
    """Model, state whose baseline is not its policy, a batch and what was sampled for it."""
    model = small(family, remat=remat)
    optimizer, sample, _ = steps(model, template, config)
    data = batch_of(model.config.vocab_size, **batch)
    state = init_state(rough_params(model), optimizer)._replace(ema_params=rough_params(model, 1))
    return model, state, data, sample(state.params, state.ema_params, data, jax.random.key(3))


# ---------------------------------------------------------------------------------------------- the reference


def branch_list(template, batch, samples, horizon):
    """Every valid (b, k, g) with its branch."""
    out = []
    for b, k, g in np.ndindex(samples.length_BKG.shape):
        if samples.valid_BK[b, k]:
            position, length = int(samples.position_BK[b, k]), int(samples.length_BKG[b, k, g])
            document = batch["tokens_BT"][b].tolist()
            thought = np.asarray(samples.thought_BKGL)[b, k, g, :length].tolist()
            targets = document[position : position + horizon]
            stopped = bool(samples.stopped_BKG[b, k, g])
            out.append(((b, k, g), Branch(template, document, position, thought, stopped, targets)))
    return out


def slow_rewards(model, params, template, batch, samples, config):
    """{(b, k, g): reward} with S_pred of the branch and S_ema as sampled."""
    found = branch_list(template, batch, samples, config.rlp.horizon)
    scored = unshared_scores(model, params, [branch for _, branch in found], 1.0)
    s_ema_BK = np.asarray(samples.s_ema_BKH).mean(-1)
    s_pred = [float(target_H.mean()) for _, target_H in scored]
    return {at: s - float(s_ema_BK[at[:2]]) for (at, _), s in zip(found, s_pred, strict=True)}


def slow_loss(model, params, old_params, reference_params, template, batch, samples, rewards, config):
    """Equation (8), with importance weights where the config caps them, as float64 loops over thoughts and tokens:
    (loss, share of clipped tokens, gradient). The slope of the loss in each token's log-probability is written out by
    hand; the unshared model carries it to the parameters."""
    settings = config.rlp
    found = branch_list(template, batch, samples, settings.horizon)
    branches = [branch for _, branch in found]
    new, old, reference = (
        [np.asarray(logprob, np.float64) for logprob, _ in unshared_scores(model, p, branches, settings.temperature)]
        for p in (params, old_params, reference_params)
    )
    loss, clipped, tokens, slopes = 0.0, 0, 0, []
    for i, (at, _) in enumerate(found):
        others = [reward for other, reward in rewards.items() if other[:2] == at[:2] and other != at]
        assert len(others) == settings.group_size - 1
        advantage = rewards[at] - sum(others) / len(others)
        slopes.append([])
        for u in range(len(new[i])):
            rho = np.exp(new[i][u] - old[i][u])
            bounded = min(max(rho, 1 - settings.clip_low), 1 + settings.clip_high)
            term, slope = rho * advantage, rho * advantage  # d rho / d log pi = rho
            if bounded * advantage < term:
                term, slope, clipped = bounded * advantage, 0.0, clipped + 1
            if settings.importance_cap:
                sampler = float(samples.logprob_BKGL[(*at, u)])
                weight = min(np.exp(old[i][u] - sampler), settings.importance_cap)
                term, slope = weight * term, weight * slope
            d = reference[i][u] - new[i][u]
            term -= settings.kl_coefficient * (np.exp(d) - d - 1)
            slope -= settings.kl_coefficient * (1 - np.exp(d))
            loss -= term / len(new[i]) / len(found)
            slopes[-1].append(-slope / len(new[i]) / len(found))
            tokens += 1
    return loss, clipped / tokens, unshared_gradient(model, params, branches, settings.temperature, slopes)
