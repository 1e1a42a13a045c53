# SPDX-License-Identifier: Apache-2.0
"""Responses to prompts, through the rollout engine: a prompt is a document, and its response a thought at its end.

A response stops at the model's end-of-text tokens and where a stop string begins. The engine is told both as one
automaton over tokens, so that a batch ends when its last response has, however its tokens cut the strings up.

Prompts of a benchmark begin with the same worked examples, which are most of them: these are read once a batch, and
once for every token of all its responses.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.config import MeshConfig
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout.engine import Own, sample_thoughts
from rlp_jax.rollout.sampling import Rollout, thought_keys
from rlp_jax.sharding import document_shards, in_rollout_layout, mesh_of, over, place_batch

GREEDY = 1e-6  # a temperature at which only the likeliest token, or its equals, can be drawn
# Prompts are padded to multiples of so many tokens, automata to multiples of so many states: few shapes to compile.
PAD_MULTIPLE = 64
PAD_MULTIPLE_LONG = 256  # beyond this many tokens
SMALLEST_OWN = 128  # what follows tokens that prompts share: each size is twice the one before
STATES_MULTIPLE = 32


class Decoder(NamedTuple):
    """How to continue prompts.

    max_tokens: of a response, its end-of-text token included. close: tokens that end it too; none for an answer.
    rows: prompts decoded together; where parameters lie over a mesh, the next multiple of its shares of documents.
    ends_SV: of `stop_table`. mesh: how weights are laid out while sampling over a mesh (`rollout`). shared: all prompts
    begin with the same so many tokens (of `common`).
    """

    model: LanguageModel
    params: Params
    max_tokens: int
    temperature: float
    ends_SV: np.ndarray | None
    close: tuple[int, ...] = ()
    rows: int = 8
    mesh: MeshConfig = MeshConfig()
    shared: int = 0


class Sampled(NamedTuple):
    """Tokens of one response, and whether it stopped rather than being cut at the cap."""

    tokens: list[int]
    stopped: bool


def common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, rounded down so that few counts are compiled; the last one of a prompt is
    not among them."""
    least, most = min(prompts), max(prompts)  # in the order of dictionaries: what these two share all do
    last = min(len(least), len(most), *map(len, prompts)) - 1
    same = next((n for n in range(last) if least[n] != most[n]), last)
    return same // PAD_MULTIPLE * PAD_MULTIPLE


def decode(
    decoder: Decoder, prompts: Sequence[Sequence[int]], ids: Sequence[int], samples: int, key: jax.Array
) -> list[list[Sampled]]:
    """`samples` responses to each prompt, in the order given.

    Args:
      prompts: tokens, at least one each.
      ids: of each prompt, in [0, 2^31): with the key and the prompt's length they decide its randomness, so that a
        response does not depend on its neighbours.

    Raises:
      ValueError: a prompt without tokens, or one that leaves no room for a response in the model's context.
    """
    room = decoder.model.config.max_positions - decoder.max_tokens
    for tokens in prompts:
        if not 1 <= len(tokens) <= room:
            raise ValueError(
                f"a prompt has {len(tokens)} tokens: with a response of {decoder.max_tokens} the model's context of "
                f"{decoder.model.config.max_positions} holds 1 to {room}"
            )
    shards = document_shards(mesh_of(decoder.params))
    # A recurrent layer keeps its state at stops of documents, not of branches: a hybrid reads every prompt whole.
    shared = 0 if decoder.model.config.hybrid else decoder.shared
    decoder = decoder._replace(rows=-(-decoder.rows // shards) * shards, shared=shared)
    responses: list[list[Sampled]] = [[] for _ in prompts]
    # The engine reads the last token of a prompt as its opening tag, which is the same for a whole batch.
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i][-1], len(prompts[i])))
    for last, group in itertools.groupby(order, key=lambda i: prompts[i][-1]):
        rows = list(group)
        for start in range(0, len(rows), decoder.rows):
            batch = rows[start : start + decoder.rows]
            for i, of_prompt in zip(batch, _batch(decoder, prompts, ids, batch, last, samples, key), strict=True):
                responses[i] = of_prompt
    return responses


def _batch(decoder, prompts, ids, batch: list[int], last: int, samples: int, key) -> list[list[Sampled]]:
    filled = batch + [batch[0]] * (decoder.rows - len(batch))
    length_B = np.array([len(prompts[i]) - 1 for i in filled], np.int32)
    longest = int(length_B.max())
    columns = padded(longest)
    if decoder.shared:
        columns = decoder.shared + max(SMALLEST_OWN, 1 << (longest - decoder.shared - 1).bit_length())
    tokens_BT = np.zeros((len(filled), columns), np.int32)
    for row, i in enumerate(filled):
        tokens_BT[row, : length_B[row]] = prompts[i][:-1]
    key_BR = thought_keys(key, np.array([ids[i] for i in filled], np.uint32), length_B[:, None], samples)[:, 0]
    mesh = mesh_of(decoder.params)
    rows = place_batch((tokens_BT, length_B, key_BR), mesh)
    with over(mesh):
        rollout = _respond(
            decoder.model, decoder.max_tokens, decoder.close, decoder.mesh, decoder.shared, document_shards(mesh),
            decoder.params, *rows, last, decoder.temperature, decoder.ends_SV,
        )  # fmt: skip
    tokens_BRL, length_BR, stopped_BR = (np.asarray(x) for x in rollout[:3])
    return [
        [
            Sampled(tokens_BRL[row, r, : length_BR[row, r]].tolist(), bool(stopped_BR[row, r]))
            for r in range(samples)
        ]
        for row in range(len(batch))
    ]  # fmt: skip


