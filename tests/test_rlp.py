# SPDX-License-Identifier: Apache-2.0
"""The step against a slow reference: loops over documents, positions and thoughts, whole unshared sequences, equation
by equation. And its properties: the first ratio, masks, microbatches, non-finite numbers, the moving average.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import PLAIN, Branch, apply, relative_error, rough_params, unshared_gradient, unshared_scores
from slow_step import (
    ADAM,
    CONFIG,
    TEMPLATE,
    batch_of,
    branch_list,
    configure,
    prepared,
    recorder,
    slow_loss,
    slow_rewards,
    small,
    steps,
)

from rlp_jax import learner, rlp
from rlp_jax.state import init_state

pytestmark = pytest.mark.usefixtures("quick_compiles")
# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(("mode", "template"), [("uniform", PLAIN), ("span", TEMPLATE), ("entropy", TEMPLATE)])
def test_positions_and_baseline(mode, template):
    _, state, batch, samples = prepared(template=template, config=configure(position_mode=mode))
    first = 4 if mode == "span" else template.first
    model = small()
    for b in range(4):
        possible = range(first, batch["length_B"][b] - 1)  # two targets have to fit
        valid_K = np.asarray(samples.valid_BK[b])
        assert valid_K.sum() == min(2, len(possible))
        assert set(np.asarray(samples.position_BK[b])[valid_K]) <= set(possible)
        plain = np.array([[*template.plain, *batch["tokens_BT"][b]]], np.int32)
        exact = jax.nn.log_softmax(apply(model, state.ema_params, plain)[0][0])  # phi, never theta
        for k in np.flatnonzero(valid_K):
            t = int(samples.position_BK[b, k])
            at = len(template.plain) + t + np.arange(2) - 1
            np.testing.assert_allclose(
                samples.s_ema_BKH[b, k], exact[at, batch["tokens_BT"][b, t : t + 2]], rtol=1e-4, atol=1e-5
            )
    assert samples.thought_BKGL.shape == (4, 2, 3, 5) and (samples.length_BKG >= 1).all()


def test_entropy_mode_goes_where_the_baseline_is_unsure():
    """A baseline that is certain after token 20 alone: no position that follows a 20 is chosen."""
    model, config = small("qwen3"), configure(position_mode="entropy", positions=1, horizon=1)
    params = rough_params(model)
    # Certain where the residual stream has a large first entry, which only token 20's embedding gives it.
    params["embed"]["embedding"] = params["embed"]["embedding"].at[:, 0].set(0.0).at[20, 0].set(1e3)
    params["layers"]["attention"]["o"]["kernel"] = params["layers"]["attention"]["o"]["kernel"].at[..., 0].set(0.0)
    params["layers"]["mlp"]["down"]["kernel"] = params["layers"]["mlp"]["down"]["kernel"].at[..., 0].set(0.0)
    params["head"]["kernel"] = params["head"]["kernel"].at[0].set(0.0).at[0, 33].set(50.0)
    params["final_norm"]["scale"] = jnp.ones(16)
    batch = batch_of(290, length_B=(9,) * 64)
    batch["tokens_BT"][:, ::2] = 20
    _, sample, _ = steps(model, TEMPLATE, config)
    samples = sample(params, params, batch, jax.random.key(0))
    before = np.where(samples.position_BK == 0, TEMPLATE.plain[0], 20 * (samples.position_BK % 2))
    assert samples.valid_BK.all() and not (before == 20).any()


def test_sampling_is_a_function_of_its_key_and_its_documents():
    model, state, batch, samples = prepared()
    _, sample, _ = steps(model, TEMPLATE, CONFIG)
    again = sample(state.params, state.ema_params, batch, jax.random.key(3))
    chex.assert_trees_all_equal(again, samples)
    other = sample(state.params, state.ema_params, batch, jax.random.key(4))
    assert not np.array_equal(other.thought_BKGL, samples.thought_BKGL)
    order = [3, 1, 0, 2]
    moved = sample(state.params, state.ema_params, {k: v[order] for k, v in batch.items()}, jax.random.key(3))
    for name in ("position_BK", "valid_BK", "thought_BKGL", "length_BKG", "stopped_BKG"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(samples, name)[np.array(order)])


# ---------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("family", "remat"),
    [("llama", "none"), ("qwen3", "layer"), ("qwen2", "elementwise"), ("llama3", "none"), ("gemma3", "layer")],
)
def test_loss_and_gradient_against_the_slow_reference(family, remat):
    model, state, batch, samples = prepared(family, remat=remat)
    assert samples.valid_BK.sum() == 7 and not samples.valid_BK.all()  # the short document has one position
    if family == "llama":  # thoughts of all sorts
        valid = np.asarray(samples.valid_BK)
        assert len(np.unique(samples.length_BKG[valid])) >= 4 and 0 < samples.stopped_BKG[valid].mean() < 1
    new, metrics, scores = steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)
    rewards = slow_rewards(model, state.params, TEMPLATE, batch, samples, CONFIG)
    for at, reward in rewards.items():
        np.testing.assert_allclose(scores.reward_BKG[at], reward, rtol=1e-4, atol=1e-4)
    p = state.params
    loss, _, grads = slow_loss(model, p, p, p, TEMPLATE, batch, samples, rewards, CONFIG)
    assert relative_error(new.opt_state, grads) < 2e-5
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    # Every ratio is exactly 1, so the loss is minus the mean advantage, which is nought in each group.
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.0, atol=1e-6)
    assert metrics["clip_fraction"] == 0.0 and metrics["finite"] == 1.0
    assert metrics["logprob_gap"] < 1e-5  # the sampler says the same
    np.testing.assert_allclose(metrics["reward_mean"], np.mean(list(rewards.values())), rtol=1e-4)
    valid = np.asarray(samples.valid_BK)
    np.testing.assert_allclose(metrics["thought_len"], np.asarray(samples.length_BKG)[valid].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["stop_rate"], np.asarray(samples.stopped_BKG)[valid].mean(), rtol=1e-6)
    assert metrics["positions"] == 7 and metrics["thought_tokens"] == np.asarray(samples.length_BKG)[valid].sum()


def test_positions_without_room_weigh_nothing():
    model, state, batch, samples = prepared(length_B=(9, 1, 9, 8))
    assert not samples.valid_BK[1].any()
    _, _, learn = steps(model, TEMPLATE, CONFIG)
    new, metrics, _ = learn(state, batch, samples)
    rows = np.array([0, 2, 3])
    fewer, fewer_metrics, _ = learn(
        state, {k: v[rows] for k, v in batch.items()}, jax.tree.map(lambda x: x[rows], samples)
    )
    assert relative_error(new.opt_state, fewer.opt_state) < 1e-5
    for name in ("reward_mean", "reward_std", "entropy", "s_ema", "thought_len", "positions"):
        np.testing.assert_allclose(metrics[name], fewer_metrics[name], rtol=1e-5)


@pytest.mark.parametrize(("kl_coefficient", "parts"), [(0.0, 2), (0.3, 4)])
def test_microbatches_are_memory_not_maths(kl_coefficient, parts):
    results = []
    for microbatches in (1, parts):
        config = configure(microbatches=microbatches, kl_coefficient=kl_coefficient)
        model, state, batch, samples = prepared(config=CONFIG)
        new, metrics, scores = steps(model, TEMPLATE, config)[2](state, batch, samples, rough_params(model, 2))
        results.append((new.opt_state, metrics, scores.reward_BKG))
    (whole_grads, whole, whole_reward_BKG), (grads, metrics, reward_BKG) = results
    assert relative_error(grads, whole_grads) < 1e-5
    np.testing.assert_allclose(reward_BKG, whole_reward_BKG, rtol=1e-5, atol=1e-5)
    for name in metrics.keys() - {"padding"}:  # what bins are filled with
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("updates", [1, 2])
def test_packed_bins_and_padded_parts_give_the_same_numbers(monkeypatch, updates):
    """Padded at one limit, padded at the shortest that holds each part, and packed, in one bin or several."""
    assert learner.length_limits(64) == (16, 32, 64) and learner.length_limits(2) == (2,)
    settings = dict(thought_tokens=8, positions=1, updates_per_batch=updates)
    model, state, batch, samples = prepared(config=configure(**settings))
    # Sorted: a pair at the shortest limit, and one at the longest that puts a short document beside a long one.
    length_BKG = np.array([[[8, 2, 1]], [[1, 2, 2]], [[4, 2, 3]], [[1, 1, 2]]], np.int32)
    samples = samples._replace(length_BKG=length_BKG, stopped_BKG=np.zeros_like(length_BKG, bool))
    seen, results, score_branches = [], [], learner.scoring.score_branches

    def recorded(model, params, cache, prefix_BR, thoughts, *rest):
        seen.append(thoughts.thought_BRL.shape[-1])
        return score_branches(model, params, cache, prefix_BR, thoughts, *rest)

    monkeypatch.setattr(learner.scoring, "score_branches", recorded)
    ways = [(False, (8,), 2), (False, (2, 4, 8), 2), (True, (), 4)] + [(True, (), 1)] * (updates == 1)
    for packs, limits, microbatches in ways:
        monkeypatch.setattr(learner.Learner, "packs", packs)
        monkeypatch.setattr(learner, "length_limits", lambda _, limits=limits: limits)
        config = configure(microbatches=microbatches, **settings)
        learn = jax.jit(functools.partial(rlp.learn, model, recorder(0.1), TEMPLATE, config))
        results.append(learn(state, batch, samples))
    assert set(seen) == {2, 4, 8}
    (one, one_metrics, one_scores), *others = results
    mask_BKGL = (np.arange(8) < length_BKG[..., None]) & samples.valid_BK[..., None, None]
    for two, two_metrics, two_scores in others:
        assert relative_error(two.opt_state, one.opt_state) < 1e-5
        for name in ("reward_BKG", "s_pred_BKG"):
            ours, padded = (getattr(x, name) * samples.valid_BK[..., None] for x in (two_scores, one_scores))
            np.testing.assert_allclose(ours, padded, rtol=1e-5, atol=1e-5)
        ours, padded = (x.old_logprob_BKGL * mask_BKGL for x in (two_scores, one_scores))
        chex.assert_trees_all_close(ours, padded, rtol=1e-5, atol=1e-5)
        for name in one_metrics.keys() - {"padding"}:
            np.testing.assert_allclose(two_metrics[name], one_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    padding = [float(metrics["padding"]) for _, metrics, _ in results]
    context, branch, H = len(TEMPLATE.context), len(TEMPLATE.open) + len(TEMPLATE.close), CONFIG.rlp.horizon
    valid_BK = np.asarray(samples.valid_BK)
    needed = ((samples.position_BK + context) * valid_BK).sum()
    needed += ((length_BKG + branch + H - 1) * valid_BK[..., None]).sum()
    padded = 4 * (batch["tokens_BT"].shape[1] + context) + length_BKG.size * (8 + branch + H - 1)
    np.testing.assert_allclose(padding[0], 1 - needed / padded, rtol=1e-5)
    assert 0 < padding[1] < padding[0] < 1  # the bins of the tiny case are one block each


def closing_case():
    """Two documents with one position; thoughts of two tokens, closed by the sampler or by the scorer."""
    model, template = small("qwen3"), TEMPLATE
    settings = dict(positions=1, horizon=1)
    sampled, capped = configure(thought_tokens=3, **settings), configure(thought_tokens=2, **settings)
    batch = batch_of(290, length_B=(9, 9))
    state = init_state(rough_params(model), recorder())
    thought_BKGL = np.random.default_rng(0).integers(8, 290, (2, 1, 3, 3)).astype(np.int32)
    thought_BKGL[..., 2] = 2

    def samples(length, stopped):
        shape = (2, 1, 3)
        return rlp.Samples(
            np.array([[4], [6]], np.int32), np.ones((2, 1), bool), np.full((2, 1, 1), -3.0, np.float32),
            thought_BKGL[..., :length], np.full(shape, length, np.int32), np.full(shape, stopped),
            np.zeros((*shape, length), np.float32),
        )  # fmt: skip

    return model, template, state, batch, (sampled, samples(3, True)), (capped, samples(2, False))


def test_a_sampled_closing_tag_learns_and_an_appended_one_does_not():
    """Both read the same sequences and earn the same rewards; they differ by the closing tag's own gradient."""
    model, template, state, batch, (sampled, samples_3), (capped, samples_2) = closing_case()
    new_3, _, scores_3 = steps(model, template, sampled)[2](state, batch, samples_3)
    new_2, _, scores_2 = steps(model, template, capped)[2](state, batch, samples_2)
    np.testing.assert_allclose(scores_3.reward_BKG, scores_2.reward_BKG, rtol=1e-5, atol=1e-5)
    branches = [branch for _, branch in branch_list(template, batch, samples_3, 1)]
    advantage = np.asarray(scores_3.advantage_BKG).reshape(-1)

    # -1/(B G) sum of A log pi(closing tag), the third token
    closing = unshared_gradient(model, state.params, branches, 0.7, [[0, 0, -a / 6] for a in advantage])
    assert optax.tree.norm(closing) > 1e-2
    difference = jax.tree.map(lambda three, two: 3 * three - 2 * two, new_3.opt_state, new_2.opt_state)
    assert relative_error(difference, closing) < 1e-4


