# SPDX-License-Identifier: Apache-2.0
"""What the study's bases are pretrained on: plain documents, and thinking documents as branches of them.

A batch has K places a document where thoughts follow, and N thoughts at each, weighted by their shares of the mix. All
thinking documents that share their text are branches of one prefix, which is the same as reading each of them alone,
only cheaper. In general text some places are ordinary ones, where nothing is to be worked out: RLP asks for thoughts
there too.

Before any of that a base reads repeated words for a while (`repeats`): to look up what followed a word before is what
every thought needs, and all that such a text can teach.

Every number here is a function of (seed, number of the batch).
"""

import numpy as np

from experiments.paper import domains
from experiments.paper.chains import Chain
from experiments.paper.domains import TOKENIZER
from experiments.tiny_base import PAD

PLACES = 2  # K, a document
THOUGHTS = 3  # N, a place
STATE_WEIGHT = 4  # of the states that right and wrong steps lead to, and of answers; a thought's other tokens have 1
# Documents of every 18: the fewer, the sooner a corpus is learnt.
MIX = {"arithmetic": 3, "compose": 3, "pointers": 4, "textbook": 2, "story": 5, "crawl": 1}
FIRST_STEPS = 250  # in which most thoughts are right, so that reading an answer off a thought is learnt soon
LONG_EVERY = 5  # batches; the others have documents of up to 40 tokens
BRANCH_TOKENS = domains.THOUGHT_TOKENS + 3  # opening tag, thought with closing tag, answer, full stop
INSTRUCTION, (OPEN,), (CLOSE,) = map(TOKENIZER.encode, (domains.INSTRUCTION, domains.OPEN, domains.CLOSE))


