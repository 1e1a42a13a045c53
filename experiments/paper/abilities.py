# SPDX-License-Identifier: Apache-2.0
"""What a base can do, corpus by corpus: steps of a thought, answers with and without one, the thoughts it samples."""

import jax
import numpy as np

from experiments.paper import batches, domains
from experiments.paper.batches import CLOSE, INSTRUCTION, OPEN
from experiments.tiny_base import branch_logits
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.rollout.engine import sample_thoughts

DOCUMENTS = 64  # a corpus
TEMPERATURE = 0.7
CAP = 16  # tokens a sampled thought


def abilities(model: LanguageModel, params, documents: int = DOCUMENTS, seed: int = 1) -> dict[str, dict[str, float]]:
    """By corpus, on fresh documents: accuracies and shares are fractions, cross-entropies nats, rounded to 4 digits.

    `crawl` has only its plain cross-entropy.
    """
    plain_logits = jax.jit(lambda p, d: model.apply(p, d["tokens_BT"])[0])
    thinking_logits = jax.jit(lambda p, d: branch_logits(model, p, d))
    out = {}
    for long in (False, True):
        for corpus in domains.CORPORA:
            rng = np.random.default_rng((seed, 2**31, long))
            data = batches.batch(rng, [corpus] * (documents // 4 if long else documents), long, ordinary=False)
            plain, branches = (np.asarray(f(params, batches.arrays(data))) for f in (plain_logits, thinking_logits))
            name = f"{corpus}, long documents" if long else corpus
            out[name] = {"plain text, cross-entropy a token": _cross_entropy(plain[:, :-1], data["tokens_BT"][:, 1:])}
            if corpus != "crawl":
                out[name] |= _answers(data, plain, branches)
                if not long:
                    out[name] |= _thoughts(model, params, data, jax.random.key(seed))
    return {name: {what: round(float(x), 4) for what, x in values.items()} for name, values in out.items()}


def progress(model: LanguageModel, documents: int = 12):
    """A function of params that says in a line, by corpus, how many steps and answers after right thoughts are true."""
    corpora = [corpus for corpus in domains.BENCHMARKS for _ in range(documents)]
    data = batches.batch(np.random.default_rng((0, 2**31)), corpora, ordinary=False)
    logits = jax.jit(lambda p, d: branch_logits(model, p, d))
    closed = (data["branch_BRS"] == CLOSE).argmax(-1)[..., None]

    def say(params) -> str:
        good = np.asarray(logits(params, batches.arrays(data))).argmax(-1) == data["branch_BRS"][..., 1:]
        answered, parts = np.take_along_axis(good, closed, 2)[..., 0], []
        for corpus in domains.BENCHMARKS:
            rows = data["corpus_B"] == corpus
            steps = good[rows][data["state_BRS"][rows][..., 1:]].mean()
            parts.append(f"{corpus} {steps:.2f}/{answered[rows][data['kind_BR'][rows] == 'right'].mean():.2f}")
        return "  ".join(parts)

    return say


def _cross_entropy(logits, tokens) -> float:
    logprob = np.asarray(jax.nn.log_softmax(logits))
    return -np.take_along_axis(logprob, tokens[..., None], -1)[..., 0][tokens != 0].mean()


def _answers(data: dict, plain, branches) -> dict[str, float]:
    asked = data["problem_BR"] != None  # noqa: E711, elementwise
    good = (branches.argmax(-1) == data["branch_BRS"][..., 1:]) & data["state_BRS"][..., 1:]
    out = {"one step of a thought, accuracy": good.sum() / data["state_BRS"].sum()}

    def score(name, logits_RV, where):
        if not where.any():  # few documents need not hold every kind
            return
        out[f"{name}, accuracy"] = (logits_RV[where].argmax(-1) == data["answer_BR"][where]).mean()
        out[f"{name}, cross-entropy"] = _cross_entropy(logits_RV[where], data["answer_BR"][where])

    rows = np.arange(len(plain))[:, None]
    unaided = plain[rows, np.maximum(data["prefix_BR"] - len(INSTRUCTION) - 1, 0)]
    score("answer without a thought", unaided, asked)
    close = (data["branch_BRS"] == CLOSE).argmax(-1)
    after = np.take_along_axis(branches, close[..., None, None], 2)[:, :, 0]
    for kind in domains.THOUGHT_MIX:
        score(f"answer after a thought: {kind}", after, asked & (data["kind_BR"] == kind))
    return out


def _thoughts(model: LanguageModel, params, data: dict, key: jax.Array) -> dict[str, float]:
    out = {}
    for label, heat in (("greedy", 1e-4), (f"temperature {TEMPERATURE}", TEMPERATURE)):
        rollout = jax.tree.map(np.asarray, sample(model, params, data, key, heat))
        verdicts = []
        for place in np.argwhere(data["problem_BR"] != None):  # noqa: E711, elementwise
            b, r = place
            words = rollout.thought_BRL[b, r, : rollout.length_BR[b, r] - rollout.stopped_BR[b, r].astype(int)]
            verdicts.append(data["problem_BR"][b, r].judge(domains.TOKENIZER.decode(words.tolist())))
        for verdict in ("right", "wrong", "empty", "other"):
            out[f"thoughts, {label}: {verdict}"] = verdicts.count(verdict) / len(verdicts)
    return out


def sample(model: LanguageModel, params, data: dict, key: jax.Array, temperature: float):
    """A thought for every branch of a batch."""

    @jax.jit
    def run(params, context_BT, stop_BK, prefix_BR, key_BR):
        _, cache = model.hidden(params, context_BT, stops_BK=stop_BK)
        return sample_thoughts(model, params, cache, prefix_BR, (OPEN,), (CLOSE,), key_BR, CAP, temperature)

    keys = jax.random.split(key, data["prefix_BR"].shape)
    return run(params, data["context_BT"], data["stop_BK"], data["prefix_BR"], keys)