def test_kl_to_the_reference():
    config = configure(kl_coefficient=0.3)
    model, state, batch, samples = prepared()
    without, _, _ = steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)
    learn = steps(model, TEMPLATE, config)[2]
    at_start, metrics, _ = learn(state, batch, samples, state.params)
    assert 0 <= metrics["kl"] < 1e-12  # neither value nor gradient where policy and reference agree
    assert relative_error(at_start.opt_state, without.opt_state) < 1e-5
    reference = rough_params(model, 2)
    new, metrics, _ = learn(state, batch, samples, reference)
    assert metrics["kl"] > 0.1
    rewards = slow_rewards(model, state.params, TEMPLATE, batch, samples, config)
    loss, _, grads = slow_loss(model, state.params, state.params, reference, TEMPLATE, batch, samples, rewards, config)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], 0.3 * metrics["kl"], rtol=1e-4)
    assert relative_error(new.opt_state, grads) < 2e-5


def test_the_baseline_changes_rewards_and_nothing_else():
    model, state, batch, samples = prepared()
    _, sample, learn = steps(model, TEMPLATE, CONFIG)
    other = sample(state.params, rough_params(model, 7), batch, jax.random.key(3))
    np.testing.assert_array_equal(other.thought_BKGL, samples.thought_BKGL)
    assert np.abs(other.s_ema_BKH - samples.s_ema_BKH).max() > 0.1
    new, _, scores = learn(state, batch, samples)
    other_new, _, other_scores = learn(state, batch, other)
    shift_BKG = other_scores.reward_BKG - scores.reward_BKG
    wanted_BK = (samples.s_ema_BKH - other.s_ema_BKH).mean(-1)
    np.testing.assert_allclose(shift_BKG, np.repeat(wanted_BK[..., None], 3, -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other_scores.advantage_BKG, scores.advantage_BKG, rtol=1e-4, atol=1e-5)
    assert relative_error(other_new.opt_state, new.opt_state) < 1e-5


def test_a_likelihood_reward_without_baseline_gives_the_same_update():
    """S_ema is one number for all thoughts of a position: it shifts their rewards and cancels in the advantage."""
    model, state, batch, samples = prepared()
    new, metrics, scores = steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)
    other, other_metrics, other_scores = steps(model, TEMPLATE, configure(reward="likelihood"))[2](
        state, batch, samples
    )
    valid_BK = np.asarray(samples.valid_BK)
    np.testing.assert_array_equal(other_scores.reward_BKG[valid_BK], scores.s_pred_BKG[valid_BK])
    shift_BKG = scores.s_pred_BKG - scores.s_ema_BK[..., None]
    np.testing.assert_array_equal(scores.reward_BKG[valid_BK], shift_BKG[valid_BK])
    np.testing.assert_allclose(other_metrics["reward_mean"], metrics["s_pred"], rtol=1e-6)
    assert abs(metrics["reward_mean"] - other_metrics["reward_mean"]) > 0.1
    # What remains is the rounding of a mean of other numbers.
    np.testing.assert_allclose(other_scores.advantage_BKG, scores.advantage_BKG, rtol=1e-5, atol=2e-6)
    assert relative_error(other.opt_state, new.opt_state) < 1e-6


