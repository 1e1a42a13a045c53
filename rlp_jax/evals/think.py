# SPDX-License-Identifier: Apache-2.0
"""Think over one text at one place, and say what each thought is worth there: `rlp sample` and `rlp_jax.sample`.

Programs are compiled for padded lengths and kept, so that another text, place, cap or temperature of about the same
size uses them again.
"""

import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax import objective
from rlp_jax.checkpoint import load_run
from rlp_jax.checkpoints_io.load import load
from rlp_jax.config import Config, ConfigError, RLPConfig
from rlp_jax.data.template import TemplateTokens, template_tokens
from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts
from rlp_jax.rollout.sampling import thought_keys
from rlp_jax.settings import experiment_of, is_run

SMALLEST = 32  # tokens that a program has room for; each size is twice the one before
MOST_TOKENS = 256  # of a thought, where nobody says


class Thinking(NamedTuple):
    """G thoughts of at most L tokens at one position, and the H tokens after it.

    Attributes:
      tokens: of the text; position: t.
      target: the H true tokens from t on, none at the end of the text.
      thoughts: token lists, a sampled closing tag left out. length_G, stopped_G: as sampled, the tag counted.
      gain_G: nats a scored token against the baseline, None where nothing is scored. gain_GH: of each true token.
      s_ema: the baseline's mean log-probability of the true tokens, likewise.
      log_ratio_GL: log pi(token) minus the baseline's, given the same thought so far, at temperature 1: what training
        made of each of the thought's tokens. 0 of a model that was not trained here; nothing past length_G.
    """

    tokens: list[int]
    position: int
    target: list[int]
    thoughts: list[list[int]]
    length_G: np.ndarray
    stopped_G: np.ndarray
    gain_G: np.ndarray | None
    gain_GH: np.ndarray | None
    s_ema: float | None
    log_ratio_GL: np.ndarray


