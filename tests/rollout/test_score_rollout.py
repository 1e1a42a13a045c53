# SPDX-License-Identifier: Apache-2.0
"""True tokens scored from the rollout's own cache, against the trainer's forward over documents and whole branches; and
a step that skips that forward, against one that does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrids import hybrid
from reference import RICH, relative_error, rough_params, tiny
from slow_step import TEMPLATE, configure, prepared, slow_rewards, small, steps

from rlp_jax import rlp
from rlp_jax.rollout import engine, scoring
from rlp_jax.rollout.sampling import thought_keys

pytestmark = pytest.mark.usefixtures("quick_compiles")

DOCUMENTS = np.array([[3, 6, 4, 0, 1, 0], [5, 5, 4, 1, 1, 1], [3, 7, 6, 6, 0, 0]], np.int32)
POSITIONS = jnp.array([[0, 6], [3, 1], [5, 2]])
G, L = 16, 9  # thoughts a position, tokens a thought
MODELS = {
    "llama": tiny("llama", vocab_size=8),
    "qwen3": tiny("qwen3", vocab_size=8),
    "gemma3": tiny("gemma3", vocab_size=8),  # a window of 4 tokens: less than a thought
    "hybrid": hybrid("M*-M*-", vocab_size=8),
    "recurrent": hybrid("M-M", vocab_size=8),  # no layer attends
}


def rollout_and_forward(model, params, template, horizon, **settings):
    """Thoughts scored in the rollout, and [log-probability, correct] by a forward that reads everything again."""
    key_BR = thought_keys(jax.random.key(0), jnp.arange(3), POSITIONS, G).reshape(3, 2 * G)
    prefix_BR = jnp.repeat(POSITIONS + len(template.context), G, 1)
    target_BRH = jnp.repeat(scoring.targets(jnp.asarray(DOCUMENTS), POSITIONS, horizon), G, 1)
    # Every other thought has a limit of its own, so that some of every length end without the tag.
    limit_BR = jnp.broadcast_to(jnp.where(jnp.arange(2 * G) % 2 == 0, 1 + jnp.arange(2 * G) // 4, L), key_BR.shape)

    @jax.jit
    def both(params):
        tokens_BT = scoring.with_context(DOCUMENTS, template.context)
        _, cache = model.hidden(params, tokens_BT, stops_BK=prefix_BR[:, ::G])
        rollout = engine.sample_thoughts(
            model, params, cache, prefix_BR, template.open, template.close, key_BR, L, 0.8, limit_BR=limit_BR,
            group_size=G, target_BRH=target_BRH, **settings,
        )  # fmt: skip
        thoughts = scoring.Thoughts(*rollout[:3])
        scored = scoring.score_branches(model, params, cache, prefix_BR, thoughts, target_BRH, template, 0.8)
        return rollout, scored.target_logprob_BRH, scored.target_correct_BRH

    return jax.tree.map(np.asarray, both(params))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("unroll", "horizon", "close"), [(False, 3, (2, 6)), (True, 1, (2,))])
def test_scores_from_the_cache_are_those_of_a_forward(name, unroll, horizon, close, monkeypatch):
    """Thoughts from one token to the cap, with the tag and without, beside each other."""
    monkeypatch.setattr(engine, "SMALLEST_RING", 4)  # the ring grows while some thoughts have ended
    params = jax.tree.map(lambda leaf: 0.5 * leaf, rough_params(MODELS[name]))
    template = RICH._replace(close=close)
    rollout, logprob, correct = rollout_and_forward(MODELS[name], params, template, horizon, unroll=unroll)
    assert min(rollout.stopped_BR.sum(), (~rollout.stopped_BR).sum()) > 2
    assert {1, 2, 3, 4, L} <= set(rollout.length_BR.flat)
    np.testing.assert_allclose(rollout.target_logprob_BRH, logprob, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(rollout.target_correct_BRH, correct)
    assert logprob[:, :G].std(1).min() > 1e-2  # thoughts matter


def test_true_tokens_need_a_slot_a_thought():
    with pytest.raises(ValueError, match="32 thoughts in 31 slots"):
        rollout_and_forward(MODELS["llama"], rough_params(MODELS["llama"]), RICH, 1, slots=31)


# ---------------------------------------------------------------------------------------------- the step


def test_a_step_without_the_forward_before_it_is_the_same():
    """Rewards of the float64 loops; then two passes of two updates, with that forward and without."""
    config = configure(minibatches=2, updates_per_batch=2)
    model, state, batch, samples = prepared(config=config)
    _, _, learn = steps(model, TEMPLATE, config, learning_rate=0.2)
    assert samples.s_pred_BKG.shape == samples.length_BKG.shape
    chex.assert_trees_all_equal(samples._replace(s_pred_BKG=None), prepared()[3])  # one minibatch: not scored
    new, metrics, scores = learn(state, batch, samples)
    rewards = slow_rewards(model, state.params, TEMPLATE, batch, samples, config)
    for at, reward in rewards.items():
        np.testing.assert_allclose(scores.reward_BKG[at], reward, rtol=1e-4, atol=1e-4)
    other, other_metrics, other_scores = learn(state, batch, samples._replace(s_pred_BKG=None))
    valid_BK = np.asarray(samples.valid_BK)
    for a, b in zip(scores[:4], other_scores[:4], strict=True):
        np.testing.assert_allclose(a[valid_BK], b[valid_BK], rtol=1e-4, atol=1e-5)
    moved, wanted = (jax.tree.map(lambda a, b: a - b, x.params, state.params) for x in (new, other))
    assert relative_error(moved, wanted) < 1e-4
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-4, atol=1e-5)
    assert 0 < metrics["logprob_gap"] < 1e-5  # the sampler is still measured against the trainer


@pytest.mark.parametrize(
    ("changes", "compute_dtype", "wanted"),
    [
        ({}, "float32", True),
        ({"minibatches": 1}, "float32", False),
        ({"slots": 6}, "float32", True),
        ({"slots": 5}, "float32", False),
        ({"rollout_dtype": "float32"}, "float32", True),
        ({"rollout_dtype": "bfloat16"}, "float32", False),
        ({}, "bfloat16", False),
        ({"importance_cap": 2.0}, "float32", False),
        ({"top_k": 4, "top_p": 0.9}, "float32", True),
    ],
)
def test_when_the_rollout_scores(changes, compute_dtype, wanted):
    config = configure(**{"minibatches": 2, **changes})  # two positions with three thoughts each
    assert rlp.scored_in_rollout(small(compute_dtype=compute_dtype), config) == wanted
