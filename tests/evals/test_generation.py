# SPDX-License-Identifier: Apache-2.0
"""Responses against a naive loop, and the automaton of stop strings against searching the text."""

import random

import jax
import numpy as np
import pytest
import tokenizers
from reference import apply, rough_params, tiny
from tiny_run import byte_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from rlp_jax.data.tokenizer import Tokenizer
from rlp_jax.evals.generation import (
    GREEDY,
    PAD_MULTIPLE,
    Decoder,
    Sampled,
    common,
    decode,
    finish,
    stop_table,
    token_texts,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = tiny(max_positions=40)
PARAMS = rough_params(MODEL)
PROMPTS = [[11, 30, 12, 9], [21, 9], [7, 8, 31, 5, 40, 2], [9], [3, 1, 9]]
L = 8


def decoder(**changes):
    return Decoder(MODEL, PARAMS, L, GREEDY, None)._replace(**{"rows": 2, **changes})


def greedy(prompt, ends):
    """The likeliest tokens by whole forwards, until the automaton or the cap ends them."""
    tokens, state = [], 0
    while len(tokens) < L and state < len(ends) - 1:
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(prompt) + len(tokens)] = prompt + tokens
        tokens.append(int(np.argmax(apply(MODEL, PARAMS, padded)[0][0, len(prompt) + len(tokens) - 1])))
        state = ends[state][tokens[-1]]
    return Sampled(tokens, state == len(ends) - 1)


def test_greedy_responses_are_the_naive_ones():
    free = [greedy(prompt, np.zeros((2, 50), int)) for prompt in PROMPTS]
    ends = np.zeros((2, 50), np.int16)
    ends[0, free[0].tokens[3]] = 1  # at the latest the fourth token ends the first response
    wanted = [greedy(prompt, ends) for prompt in PROMPTS]
    assert {response.stopped for response in wanted} == {True, False}
    assert decode(decoder(ends_SV=ends), PROMPTS, range(5), 1, jax.random.key(0)) == [[response] for response in wanted]


def test_what_prompts_share_is_read_once():
    """The same responses, and those of a naive loop, when prompts are branches after what they begin with."""
    first = [17, 4, 33, 12, 8, 40, 26]
    prompts = [first + prompt for prompt in PROMPTS] + [[*first, 1]]  # the last adds nothing before its last token
    assert decode(decoder(shared=7), prompts, range(6), 1, jax.random.key(0)) == [
        [greedy(prompt, np.zeros((2, 50), int))] for prompt in prompts
    ]
    warm = decoder(temperature=1.0, rows=4)
    assert decode(warm._replace(shared=5), prompts, range(6), 2, jax.random.key(1)) == decode(
        warm, prompts, range(6), 2, jax.random.key(1)
    )


def test_what_prompts_share():
    rows = [np.random.default_rng(n).integers(0, 50, 20).tolist() for n in range(4)]
    for same in range(0, 3 * PAD_MULTIPLE, 13):
        prompts = [[7] * same + [n] + row for n, row in enumerate(rows)]
        assert common(prompts) == same // PAD_MULTIPLE * PAD_MULTIPLE
    # A prompt keeps its last token: it is fed to the engine.
    assert common([[7] * PAD_MULTIPLE] * 2) == 0 and common([[7] * (PAD_MULTIPLE + 1), [7] * 200]) == PAD_MULTIPLE


def test_samples_depend_on_prompt_id_and_key_alone():
    key = jax.random.key(3)
    warm = decoder(temperature=1.0)
    responses = decode(warm, PROMPTS, range(5), 3, key)
    assert all(len({tuple(sample.tokens) for sample in of_one}) > 1 for of_one in responses)
    alone = decode(warm, PROMPTS[2:3], [2], 3, key)
    assert alone == responses[2:3]
    backwards = decode(warm._replace(rows=3), PROMPTS[::-1], range(4, -1, -1), 3, key)
    assert backwards == responses[::-1]
    assert decode(warm, PROMPTS[:1], [77], 3, key) != responses[:1]
    assert decode(warm, PROMPTS[:1], [0], 3, jax.random.key(4)) != responses[:1]


def test_prompts_that_do_not_fit():
    for prompt in ([], list(range(33))):
        with pytest.raises(ValueError, match=f"a prompt has {len(prompt)} tokens"):
            decode(decoder(), [[1], prompt], [0, 1], 1, jax.random.key(0))
    assert len(decode(decoder(), [list(range(32))], [0], 1, jax.random.key(0))[0][0].tokens) == L


def merged_tokenizer():
    """Bytes, and tokens of several letters that cut stop strings up in different ways."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline, space = "Ċ", "Ġ"
    merges = [
        (newline, newline),
        ("Q", ":"),
        (newline, "Q"),
        (".", newline),
        (newline * 2, "Q"),
        (space, "a"),
        ("a", "b"),
    ]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=(tokens.index("z"), tokens.index("#")))


@pytest.mark.parametrize("stop", [(), ("\nQ:",), ("\n\nQ", "b."), ("aab", "ab", "b\n"), ("é",), ("Q:Q:", ":Q.")])
def test_the_automaton_is_a_search_in_the_text(stop):
    tokenizer = merged_tokenizer()
    ends_SV = stop_table(tokenizer, tokenizer.vocab_size + 3, stop)
    texts, draw = token_texts(tokenizer), random.Random(0)
    letters = [v for v, text in enumerate(texts) if text and set(text) <= set("\nQ:.ab z")]
    stopped = 0
    for _ in range(500):
        tokens = draw.choices(letters, k=12)
        state, text = 0, ""
        for token in tokens:
            text += texts[token]
            state = ends_SV[state, token]
            over = token in tokenizer.eos_ids or any(string in text for string in stop)
            assert (state == len(ends_SV) - 1) == over
            if over:
                stopped += 1
                break
    assert stopped > 50
    assert (ends_SV[:-1, tokenizer.vocab_size :] < len(ends_SV) - 1).all()  # padding of the embedding


def test_a_response_is_cut_at_the_first_stop_string_and_at_the_end_of_text():
    tokenizer = merged_tokenizer()

    def cut(text, stop):
        return finish(tokenizer, Sampled(tokenizer.encode(text), True), stop)

    assert cut("ab a.\n\nQ: a", ("Q:", "\n\n")) == "ab a."
    assert cut("ab a#ab", ("ab a#",)) == "ab a"
    assert cut("ab", ()) == "ab" and cut("", ("a",)) == ""


def test_texts_of_tokens_keep_their_spaces():
    tokenizer = merged_tokenizer()
    texts = token_texts(tokenizer)
    assert texts[tokenizer.token_id("Ġa")] == " a" and texts[tokenizer.token_id("ĊĊQ")] == "\n\nQ"
    assert "".join(texts[v] for v in byte_tokenizer().encode("plain text")) == "plain text"
