# SPDX-License-Identifier: Apache-2.0
"""Reinforcement pre-training, RLP's rival: think, predict the next token in a box, and be right or wrong.

"Reinforcement Pre-Training", arXiv 2506.08007. The reward is 1 if the predicted bytes are an exact prefix of the true
continuation and end where one of its tokens ends, else 0 (section 3). Positions are those where a proxy model is
unsure of the next token. Where it departs from the paper:
- The paper chooses positions once, before training. Here they are drawn from a step's documents as they come, so that
  RPT sees the same documents in the same order as its rivals; the proxy is the policy's moving average or a model that
  stays as it is.
- Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) draws further positions of the same documents in place of those
  whose responses are all right or all wrong: so a step remains a function of its batch and key. A document that has
  no such position left keeps its place empty.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlp_jax.baselines import grpo
from rlp_jax.baselines.answers import Decode, first_answer
from rlp_jax.checkpoints_io.leaves import Target
from rlp_jax.checkpoints_io.load import open_model
from rlp_jax.config import Config, ConfigError
from rlp_jax.data.positions import candidates, choose_positions
from rlp_jax.data.template import TemplateTokens
from rlp_jax.learner import Batch, Samples
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import chunk_tokens
from rlp_jax.rollout import scoring
from rlp_jax.rollout.sampling import thought_keys
from rlp_jax.state import Purpose


def prefix_reward(prediction: str, rest: bytes, ends: frozenset[int]) -> float:
    """1.0 if the prediction's bytes are a prefix of the true continuation's and end where one of its tokens does, else
    0.0: the prefix matching reward (arXiv 2506.08007, section 3).

    Args:
      prediction: spaces count.
      rest: the continuation's bytes.
      ends: after how many of them its tokens end.
    """
    predicted = prediction.encode()
    return float(rest.startswith(predicted) and len(predicted) in ends)


def continuation(tokens: list[int], position: int, decode: Decode) -> bytes:
    """The bytes of a document from token `position` on, as they stand in its text; none where that token begins inside
    a character."""
    before, whole = decode(tokens[:position]), decode(tokens)
    return whole[len(before) :].encode() if whole.startswith(before) else b""


def token_ends(tokens: list[int], position: int, decode: Decode, longest: int) -> frozenset[int]:
    """After how many bytes of the continuation its tokens end, at least as far as `longest` bytes. A token that ends
    inside a character is left out: no text ends there."""
    start, whole, ends = len(decode(tokens[:position]).encode()), decode(tokens), set()
    for stop in range(position + 1, len(tokens) + 1):
        text = decode(tokens[:stop])
        if whole.startswith(text):
            ends.add(len(text.encode()) - start)
            if len(text.encode()) - start >= longest:
                break
    return frozenset(ends)


def top_entropy(model: LanguageModel, params: Params, hidden_BTD: jax.Array, top: int) -> jax.Array:
    """Entropy in nats of the next-token distribution among its `top` likeliest tokens, [B, T].

    Logits are held for some tokens of every document at a time.
    """
    unembed, top = model.unembedding(params), min(top, model.config.vocab_size)

    def of_place(hidden_BD):
        logprob_Bn = jax.nn.log_softmax(jax.lax.top_k(unembed(hidden_BD), top)[0])
        return -jnp.sum(jnp.exp(logprob_Bn) * logprob_Bn, -1)

    B, T, _ = hidden_BTD.shape
    places = min(T, max(1, chunk_tokens(model.config.vocab_size) // B))
    return jax.lax.map(of_place, hidden_BTD.swapaxes(0, 1), batch_size=places).T


def sample(
    model: LanguageModel,
    proxy: LanguageModel,
    template: TemplateTokens,
    config: Config,
    params: Params,
    proxy_params: Params,
    batch: Batch,
    key: jax.Array,
    tried_BT: jax.Array,
) -> Samples:
    """Positions where the proxy is unsure, and G responses at each.

    Args:
      template: of responses.
      tried_BT: bool, positions that are not to be chosen again. The draw goes on where the one without them stopped:
        one key chooses without replacement, however many rounds there are.
    """
    rlp, settings, tokens_BT = config.rlp, config.rpt, batch["tokens_BT"]
    plain = scoring.read_plain(proxy, proxy_params, tokens_BT, template)
    entropy_BT = top_entropy(proxy, proxy_params, plain.hidden_BTD, settings.entropy_top)
    candidate_BT = candidates(batch["length_B"], batch["span_BT"], template.first, 1, rlp.position_mode)
    candidate_BT &= (entropy_BT > settings.entropy_threshold) & ~tried_BT
    position_BK, valid_BK = choose_positions(
        jax.random.fold_in(key, Purpose.POSITIONS), batch["document_B"], candidate_BT, None, rlp.positions
    )
    key_BKG = thought_keys(jax.random.fold_in(key, Purpose.THOUGHTS), batch["document_B"], position_BK, rlp.group_size)
    s_ema_BKH = jnp.zeros((*position_BK.shape, 1))  # the reward knows no baseline
    responses = grpo.respond(model, template, config, params, tokens_BT, position_BK, key_BKG)
    return Samples(position_BK, valid_BK, s_ema_BKH, *responses)


def judge_round(config: Config, batch: Batch, samples: Samples, decode: Decode) -> Samples:
    """Responses cut where their answer is closed, with the rewards of their predictions. Numpy arrays."""
    length_BKG, stopped_BKG = samples.length_BKG.copy(), samples.stopped_BKG.copy()
    reward_BKG = np.zeros(length_BKG.shape, np.float32)
    for b, k in np.argwhere(samples.valid_BK):
        tokens, position = batch["tokens_BT"][b, : batch["length_B"][b]].tolist(), int(samples.position_BK[b, k])
        predictions = {}
        for g in range(length_BKG.shape[-1]):
            answer = first_answer(grpo.response_tokens(samples, (b, k, g)), decode, config.rpt)
            if answer is not None:
                predictions[g], length_BKG[b, k, g] = answer
                stopped_BKG[b, k, g] = True
        rest = continuation(tokens, position, decode)
        likely = [len(text.encode()) for text in predictions.values() if rest.startswith(text.encode())]
        ends = token_ends(tokens, position, decode, max(likely)) if likely else frozenset()
        for g, text in predictions.items():
            reward_BKG[b, k, g] = prefix_reward(text, rest, ends)
    cut = samples._replace(length_BKG=length_BKG, stopped_BKG=stopped_BKG)
    judged = grpo.with_rewards(cut, reward_BKG, config.rpt, config.rlp.thought_tokens)
    sampled_B = samples.length_BKG.sum((1, 2)).astype(np.float32)  # what was sampled beyond an answer costs as much
    return grpo.with_tally(judged, judged.verdict.tally | {"sampled_tokens": sampled_B})


def judge(config: Config, batch: Batch, samples: Samples, decode: Decode, again: Callable[..., Samples]) -> Samples:
    """Rounds of sampling until the rewards of every position differ, or `rpt.rounds` are over.

    Args:
      batch, samples: numpy arrays; the first round's.
      again: (tried_BT) -> samples at other positions, numpy arrays.

    Returns:
      Groups that were kept at valid positions, in ascending order. The tally is over all rounds, except for the mean
      reward: later rounds look where the first one found nothing to learn. It counts `rounds` and `positions_empty`.
    """
    tried_BT = np.zeros(batch["tokens_BT"].shape, bool)
    kept, tallies = None, []
    while True:
        row, k = np.nonzero(samples.valid_BK)
        tried_BT[row, samples.position_BK[row, k]] = True
        judged = judge_round(config, batch, samples, decode)
        tallies.append(judged.verdict.tally)
        judged = grpo.with_tally(judged, {})
        kept = judged if kept is None else fill(kept, judged)
        full_B = kept.valid_BK.all(-1)
        if full_B.all() or not len(row) or len(tallies) == config.rpt.rounds:
            break
        samples = again(tried_BT | full_B[:, None])
    tally = {name: np.sum([of_round[name] for of_round in tallies], 0) for name in tallies[0]}
    tally |= {name: tallies[0][name] for name in ("reward", "reward_groups")}
    rounds_B = np.zeros(len(tried_BT), np.float32)
    rounds_B[0] = len(tallies)  # of the batch: a tally is summed over documents
    tally |= {"rounds": rounds_B, "positions_empty": (~kept.valid_BK).sum(-1).astype(np.float32)}
    return grpo.with_tally(ascending(kept), tally)


def fill(kept: Samples, new: Samples) -> Samples:
    """Puts the valid positions of a round into the places of each document that are still empty."""
    filled = jax.tree.map(np.array, kept)
    for b in np.flatnonzero(~kept.valid_BK.all(-1)):
        empty, found = np.flatnonzero(~kept.valid_BK[b]), np.flatnonzero(new.valid_BK[b])
        n = min(len(empty), len(found))
        for old_BK, new_BK in zip(jax.tree.leaves(filled), jax.tree.leaves(new), strict=True):
            old_BK[b, empty[:n]] = new_BK[b, found[:n]]
    return filled


def ascending(samples: Samples) -> Samples:
    """A document's valid positions in order, the others last."""
    behind = np.iinfo(np.int32).max
    order_BK = np.argsort(np.where(samples.valid_BK, samples.position_BK, behind), -1, kind="stable")
    row_B1 = np.arange(len(order_BK))[:, None]
    return jax.tree.map(lambda x: x[row_B1, order_BK], samples)