def test_normalised_advantages_have_a_standard_deviation_of_one():
    model, state, batch, samples = prepared()
    _, _, scores = steps(model, TEMPLATE, configure(normalise=True))[2](state, batch, samples)
    valid_BK = np.asarray(samples.valid_BK)
    reward_NG, advantage_NG = (np.asarray(x, np.float64)[valid_BK] for x in (scores.reward_BKG, scores.advantage_BKG))
    centred_NG = reward_NG - reward_NG.mean(-1, keepdims=True)
    assert reward_NG.std(-1).min() > 1e-3 and abs(reward_NG.std(-1).max() - 1) > 0.1
    np.testing.assert_allclose(advantage_NG, centred_NG / reward_NG.std(-1, keepdims=True), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["params", "reward", "one microbatch", "gradient"])
def test_what_is_not_finite_changes_nothing_but_the_step_counter(where, monkeypatch):
    config = configure(microbatches=2) if where == "one microbatch" else CONFIG
    model, state, batch, samples = prepared()
    optimizer = ADAM
    if where == "gradient":  # alone, of one leaf
        optimizer, gradient = optax.adam(1e-2), rlp.Learner.gradient  # compiled anew

        def infinite(*args):
            grads, metrics, scores = gradient(*args)
            return grads | {"final_norm": {"scale": grads["final_norm"]["scale"].at[0].set(jnp.inf)}}, metrics, scores

        monkeypatch.setattr(rlp.Learner, "gradient", infinite)
    learn = steps(model, TEMPLATE, config, optimizer)[2]
    state = init_state(state.params, optimizer)._replace(ema_params=state.ema_params, step=jnp.int32(6))
    if where == "params":
        scale = state.params["final_norm"]["scale"].at[3].set(jnp.nan)
        state = state._replace(params=state.params | {"final_norm": {"scale": scale}})
    elif where != "gradient":
        samples = samples._replace(s_ema_BKH=samples.s_ema_BKH.at[3, 0, 0].set(-jnp.inf))
    new, metrics, _ = learn(state, batch, samples)
    assert metrics["finite"] == 0.0 and new.step == 7
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    for a, b in zip(jax.tree.leaves(new._replace(step=state.step)), jax.tree.leaves(state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_update_moves_parameters_then_the_average():
    model, state, batch, samples = prepared()
    optimizer = ADAM
    learn = steps(model, TEMPLATE, CONFIG, optimizer)[2]
    state = init_state(state.params, optimizer)._replace(ema_params=state.ema_params)
    new, metrics, _ = learn(state, batch, samples)
    assert metrics["finite"] == 1.0 and new.step == 1
    assert relative_error(new.params, state.params) > 1e-3
    wanted = jax.tree.map(lambda ema, param: 0.9 * ema + 0.1 * param, state.ema_params, new.params)  # tau of CONFIG
    chex.assert_trees_all_close(new.ema_params, wanted, rtol=1e-5, atol=1e-6)


def test_a_step_donates_its_state_and_asks_for_what_it_needs():
    model, state, batch, samples = prepared()
    step = rlp.make_step(model, recorder(), TEMPLATE, CONFIG)
    chex.assert_trees_all_equal(step.sample(state.params, state.ema_params, batch, jax.random.key(3)), samples)
    again = jax.tree.map(jnp.copy, state)
    new, _, _ = step.learn(again, batch, samples)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((again.params, again.ema_params)))
    assert relative_error(new.opt_state, steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)[0].opt_state) < 1e-6
    with pytest.raises(ValueError, match="reference_params"):
        rlp.make_step(model, recorder(), TEMPLATE, configure(kl_coefficient=0.1))


