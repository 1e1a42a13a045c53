# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning with verifiable rewards: GRPO on questions whose answers a program can check.

The post-training of the paper (RLP, arXiv 2510.01265, section 4) follows SFT with it on MATH. A document is a question
up to its span; the policy responds, and a verifier compares what it says with the answer that came with the batch.
Groups that are all right or all wrong are dropped (and counted).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlp_jax.baselines import grpo
from rlp_jax.baselines.answers import Decode, last_answer
from rlp_jax.config import Config, RLVRConfig
from rlp_jax.data import reasoning_gym
from rlp_jax.data.template import TemplateTokens
from rlp_jax.evals import verify
from rlp_jax.evals.tasks import LETTERS
from rlp_jax.learner import Batch, Samples
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout.sampling import thought_keys
from rlp_jax.state import Purpose

Verify = Callable[[str, str, RLVRConfig], float]


def math(response: str, truth: str, settings: RLVRConfig) -> float:
    """Mathematics, in any spelling of the true answer: math-verify. `truth` may be a worked solution that marks its
    answer. A response has to mark its own: a number that happens to be the last of a text is no answer."""
    answer = verify.extract_math(after_thought(response, settings))
    return float(answer is not None and verify.same_answer(verify.extract_math(truth) or truth, answer))


def choice(response: str, truth: str, settings: RLVRConfig) -> float:
    """Multiple choice: the letter and nothing else."""
    letter = verify.extract_choice(after_thought(response, settings), LETTERS)
    return float(letter is not None and letter == truth.strip().strip("()").upper())


def exact(response: str, truth: str, settings: RLVRConfig) -> float:
    """The text of the last answer between its tags, but for spaces around it."""
    answer = last_answer(response, settings)
    return float(answer is not None and answer.strip() == truth.strip())


def by_reasoning_gym(response: str, truth: str, settings: RLVRConfig) -> float:
    """The scorer of the question's own dataset, from 0 to 1."""
    answer = last_answer(response, settings)
    return 0.0 if answer is None else reasoning_gym.score(answer.strip(), truth)


VERIFIERS: dict[str, Verify] = {
    "math": math,
    "choice": choice,
    "exact": exact,
    "reasoning_gym": by_reasoning_gym,
}


def check_verifier(settings: RLVRConfig) -> None:
    """Raises ConfigError where the verifier's package is missing."""
    if settings.verifier == "math":
        verify.check_installed()


def after_thought(response: str, settings: RLVRConfig) -> str:
    """What a response says after its thought; nothing where the thought is not closed."""
    return response.partition(settings.answer_after)[2] if settings.answer_after else response


def question_length(length_B: jax.Array, span_BT: jax.Array) -> jax.Array:
    """Tokens of each document before its span, [B]: all of them where it has none or starts with it."""
    first_B = jnp.argmax(span_BT, -1).astype(length_B.dtype)
    return jnp.where(first_B > 0, first_B, length_B)


def sample(
    model: LanguageModel,
    template: TemplateTokens,
    config: Config,
    params: Params,
    ema_params: Params,
    batch: Batch,
    key: jax.Array,
) -> Samples:
    """G responses to each question. `template` is that of responses."""
    del ema_params
    position_B1 = question_length(batch["length_B"], batch["span_BT"])[:, None]
    key_B1G = thought_keys(
        jax.random.fold_in(key, Purpose.THOUGHTS), batch["document_B"], position_B1, config.rlp.group_size
    )
    responses = grpo.respond(model, template, config, params, batch["tokens_BT"], position_B1, key_B1G)
    s_ema_B11 = jnp.zeros((*position_B1.shape, 1))  # the reward knows no baseline
    return Samples(position_B1, position_B1 > 0, s_ema_B11, *responses)


def judge(
    config: Config,
    verifier: Verify,
    eos: tuple[int, ...],
    batch: Batch,
    samples: Samples,
    decode: Decode,
    again: Callable[..., Samples],
) -> Samples:
    """The verifier's rewards, and what GRPO makes of them. Numpy arrays; nothing is sampled again.

    Args:
      eos: end-of-text tokens, which the verifier does not see: their spelling is no part of an answer.
    """
    del again
    reward_BKG = np.zeros(samples.length_BKG.shape, np.float32)
    for b, k, g in np.ndindex(reward_BKG.shape):
        truth = bytes(batch[grpo.ANSWER][b]).rstrip(b"\0").decode()
        tokens = grpo.response_tokens(samples, (b, k, g))
        response = decode(tokens[:-1] if tokens[-1] in eos else tokens)
        reward_BKG[b, k, g] = verifier(response, truth, config.rlvr)
    return grpo.with_rewards(samples, reward_BKG, config.rlvr, config.rlp.thought_tokens)


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    reference_params: Params | None = None,
    mesh: Mesh | None = None,
    verifier: Verify | None = None,
) -> grpo.Step:
    """See `algorithms.Step`.

    Args:
      verifier: (response, truth, settings) -> reward, any function; None: that of `rlvr.verifier`.
    """
    verifier = verifier or VERIFIERS[config.rlvr.verifier]
    return grpo.Step(
        functools.partial(sample, model), functools.partial(judge, config, verifier, template.eos), model, optimizer,
        template, config, reference_params, mesh,
    )  # fmt: skip
