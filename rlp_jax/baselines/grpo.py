# SPDX-License-Identifier: Apache-2.0
"""What RPT and RLVR share: responses that are judged on the host, and the group-relative update from their rewards.

GRPO (DeepSeekMath, arXiv 2402.03300) on RLP's own sampler and learner. A response is what RLP calls a thought: it
follows the opening tag, holds thought and answer, and ends with `template.end`, an end-of-text token or at the cap.
`with_rewards` turns rewards into advantages and weights; the learner takes them as they are. pi_old is the trainer's
own forward, so that the ratio of a batch's first update is exactly 1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlp_jax import objective, rlp
from rlp_jax.config import Config, GRPOConfig
from rlp_jax.data.template import TemplateTokens
from rlp_jax.learner import Batch, Samples, Scores, Verdict, split_groups
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.sharding import document_shards, over
from rlp_jax.state import TrainState

ANSWER = "answer_BA"  # of a batch: for the judge alone


def with_rewards(samples: Samples, reward_BKG: np.ndarray, settings: GRPOConfig, cap: int) -> Samples:
    """Judged responses as the learner takes them: with advantages, weights, and groups that teach nothing left out.

    What is left out has weight 0 and no part in the number of groups, so the loss is the mean over the groups that are
    kept, of each the mean over its responses that count.

    Args:
      samples: numpy arrays; `stopped_BKG` False is a response that the cap cut.
      reward_BKG: of every response; only those of valid positions are looked at.
      settings: see `GRPOConfig`.
      cap: L, most tokens of a response.

    Returns:
      Samples whose verdict's tally holds, of each document: groups (judged), dropped (of them), reward (the sum of
      their mean rewards), reward_groups (how many that are), responses, ended (of them), tokens (of them),
      sampled_tokens.
    """
    valid_BK1, ended_BKG = samples.valid_BK[..., None], samples.stopped_BKG
    reward_BKG = np.where(valid_BK1, reward_BKG, 0.0).astype(np.float32)
    counted_BKG = np.broadcast_to(valid_BK1, reward_BKG.shape)
    if settings.truncated == "wrong":
        reward_BKG = np.where(ended_BKG, reward_BKG, np.float32(0.0))
    if settings.truncated == "masked":
        counted_BKG = counted_BKG & ended_BKG

    advantage = objective.group_normalised_advantage if settings.normalise else objective.group_relative_advantage
    advantage_BKG = np.asarray(advantage(reward_BKG, counted_BKG))
    weight_BKG = counted_BKG / np.maximum(counted_BKG.sum(-1, keepdims=True), 1)
    if settings.length == "constant":  # the surrogate divides by |c|
        weight_BKG = weight_BKG * samples.length_BKG / cap
    differ_BK = samples.valid_BK & np.asarray(objective.rewards_differ(reward_BKG, counted_BKG))
    kept_BK = differ_BK if settings.drop_equal else samples.valid_BK & counted_BKG.any(-1)
    tally = {
        "groups": samples.valid_BK.sum(-1),
        "dropped": (samples.valid_BK & ~differ_BK).sum(-1),
        "reward": reward_BKG.mean(-1).sum(-1),
        "reward_groups": samples.valid_BK.sum(-1),
        "responses": np.broadcast_to(valid_BK1, reward_BKG.shape).sum((1, 2)),
        "ended": (valid_BK1 & ended_BKG).sum((1, 2)),
        "tokens": np.where(valid_BK1, samples.length_BKG, 0).sum((1, 2)),
        "sampled_tokens": samples.length_BKG.sum((1, 2)),
    }
    tally = {name: value_B.astype(np.float32) for name, value_B in tally.items()}
    verdict = Verdict(reward_BKG, advantage_BKG, weight_BKG.astype(np.float32), tally)
    return samples._replace(valid_BK=kept_BK, verdict=verdict)


def with_tally(samples: Samples, tally: dict[str, np.ndarray]) -> Samples:
    return samples._replace(verdict=samples.verdict._replace(tally=tally))


def learn(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    state: TrainState,
    batch: Batch,
    samples: Samples,
    reference_params: Params | None = None,
    shards: int = 1,
) -> tuple[TrainState, dict[str, jax.Array], Scores]:
    """`rlp.learn` from a verdict.

    Returns:
      As there. The metrics describe the groups that were kept, but thought_len, stop_rate and reward_mean are of all
      that were judged (reward_mean of the first round, where there are several). Beside them groups_judged,
      groups_dropped, and whatever else the judge counted.
    """
    tally = samples.verdict.tally
    samples = with_tally(samples, {})
    state, metrics, scores = rlp.learn(
        model, optimizer, template, config, state, batch, samples, reference_params, shards
    )
    total = {name: value_B.sum().astype(jnp.float32) for name, value_B in tally.items()}
    metrics = {name: value for name, value in metrics.items() if name not in ("s_pred", "s_ema")}
    responses = jnp.maximum(total.pop("responses"), 1.0)
    metrics |= {
        "reward_mean": total.pop("reward") / jnp.maximum(total.pop("reward_groups"), 1.0),
        "groups_judged": total.pop("groups"),
        "groups_dropped": total.pop("dropped"),
        "thought_len": total.pop("tokens") / responses,
        "stop_rate": total.pop("ended") / responses,
    }
    del total["sampled_tokens"]  # the loop's own figure
    return state, metrics | total, scores


class Step:
    """A step whose samples are judged between its jitted halves; see `algorithms.Step`.

    Args:
      sample: (template, config, params, ema_params, batch, key, *more) -> Samples, traced; the template is that of
        responses, `more` is what the judge asks again with.
      judge: (batch, samples, decode, again) -> Samples, on the host.
      template: of the run.
    """

    def __init__(
        self,
        sample: Callable[..., Samples],
        judge: Callable[..., Samples],
        model: LanguageModel,
        optimizer: optax.GradientTransformation,
        template: TemplateTokens,
        config: Config,
        reference_params: Params | None,
        mesh: Mesh | None,
    ):
        template, config = response_template(template), without_scoring(config)

        def _sample(*args):
            with over(mesh):
                return sample(template, config, *args)

        def _learn(state, batch, samples, reference_params):
            given = state, batch, samples, reference_params, document_shards(mesh)
            with over(mesh):
                return learn(model, optimizer, template, config, *given)

        self.judge, self._reference_params = judge, reference_params
        self._sample, self._learn = jax.jit(_sample), jax.jit(_learn, donate_argnums=0)

    def sample(self, params, ema_params, batch, key, *more) -> Samples:
        return self._sample(params, ema_params, for_model(batch), key, *more)

    def learn(self, state, batch, samples) -> tuple[TrainState, dict[str, jax.Array], Scores]:
        return self._learn(state, for_model(batch), samples, self._reference_params)


def respond(
    model: LanguageModel,
    template: TemplateTokens,
    config: Config,
    params: Params,
    tokens_BT: jax.Array,
    position_BK: jax.Array,
    key_BKG: jax.Array,
) -> tuple[jax.Array, ...]:
    """G responses at each position, as the last four fields of `Samples`. `template` is that of responses."""
    ends_SV = jnp.zeros((2, model.config.vocab_size), jnp.int16).at[:, jnp.asarray(template.eos, int)].set(1)
    rollout = rlp.think(model, template, config, params, tokens_BT, position_BK, key_BKG, ends=ends_SV)
    return tuple(split_groups(x, config.rlp.group_size) for x in rollout[:4])


def response_template(template: TemplateTokens) -> TemplateTokens:
    """The template of a response: what ends it stands where a thought is closed."""
    return template._replace(close=template.end)


def without_scoring(config: Config) -> Config:
    """Nothing is scored after a response; one token is the least that the learner knows."""
    return dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, horizon=1))


def for_model(batch: Batch) -> Batch:
    """The batch without what only the judge reads."""
    return {name: value for name, value in batch.items() if name != ANSWER}


def response_tokens(samples: Samples, at: tuple[int, int, int]) -> list[int]:
    """The tokens of response (b, k, g), its closing included. Numpy samples."""
    return samples.thought_BKGL[at][: samples.length_BKG[at]].tolist()