def check_proxy(config: Config, tokenizer) -> None:
    """Checks the model of `rpt.proxy`, where there is one.

    Raises:
      ConfigError: it reads other tokens than the run's model.
      CheckpointError: it cannot be read.
    """
    if config.rpt.proxy and not tokenizer.same_tokens(open_model(config.rpt.proxy, config.compute_dtype)[1]):
        raise ConfigError(
            f"rpt.proxy is {config.rpt.proxy!r}, whose tokenizer is another than that of {config.model!r}: its entropy "
            "would be of other tokens"
        )


class Step(grpo.Step):
    """Takes the proxy's parameters where they are not the moving average's."""

    def __init__(self, proxy_params: Params | None, *args):
        super().__init__(*args)
        self._proxy_params = proxy_params

    def sample(self, params, ema_params, batch, key, tried_BT=None) -> Samples:
        tried_BT = np.zeros(batch["tokens_BT"].shape, bool) if tried_BT is None else tried_BT
        proxy_params = ema_params if self._proxy_params is None else self._proxy_params
        return super().sample(params, proxy_params, batch, key, tried_BT)


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    template: TemplateTokens,
    config: Config,
    reference_params: Params | None = None,
    mesh: Mesh | None = None,
) -> Step:
    """See `algorithms.Step`."""
    proxy, proxy_params = model, None
    if config.rpt.proxy:
        proxy, _, read = open_model(config.rpt.proxy, config.compute_dtype)
        proxy_params = read(Target(mesh))
    return Step(
        proxy_params, functools.partial(sample, model, proxy), functools.partial(judge, config), model, optimizer,
        template, config, reference_params, mesh,
    )  # fmt: skip