def test_bfloat16_compute_gives_nearly_the_same_step():
    model, state, batch, samples = prepared()
    half = small(compute_dtype="bfloat16")
    new, _, scores = steps(model, TEMPLATE, CONFIG)[2](state, batch, samples)
    half_new, half_metrics, half_scores = steps(half, TEMPLATE, CONFIG)[2](state, batch, samples)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((half_new, half_metrics, half_scores)))
    # Logits are off by a few percent of their spread of 1.5 (models/test_transformer.py), rewards by as much in nats.
    assert np.abs(half_scores.reward_BKG - scores.reward_BKG).max() < 0.3
    assert {leaf.dtype for leaf in jax.tree.leaves((half_new.params, half_new.opt_state))} == {jnp.dtype("float32")}
    a, b = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(s.opt_state)]) for s in (half_new, new))
    assert jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)) > 0.98
    # Sampled by the bfloat16 model itself, the gap between sampler and trainer is that of two orders of summation.
    own = steps(half, TEMPLATE, CONFIG)[1](state.params, state.ema_params, batch, jax.random.key(3))
    assert 0 < steps(half, TEMPLATE, CONFIG)[2](state, batch, own)[1]["logprob_gap"] < 0.05
    assert half_metrics["clip_fraction"] == 0.0  # the ratio is 1 all the same: pi_old is the trainer's own