def training_batch(seed: int, number: int, documents: int) -> dict:
    """The batch of one step, its corpora by `MIX`. Long documents are a third as many as short ones would be."""
    rng = np.random.default_rng((seed, number))
    long = number % LONG_EVERY == LONG_EVERY - 1
    pool = [corpus for corpus, count in MIX.items() for _ in range(count)]
    chosen = [k % len(pool) for k in range(documents // 3 if long else documents)]
    mix = domains.FIRST_MIX if number < FIRST_STEPS else domains.THOUGHT_MIX
    return batch(rng, [pool[k] for k in rng.permutation(len(pool))[chosen]], long, mix=mix)


def batch(
    rng: np.random.Generator,
    corpora: list[str],
    long: bool = False,
    ordinary: bool = True,
    mix: dict[str, float] = domains.THOUGHT_MIX,
) -> dict:
    """Plain documents, one of each corpus named, and R = K·N branches of each.

    Args:
      mix: the thoughts' shares.
      ordinary: whether general text may have thoughts where nothing is to be worked out.

    Returns tokens_BT (plain), context_BT (instruction + plain), stop_BK and prefix_BR (what branches see of their
    context), branch_BRS (open, thought, close, next token, and "." after an answer), weight_BRS (0 where there is no
    branch); padded to fixed shapes. And the facts behind them: state_BRS (True where a token of the branch is a state
    that its right or wrong chain's steps lead to), answer_BR (next token), kind_BR, corpus_B, problem_BR (None at an
    ordinary place).
    """
    K, R = PLACES, PLACES * THOUGHTS
    B, T = len(corpora), domains.LONG_DOCUMENT_TOKENS if long else domains.DOCUMENT_TOKENS
    tokens_BT, stop_BK = np.full((B, T), PAD, np.int32), np.zeros((B, K), np.int32)
    branch_BRS, state_BRS = np.full((B, R, BRANCH_TOKENS), PAD, np.int32), np.zeros((B, R, BRANCH_TOKENS), bool)
    weight_BRS = np.zeros((B, R, BRANCH_TOKENS), np.float32)
    kind_BR, problem_BR = np.full((B, R), "", "U12"), np.full((B, R), None, object)
    for b, corpus in enumerate(corpora):
        written = domains.long_document(corpus, rng) if long else domains.document(corpus, rng)
        tokens = TOKENIZER.encode(written.text)
        tokens_BT[b, : len(tokens)] = tokens
        for k, (before, problem) in enumerate(_places(rng, corpus, written, ordinary)):
            stop_BK[b, k] = len(INSTRUCTION) + before
            if problem is None:
                told = TOKENIZER.decode(tokens[:before])
                thoughts = [(*domains.ordinary_thought(rng, corpus, told), 1 / THOUGHTS) for _ in range(THOUGHTS)]
            else:
                thoughts = domains.mixed_thoughts(rng, problem, mix)
            for r, (kind, chain, share) in enumerate(thoughts, k * THOUGHTS):
                branch, states = _branch(chain, tokens[before : before + (2 if problem else 1)])
                branch_BRS[b, r, : len(branch)] = branch
                state_BRS[b, r, states] = kind in ("right", "wrong")
                weight_BRS[b, r, : len(branch)] = share
                if problem:
                    weight_BRS[b, r, len(branch) - 2] *= STATE_WEIGHT
                    weight_BRS[b, r, states] *= STATE_WEIGHT if kind in ("right", "wrong") else 1
                kind_BR[b, r], problem_BR[b, r] = kind, problem
    context_BT = np.concatenate([np.broadcast_to(np.int32(INSTRUCTION), (B, len(INSTRUCTION))), tokens_BT], 1)
    prefix_BR = np.repeat(stop_BK, THOUGHTS, axis=1)
    answer_BR = np.take_along_axis(context_BT, np.minimum(prefix_BR, context_BT.shape[1] - 1), 1)
    return dict(
        tokens_BT=tokens_BT, context_BT=context_BT, stop_BK=stop_BK, prefix_BR=prefix_BR, branch_BRS=branch_BRS,
        weight_BRS=weight_BRS, state_BRS=state_BRS, answer_BR=answer_BR, kind_BR=kind_BR, corpus_B=np.array(corpora),
        problem_BR=problem_BR,
    )  # fmt: skip


def repeats(seed: int, number: int, documents: int) -> dict[str, np.ndarray]:
    """A batch of documents that say a few random words again and again: tokens_BT alone."""
    rng = np.random.default_rng((seed, 2**31, number))
    words = np.arange(1 + max(PAD, OPEN, CLOSE), TOKENIZER.vocab_size)
    rows = [np.resize(rng.permutation(words)[: rng.integers(8, 20)], domains.DOCUMENT_TOKENS) for _ in range(documents)]
    return {"tokens_BT": np.array(rows, np.int32)}


def arrays(data: dict) -> dict[str, np.ndarray]:
    """What a program reads of a batch."""
    return {
        name: data[name] for name in ("tokens_BT", "context_BT", "stop_BK", "prefix_BR", "branch_BRS", "weight_BRS")
    }


def _places(
    rng: np.random.Generator, corpus: str, written: domains.Written, ordinary: bool
) -> list[tuple[int, domains.Problem | None]]:
    """K distinct places of a document in order, as (tokens before it, problem); fewer where it has no more.

    Of general text half of the documents with several problems, and all others, have an ordinary place.
    """
    asked = {len(TOKENIZER.encode(written.text[:offset])): problem for offset, problem in written.problems}
    ordinary = ordinary and corpus in domains.GENERAL
    room = PLACES - (ordinary and rng.random() < 0.5)
    places = {before: asked[before] for before in rng.permutation(np.array(list(asked), int))[:room].tolist()}
    if ordinary:
        free = [t for t in range(1, len(TOKENIZER.encode(written.text))) if t not in asked]
        places |= dict.fromkeys(rng.permutation(free)[: PLACES - len(places)].tolist())
    return sorted(places.items(), key=lambda item: item[0])


def _branch(chain: Chain, following: list[int]) -> tuple[list[int], list[int]]:
    """Tokens of a branch, and which of them are states that a step of the chain leads to."""
    tokens, states = [OPEN], []
    for i, state in enumerate(chain.states):
        if i:
            tokens += TOKENIZER.encode(chain.steps[i - 1])
            states.append(len(tokens))
        tokens += TOKENIZER.encode(state)
    return [*tokens, CLOSE, *following], states
