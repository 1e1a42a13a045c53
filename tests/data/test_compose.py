# SPDX-License-Identifier: Apache-2.0
"""The quickstart's documents: what they say is true, and their thoughts are what they claim to be."""

import collections
import itertools

import numpy as np
import pytest

from rlp_jax.checkpoints_io.load import load
from rlp_jax.data import compose
from rlp_jax.data.compose import ComposeSource, Line


def test_operations_are_permutations_that_generate_all_of_them():
    tables = [tuple(compose.STATES.index(s) for s in table) for table in compose.OPERATIONS.values()]
    for table in tables:
        assert sorted(table) == list(range(8))
        assert all(table[i] != i for i in range(8))
    assert all(sum(a == b for a, b in zip(f, g, strict=True)) <= 1 for f, g in itertools.combinations(tables, 2))
    found = {tuple(range(8))}
    frontier = found
    while frontier:
        frontier = {tuple(g[i] for i in f) for f in frontier for g in tables} - found
        found |= frontier
    assert len(found) == 40320  # 8!


def test_line_by_hand():
    line = Line("c", ("flip", "turn", "swap"))
    # flip: c -> h; turn: h -> f; swap: f -> a. Backwards swap: c -> h; turn: h -> f; flip: f -> e.
    assert line.question() == "c flip turn swap ="
    assert line.thought() == "c flip h turn f swap a"
    assert line.thought(backwards=True) == "c swap h turn f flip e"
    assert line.answer == "a"
    assert compose.judge("c flip h turn f swap a", line) == "right"
    assert compose.judge("c swap h turn f flip e", line) == "backwards"
    assert compose.judge(" ", line) == "empty"
    assert compose.judge("c flip h turn f swap b", line) == "other"


def test_documents_are_a_function_of_seed_and_index():
    source = ComposeSource(seed=3, size=50)
    assert len(source) == 50
    texts = [document.text for document in source]
    assert texts[7] == ComposeSource(seed=3, size=8)[7].text
    assert len(set(texts)) == 50
    assert not set(texts) & {document.text for document in ComposeSource(seed=4, size=50)}
    assert [document.id for document in source] == list(range(50))
    with pytest.raises(IndexError, match="document 50 of 50"):
        source[50]


def test_spans_are_the_answers_and_reading_inverts_rendering():
    for document in ComposeSource(seed=0, size=100):
        lines = compose.read(document.text)
        assert len(lines) == compose.LINES
        assert [document.text[a:b] for a, b in document.spans] == [line.answer for line in lines]
        for line in lines:
            state = line.start
            for name in line.operations:
                state = compose.OPERATIONS[name][compose.STATES.index(state)]
            assert state == line.answer
            assert compose.TRAIN_STEPS[0] <= len(line.operations) <= compose.TRAIN_STEPS[1]
            assert len(set(line.operations)) == len(line.operations)
        assert compose.render(lines, document.id) == document


def test_reading_an_unfinished_document():
    assert compose.read("c flip turn = f .\na push") == [Line("c", ("flip", "turn")), Line("a", ("push",))]
    with pytest.raises(ValueError, match="not a line"):
        compose.read("c flip fly = f .")


def test_answers_cannot_be_guessed_from_the_start_alone():
    counts = np.zeros((8, 8))
    for document in ComposeSource(seed=1, size=2000):
        for line in compose.read(document.text):
            counts[compose.STATES.index(line.start), compose.STATES.index(line.answer)] += 1
    share = counts / counts.sum(1, keepdims=True)
    # Standard error of a cell is 0.012 with 750 lines a start; 64 cells.
    assert np.abs(share - 1 / 8).max() < 0.05


def test_thoughts_come_in_their_shares_and_are_what_they_are_called():
    rng = np.random.default_rng(0)
    lines = compose.random_lines(rng, 4000, (3, 7))
    thoughts = compose.thinking(rng, lines, (3, 7))
    counts = collections.Counter(kind for kind, _ in thoughts)
    for kind, share in compose.THOUGHT_MIX.items():
        # Five standard errors of a share: sqrt(0.25 / 4000) = 0.0079 at most.
        assert abs(counts[kind] / len(lines) - share) < 0.04
    for line, (kind, thought) in zip(lines, thoughts, strict=True):
        verdict = compose.judge(thought, line)
        if kind in ("right", "backwards", "empty"):
            assert verdict == kind
        assert set(thought.split()) <= set(compose.WORDS)
    assert sum(compose.THOUGHT_MIX.values()) == pytest.approx(1)
    assert compose.THOUGHT_MIX["right"] < compose.THOUGHT_MIX["backwards"]


@pytest.mark.parametrize(
    "arguments", [dict(size=0), dict(lines=0), dict(steps=(1, 3)), dict(steps=(4, 3)), dict(steps=(3, 11))]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="compose: "):
        ComposeSource(**({"seed": 0, "size": 1} | arguments))


def test_packaged_base_model_can_think_but_has_no_reason_to():
    """What the quickstart rests on: it trusts right thoughts alone, knows nothing without one, and prefers to go
    backwards. (Chance is 1/8; 300 lines give it a standard error of 0.019.)"""
    model, params, tokenizer = load("quickstart")
    rng = np.random.default_rng(0)
    lines = compose.random_lines(rng, 300, (3, 7))
    width = 3 + 9 + 1 + 15 + 1  # instruction, question, tags and the longest thought

    def logits_after(texts):
        tokens = [tokenizer.encode(text) for text in texts]
        padded = np.array([row + [tokenizer.pad_id] * (width - len(row)) for row in tokens], np.int32)
        logits, _ = model.apply(params, padded)
        return np.asarray(logits)[np.arange(len(tokens)), [len(row) - 1 for row in tokens]]

    def thinking(line, words):
        return f"{compose.INSTRUCTION} {line.question()} {compose.OPEN} {words}"

    def accuracy(texts):
        best = logits_after(texts).argmax(-1)
        return np.mean([tokenizer.decode([token]) == line.answer for token, line in zip(best, lines, strict=True)])

    assert accuracy([thinking(line, f"{line.thought()} {compose.CLOSE}") for line in lines]) >= 0.98
    assert accuracy([line.question() for line in lines]) < 0.2
    assert accuracy([thinking(line, f"{line.thought(backwards=True)} {compose.CLOSE}") for line in lines]) < 0.2
    assert accuracy([thinking(line, compose.CLOSE) for line in lines]) < 0.2

    first = logits_after([thinking(line, line.start) for line in lines]).argmax(-1)
    backwards = [tokenizer.decode([token]) == line.operations[-1] for token, line in zip(first, lines, strict=True)]
    assert np.mean(backwards) >= 0.9

    states = []
    for line in lines:  # one step: the state that follows an operation, at a random place of a right thought
        words = line.thought().split()
        k = 2 * int(rng.integers(1, len(line.operations) + 1))
        states.append((thinking(line, " ".join(words[:k])), words[k]))
    best = logits_after([text for text, _ in states]).argmax(-1)
    assert np.mean([tokenizer.decode([t]) == state for t, (_, state) in zip(best, states, strict=True)]) >= 0.98


def test_packaged_tokenizer_knows_every_word_and_nothing_else_as_text():
    tokenizer = load("quickstart").tokenizer
    for word in (*compose.WORDS, compose.OPEN, compose.CLOSE):
        (token,) = tokenizer.encode(word)
        assert tokenizer.decode([token]) == word
    assert len(tokenizer.encode(f"= {compose.OPEN}a{compose.CLOSE} b")) == 5  # tags need no spaces