class Thinker(NamedTuple):
    """A model that can be asked to think.

    Attributes:
      params, ema_params: policy and no-think baseline, the same tree for a model that is not in training.
      template: how thoughts are framed.
      rlp: where temperature, horizon and cap come from, if nobody says.
    """

    model: LanguageModel
    params: Params
    ema_params: Params
    tokenizer: Tokenizer
    template: TemplateTokens
    rlp: RLPConfig

    def think(
        self,
        text: str | list[int],
        position: int | None = None,
        group_size: int = 4,
        max_tokens: int | None = None,
        temperature: float | None = None,
        horizon: int | None = None,
        seed: int = 0,
    ) -> Thinking:
        """Samples thoughts before token `position` of a text, and scores those tokens that follow it.

        Args:
          text: or its tokens, no special ones among them.
          position: t; the thoughts see the tokens before it. None: the end of the text, where nothing can be scored.
          group_size: G.
          max_tokens: L; None: the settings', at most 256.
          temperature: None: the settings'.
          horizon: at most so many tokens after the thought are scored; None: the settings'.
          seed: decides the thoughts.

        Raises:
          ConfigError: a number out of its range, or a text that does not fit the model's context.
        """
        tokens = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        position = len(tokens) if position is None else position
        max_tokens = min(self.rlp.thought_tokens, MOST_TOKENS) if max_tokens is None else max_tokens
        temperature = self.rlp.temperature if temperature is None else temperature
        horizon = self.rlp.horizon if horizon is None else horizon
        for name, value in (("thoughts", group_size), ("tokens", max_tokens), ("horizon", horizon)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be positive")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigError(f"temperature is {temperature}: it must be positive and finite")
        if not self.template.first <= position <= len(tokens):
            raise ConfigError(f"position is {position}: this text has positions {self.template.first} to {len(tokens)}")
        target = tokens[position : position + horizon]
        self._check_room(position + len(target), max_tokens)
        tokens_1T = _padded(tokens[: position + len(target)])
        thoughts, scores = _think(
            self.params, self.ema_params, tokens_1T, jnp.full((1, 1), position, jnp.int32), jax.random.key(seed),
            jnp.float32(temperature), jnp.int32(max_tokens), jnp.int32(len(target)),
            model=self.model, template=self.template, group_size=group_size, room=_bucket(max_tokens),
            H=horizon if target else 0, trained=self.params is not self.ema_params,
        )  # fmt: skip
        thought_GL, length_G, stopped_G = (np.asarray(x)[0] for x in thoughts)
        shown_G = length_G - len(self.template.close) * stopped_G
        scored = {name: np.asarray(value) for name, value in scores.items()}
        return Thinking(
            tokens,
            position,
            target,
            [thought_GL[g, : shown_G[g]].tolist() for g in range(group_size)],
            length_G,
            stopped_G,
            scored.get("gain_G"),
            scored["gain_GH"][:, : len(target)] if target else None,
            float(scored["s_ema"]) if target else None,
            scored["log_ratio_GL"],
        )

    def _check_room(self, text_tokens: int, max_tokens: int) -> None:
        template = self.template
        around = len(template.context) + len(template.open) + len(template.close)
        needed, room = around + text_tokens + max_tokens, self.model.config.max_positions
        if needed > room:
            raise ConfigError(
                f"text, thought and tags need {needed} tokens, the model's context holds {room}: "
                "choose an earlier position or shorter thoughts"
            )


def open_thinker(source: str | os.PathLike | tuple, config: Config | None = None) -> Thinker:
    """A model with what it needs to think.

    Args:
      source: preset, Hugging Face directory, GGUF file or run directory; or (model, params, tokenizer).
      config: its template, temperature, horizon and cap. None: a run's own, or those of the experiment that trains this
        model, or the defaults.

    Raises:
      ValueError: a model that cannot be loaded, or a template that its tokenizer cannot encode.
    """
    if isinstance(source, tuple):
        model, params, tokenizer = source
        ema_params, own = params, None
    elif is_run(source):
        run = load_run(source)
        model, params, ema_params, tokenizer, own = run.model, run.params, run.ema_params, run.tokenizer, run.config
    else:
        model, params, tokenizer = load(source)
        ema_params, own = params, None if config else experiment_of(os.fspath(source))
    config = config or own or Config()
    return Thinker(model, params, ema_params, tokenizer, template_tokens(config.template, tokenizer), config.rlp)


@functools.partial(jax.jit, static_argnames=("model", "template", "group_size", "room", "H", "trained"))
def _think(
    params, ema_params, tokens_1T, position_11, key, temperature, max_tokens, n_scored,
    *, model, template, group_size, room, H, trained
):  # fmt: skip
    """Thoughts [1, G, L] and their scores; L is `room`, and no thought is longer than `max_tokens`. Of H tokens the
    first `n_scored` are the text's."""
    prefix_1G = jnp.repeat(len(template.context) + position_11, group_size, 1)
    read_1T = scoring.with_context(tokens_1T, template.context)

    def prefill(params):
        return model.hidden(params, read_1T, stops_BK=prefix_1G[:, :1])[1]

    cache = prefill(params)
    keys_1G = thought_keys(key, jnp.zeros(1, jnp.int32), position_11, group_size)[:, 0]
    rollout = sample_thoughts(
        model, params, cache, prefix_1G, template.open, template.close, keys_1G, room, temperature,
        group_size=group_size, limit_BR=jnp.broadcast_to(max_tokens, prefix_1G.shape),
    )  # fmt: skip
    thoughts = scoring.Thoughts(rollout.thought_BRL, rollout.length_BR, rollout.stopped_BR)
    target_11H = scoring.targets(tokens_1T, position_11, max(H, 1))
    target_1GH = jnp.repeat(target_11H, group_size, 1)

    def scored(params, cache):
        return scoring.score_branches(model, params, cache, prefix_1G, thoughts, target_1GH, template, 1.0)

    policy = scored(params, cache)
    average = scored(ema_params, prefill(ema_params)) if trained else policy
    scores = {"log_ratio_GL": (policy.logprob_BRL - average.logprob_BRL)[0]}
    if H:
        plain = scoring.read_plain(model, ema_params, tokens_1T, template)
        s_ema_11H, _ = scoring.baseline_logprob(model, ema_params, plain, position_11, target_11H)
        mask_H = jnp.arange(H) < n_scored
        s_pred_G, s_ema = (
            objective.sequence_logprob(x[0], jnp.broadcast_to(mask_H, x[0].shape))
            for x in (policy.target_logprob_BRH, s_ema_11H)
        )
        scores |= {
            "gain_G": objective.information_gain(s_pred_G, s_ema[0]),
            "gain_GH": policy.target_logprob_BRH[0] - s_ema_11H[0],
            "s_ema": s_ema[0],
        }
    return thoughts, scores


def _bucket(n: int) -> int:
    return max(SMALLEST, 1 << (n - 1).bit_length())


def _padded(tokens: list[int]) -> np.ndarray:
    """[1, T], right-padded: causality keeps padding out."""
    return np.asarray([tokens + [0] * (_bucket(len(tokens)) - len(tokens))], np.int32)