def test_thoughts_that_help_become_likelier():
    """One-token thoughts are a bandit: the reward of every arm is known by scoring all of them. Their expected reward
    under the policy, at the predictor of the start, must rise: only what the policy learned can do that."""
    model, template = small("llama", vocab_size=12), PLAIN._replace(open=(1,), close=(2,))
    config = configure(positions=1, horizon=1, thought_tokens=1, group_size=16, temperature=1.0, position_mode="span")
    batch = batch_of(12, length_B=(5, 5, 5, 5), T=5)
    optimizer = optax.adam(3e-3)
    start = rough_params(model)
    state = init_state(start, optimizer)
    position = np.array([3, 2, 1, 3])

    def arms(b):
        document, t = batch["tokens_BT"][b].tolist(), int(position[b])
        return [Branch(template, document, t, [c], c == 2, [document[t]]) for c in range(12)]

    everything = [branch for b in range(4) for branch in arms(b)]

    worth = [float(target[0]) for _, target in unshared_scores(model, start, everything, 1.0)]

    def expected(params):
        chance = [float(jnp.exp(thought[0])) for thought, _ in unshared_scores(model, params, everything, 1.0)]
        assert sum(chance) == pytest.approx(4)
        return np.dot(chance, worth) / 4

    batch["span_BT"] = np.arange(5) == position[:, None]
    _, sample, learn = steps(model, template, config, optimizer)
    before, rewards = expected(state.params), []
    best = np.reshape(worth, (4, 12)).max(1).mean()
    for n in range(30):
        samples = sample(state.params, state.ema_params, batch, jax.random.key(n))
        state, metrics, _ = learn(state, batch, samples)
        rewards.append(float(metrics["reward_mean"]))
    after = expected(state.params)
    assert after > before + 0.3 * (best - before)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
