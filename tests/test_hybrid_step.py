# SPDX-License-Identifier: Apache-2.0
"""A whole RLP step, evaluation and `rlp sample` on a tiny Nemotron-H, against whole sequences that share nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hybrids import hybrid
from reference import RICH, Branch, apply, relative_error, rough_params, unshared_scores
from test_rlp import batch_of, recorder, slow_loss, slow_rewards

from rlp_jax import rlp
from rlp_jax.config import Config, EvalConfig, RLPConfig
from rlp_jax.evals.likelihood import evaluate
from rlp_jax.evals.think import Thinker
from rlp_jax.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEMPLATE = RICH._replace(close=(2,))
CONFIG = Config(rlp=RLPConfig(group_size=3, positions=2, horizon=2, thought_tokens=5, temperature=0.7))
MODEL = hybrid("M*-M*-", vocab_size=16)  # few tokens, so that closing tags are common


def test_rewards_and_gradient_of_a_step():
    optimizer, batch = recorder(), batch_of(16)
    state = init_state(rough_params(MODEL), optimizer)._replace(ema_params=rough_params(MODEL, 1))
    samples = jax.jit(functools.partial(rlp.sample, MODEL, TEMPLATE, CONFIG))(
        state.params, state.ema_params, batch, jax.random.key(3)
    )
    valid = np.asarray(samples.valid_BK)
    assert 0 < np.asarray(samples.stopped_BKG)[valid].mean() < 1 and len(np.unique(samples.position_BK)) > 3
    assert np.isfinite(samples.logprob_BKGL).all()
    learn = jax.jit(functools.partial(rlp.learn, MODEL, optimizer, TEMPLATE, CONFIG))
    new, metrics, scores = learn(state, batch, samples)
    rewards = slow_rewards(MODEL, state.params, TEMPLATE, batch, samples, CONFIG)
    for at, reward in rewards.items():
        np.testing.assert_allclose(scores.reward_BKG[at], reward, rtol=1e-4, atol=1e-4)
    p = state.params
    loss, _, grads = slow_loss(MODEL, p, p, p, TEMPLATE, batch, samples, rewards, CONFIG)
    assert min(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(grads)) > 0
    assert relative_error(new.opt_state, grads) < 1e-4
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    assert metrics["finite"] == 1.0 and metrics["logprob_gap"] < 1e-5  # the sampler says what the learner says


def test_make_step_learns():
    """The jitted halves with a real optimizer and remat: a finite update moves every leaf, and its average."""
    model = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, remat="layer"))
    optimizer, batch = optax.adam(1e-2), batch_of(16)
    step = rlp.make_step(model, optimizer, TEMPLATE, CONFIG)
    before = rough_params(model)
    state = init_state(jax.tree.map(jnp.array, before), optimizer)
    samples = step.sample(state.params, state.ema_params, batch, jax.random.key(3))
    state, metrics, _ = step.learn(state, batch, samples)
    assert metrics["finite"] == 1.0 and state.step == 1
    for new in (state.params, state.ema_params):
        assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(before), strict=True))


def greedy(params, head, limit):
    thought = []
    while len(thought) < limit and thought[-1:] != [TEMPLATE.close[0]]:
        row = np.zeros((1, 32), np.int32)
        row[0, : len(head) + len(thought)] = head + thought
        thought.append(int(np.argmax(apply(MODEL, params, row)[0][0, len(head) + len(thought) - 1])))
    return thought


def test_evaluation_and_thinking_near_temperature_0():
    """Thoughts are the likeliest continuations of whole sequences, and their worth is what those sequences say."""
    params, baseline, H, L = rough_params(MODEL), rough_params(MODEL, 1), 2, 4
    batch = batch_of(16, length_B=(9, 9))
    batch["span_BT"] = np.arange(9) == np.array([[4], [6]])
    settings = RLPConfig(horizon=H, thought_tokens=L, temperature=1e-4, position_mode="span")
    config = Config(rlp=settings, eval=EvalConfig(positions=1, group_size=2))
    result = evaluate(MODEL, params, baseline, [batch], TEMPLATE, config, jax.random.key(0))
    branches = []
    for b, position in enumerate((4, 6)):
        document = batch["tokens_BT"][b].tolist()
        thought = greedy(params, [*TEMPLATE.context, *document[:position], *TEMPLATE.open], L)
        stopped = thought[-1] == TEMPLATE.close[0]
        branches.append(Branch(TEMPLATE, document, position, thought, stopped, document[position : position + H]))
    wanted = [-float(target.mean()) for _, target in unshared_scores(MODEL, params, branches, 1.0)]
    np.testing.assert_allclose(result["ce_think"], np.mean(wanted), rtol=1e-4)
    tokens = batch["tokens_BT"][0].tolist()
    thinker = Thinker(MODEL, params, baseline, None, TEMPLATE, RLPConfig())
    thinking = thinker.think(tokens, 4, group_size=2, max_tokens=L, temperature=1e-4, horizon=H)
    shown = [token for token in branches[0].thought if token != TEMPLATE.close[0]]
    assert thinking.thoughts == [shown] * 2
    np.testing.assert_allclose(thinking.gain_G + thinking.s_ema, -wanted[0], rtol=1e-4)