def padded(length: int) -> int:
    """The length to which a sequence is padded."""
    multiple = PAD_MULTIPLE if length <= PAD_MULTIPLE_LONG else PAD_MULTIPLE_LONG
    return max(1, -(-length // multiple)) * multiple


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _respond(
    model, max_tokens: int, close, mesh: MeshConfig, shared: int, shards: int, params, tokens_BT, length_B, key_BR,
    last, temperature, ends_SV,
) -> Rollout:  # fmt: skip
    """Reads prompts, all but their common last token, and continues them."""
    B, R = key_BR.shape
    length_BR, own = jnp.repeat(length_B[:, None], R, 1), None
    if shared:  # each of the mesh's shares of documents is one document, and its prompts are positions at its end
        own = Own(*(x.reshape(shards, B // shards, *x.shape[1:]) for x in _own(tokens_BT, length_B, last, shared)))
        tokens_BT, length_BR = tokens_BT[:: B // shards, :shared], jnp.full((shards, B // shards * R), shared)
        key_BR = key_BR.reshape(shards, -1)
    _, cache = model.hidden(params, tokens_BT, stops_BK=length_B[:, None])

    def sample(params, cache, length_BR, key_BR, own):
        return sample_thoughts(
            model, params, cache, length_BR, (last,), close, key_BR, max_tokens, temperature, group_size=R,
            ends=ends_SV, own=own,
        )  # fmt: skip

    rollout = in_rollout_layout(mesh, model.config.compute_dtype, sample, params, cache, length_BR, key_BR, own)
    return jax.tree.map(lambda x: x.reshape(B, R, *x.shape[2:]), rollout)


def _own(tokens_BT, length_B, last, shared: int) -> tuple[jax.Array, jax.Array]:
    """What each prompt has after the first `shared` tokens, its last token included, at the right of its row [B, S],
    and where that begins."""
    S = tokens_BT.shape[1] - shared + 1
    start_B = S - 1 - (length_B - shared)
    index_BS = jnp.clip(shared + jnp.arange(S) - start_B[:, None], 0, tokens_BT.shape[1] - 1)
    own_BS = jnp.take_along_axis(tokens_BT, index_BS, 1)
    return own_BS.at[:, -1].set(last), start_B


def finish(tokenizer, sampled: Sampled, stop: Sequence[str]) -> str:
    """The text of a response: up to its end-of-text token and to where the first stop string begins."""
    at = next((n for n, token in enumerate(sampled.tokens) if token in tokenizer.eos_ids), None)
    text = tokenizer.decode(sampled.tokens[:at])
    found = [text.find(string) for string in stop if string in text]
    return text[: min(found)] if found else text


def stop_table(tokenizer, vocab_size: int, stop: Sequence[str]) -> np.ndarray:
    """The automaton `ends` of the rollout engine, [states, V] int16: end-of-text tokens and the ends of stop strings
    lead to the last state.

    Its states are the beginnings of the stop strings (Aho and Corasick, 1975); a token takes its characters' way
    through them. A character cut in two by tokens counts as none of a stop string's, so that a string with such a one
    may go unnoticed here: `finish` cuts by the text.

    Args:
      vocab_size: of the model, at least the tokenizer's.
    """
    beginnings = sorted({string[:n] for string in stop for n in range(len(string))} | {""}, key=len)
    state_of = {beginning: s for s, beginning in enumerate(beginnings)}
    end = -(-(len(beginnings) + 1) // STATES_MULTIPLE) * STATES_MULTIPLE - 1
    letters = sorted(set("".join(stop)))
    letter_of = {letter: n for n, letter in enumerate(letters, 1)}  # 0: a letter of no stop string
    next_SN = np.zeros((end + 1, len(letters) + 1), np.int16)
    for beginning, s in state_of.items():
        for letter, n in letter_of.items():
            text = beginning + letter
            if any(text.endswith(string) for string in stop):
                next_SN[s, n] = end
            else:
                next_SN[s, n] = next(state_of[text[i:]] for i in range(len(text) + 1) if text[i:] in state_of)
    next_SN[end] = end

    texts = token_texts(tokenizer)
    longest = max(map(len, texts), default=0)
    letters_VC = np.zeros((len(texts), longest), np.int16)
    length_V = np.array([len(text) for text in texts])
    for v, text in enumerate(texts):
        letters_VC[v, : len(text)] = [letter_of.get(letter, 0) for letter in text]
    ends_SV = np.repeat(np.arange(end + 1, dtype=np.int16)[:, None], vocab_size, 1)
    for c in range(longest):
        rows = np.flatnonzero(length_V > c)
        ends_SV[:, rows] = next_SN[ends_SV[:, rows], letters_VC[rows, c]]
    ends_SV[:, list(tokenizer.eos_ids)] = end
    return ends_SV


def token_texts(tokenizer) -> list[str]:
    """What each token adds to a text. A decoder may drop the space that a text's first token begins with, so every
    token is decoded after another one."""
    before = tokenizer.encode("a")
    start = tokenizer.decode(before)
    return [tokenizer.decode([*before, v]).removeprefix(start) for v in range(tokenizer.vocab_size)]
