"""Think over one text at one place, and say what each thought is worth there: what `rlp sample` shows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax import objective
from rlp_jax.config import ConfigError
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.sampling import thought_keys


class Thinking(NamedTuple):
    """G thoughts of at most L tokens at one position.

    thoughts: token lists, a sampled closing tag left out. length_G, stopped_G: as sampled, the tag counted.
    gain_G: nats a scored token against the baseline, None where the text goes no further. s_ema: the baseline's
    log-probability of the true tokens, likewise.
    """

    thoughts: list[list[int]]
    length_G: np.ndarray
    stopped_G: np.ndarray
    gain_G: np.ndarray | None
    s_ema: float | None


def think(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    tokens: list[int],
    position: int,
    template: TemplateTokens,
    key: jax.Array,
    group_size: int = 4,
    max_tokens: int = 64,
    temperature: float = 0.7,
    horizon: int = 1,
) -> Thinking:
    """Samples thoughts before token `position` of a text, and scores those tokens that follow it.

    Args:
      params, ema_params: policy and no-think baseline (the same tree for a model that is not in training).
      tokens: of the whole text, no special tokens.
      position: t; the thoughts see tokens[:t]. len(tokens) is the end of the text, where nothing can be scored.
      key: decides the thoughts.
      horizon: at most so many tokens after the thought are scored.

    Raises:
      ConfigError: a position outside the text, or a text that does not fit the model's context.
    """
    if not template.first <= position <= len(tokens):
        raise ConfigError(f"position is {position}: this text has positions {template.first} to {len(tokens)}")
    n_scored = min(horizon, len(tokens) - position)
    needed = len(template.context) + position + len(template.open) + max_tokens + len(template.close) + n_scored
    if needed > model.config.max_positions:
        raise ConfigError(
            f"text, thought and tags need {needed} tokens, the model's context holds {model.config.max_positions}: "
            "choose an earlier position or shorter thoughts"
        )
    tokens_1T = jnp.asarray([tokens[: position + n_scored]], jnp.int32)
    position_11 = jnp.full((1, 1), position, jnp.int32)
    prefix_1G = jnp.full((1, group_size), len(template.context) + position, jnp.int32)

    @jax.jit
    def sampled(params):
        _, cache = model.hidden(params, scoring.with_context(tokens_1T, template.context), stops_BK=prefix_1G[:, :1])
        keys_1G = thought_keys(key, jnp.zeros(1, jnp.int32), position_11, group_size)[:, 0]
        rollout = sample_thoughts(
            model,
            params,
            cache,
            prefix_1G,
            template.open,
            template.close,
            keys_1G,
            max_tokens,
            temperature,
            group_size=group_size,
        )
        return cache, scoring.Thoughts(rollout.thought_BRL, rollout.length_BR, rollout.stopped_BR)

    @jax.jit
    def gain(params, ema_params, cache, thoughts):
        target_11H = scoring.targets(tokens_1T, position_11, n_scored)
        plain = scoring.read_plain(model, ema_params, tokens_1T, template)
        s_ema_11H, _ = scoring.baseline_logprob(model, ema_params, plain, position_11, target_11H)
        target_1GH = jnp.repeat(target_11H, group_size, 1)
        scored = scoring.score_branches(model, params, cache, prefix_1G, thoughts, target_1GH, template, temperature)
        s_pred_G = objective.sequence_logprob(scored.target_logprob_BRH)[0]
        s_ema = objective.sequence_logprob(s_ema_11H)[0, 0]
        return objective.information_gain(s_pred_G, s_ema), s_ema

    cache, thoughts = sampled(params)
    gain_G, s_ema = gain(params, ema_params, cache, thoughts) if n_scored else (None, None)
    thought_GL, length_G, stopped_G = (np.asarray(x)[0] for x in thoughts)
    shown_G = length_G - len(template.close) * stopped_G
    return Thinking(
        [thought_GL[g, : shown_G[g]].tolist() for g in range(group_size)],
        length_G,
        stopped_G,
        None if gain_G is None else np.asarray(gain_G),
        None if s_ema is None else float(s_ema),
    )
