# SPDX-License-Identifier: Apache-2.0
"""From files to batches: nothing lost, nothing on both sides of the split, and resumption to the bit."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.documents import Document, TokenizedDocument, cut, is_heldout, narrow_spans, tokenize
from rlp_jax.data.pipeline import collate, heldout_batches, load_documents, train_batches
from rlp_jax.data.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TRAINING_TEXT = ["the cat sat on the mat because the mat was warm and the answer is 42"] * 4


def bpe(texts=()):
    """A real byte-level BPE tokenizer: bytes alone, or merges learned from the texts."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 60 * bool(texts), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


BYTES, BPE = bpe(), bpe(TRAINING_TEXT)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def config(*sources, **changes):
    defaults = DataConfig(sources=sources, document_tokens=16, min_tokens=1, heldout_fraction=0.3)
    return dataclasses.replace(defaults, **changes)


def pieces(lengths):
    """Documents whose tokens are their own number, so that a row of a batch tells which it is."""
    return [
        TokenizedDocument(np.full(length, i, np.int32), np.arange(length) % 2 == 0, 1000 + i, f"file:{i}")
        for i, length in enumerate(lengths)
    ]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], strict=True)


@settings(deadline=None)
@given(text=TEXT, document_tokens=st.integers(1, 20))
def test_pieces_together_are_the_document(text, document_tokens):
    document = Document(text, ((0, len(text)),), 0, "f:1")
    parts = cut(document, BPE, document_tokens)
    assert [token for part in parts for token in part.tokens_T] == BPE.encode(text)
    assert all(len(part.tokens_T) == document_tokens for part in parts[:-1])
    assert all(part.tokens_T.dtype == np.int32 and part.span_T.all() for part in parts)
    assert len({part.id for part in parts}) == len(parts)
    assert all(0 <= part.id < 2**31 for part in parts)


def test_names_of_pieces():
    parts = cut(Document("abcde", ((0, 5),), 0, "f:3"), BYTES, 2)
    assert [part.name for part in parts] == ["f:3", "f:3#2", "f:3#3"]


@settings(deadline=None)
@given(parts=st.lists(TEXT, min_size=3, max_size=3))
def test_span_tokens_are_those_that_overlap_the_span(parts):
    before, inside, after = parts
    text, start = before + inside + after, len(before)
    end = start + len(inside)
    tokens_T, span_T = tokenize(Document(text, ((start, end),) if inside else (), 0, "f:1"), BPE)
    ids, offsets = BPE.encode_with_offsets(text)
    assert tokens_T.tolist() == ids
    expected = [bool(set(range(*offset)) & set(range(start, end))) for offset in offsets]
    assert span_T.tolist() == expected
    # Every character of the span is in a chosen token.
    chosen = [set(range(*offset)) for offset, flag in zip(offsets, span_T, strict=True) if flag]
    assert set(range(start, end)) <= set().union(*chosen)


def test_span_of_an_answer_is_its_tokens():
    text = "the mat was warm and the answer is 42"
    tokens_T, span_T = tokenize(Document(text, ((len(text) - 2, len(text)), (4, 7)), 0, "f:1"), BPE)
    assert BPE.decode(tokens_T[span_T]) in (" mat 42", " mat42")


def narrowed(text, spans, pattern):
    return narrow_spans(Document(text, spans, 0, "f:1"), re.compile(pattern)).spans


def test_span_pattern_keeps_matches_within_spans():
    text = "one 12\ntwo 345\n"
    assert narrowed(text, ((0, 15),), r"\d+") == ((4, 6), (11, 14))
    assert narrowed(text, ((5, 13),), r"\d+") == ((5, 6), (11, 13))  # never beyond a span
    assert narrowed(text, ((0, 4), (7, 11)), r"\d+") == ()


def test_empty_matches_of_a_span_pattern_are_the_characters_after_them():
    text = "Answer: a\nbc\nd"
    assert narrowed(text, ((8, 14),), "(?m)^") == ((10, 11), (13, 14))  # the span's own start is no line start
    assert narrowed(text, ((10, 14),), "(?m)^") == ((10, 11), (13, 14))  # here it is
    assert narrowed(text, ((8, 14),), "(?m)^|(?<=: )") == ((8, 9), (10, 11), (13, 14))
    assert narrowed(text, ((8, 14),), "$") == ()  # nothing follows in the span


def test_span_pattern_chooses_the_tokens_of_line_starts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "x\ny\n", "a": "ab\ncd\nef"}) + "\n" + json.dumps({"q": "x\ny", "a": "ab"}) + "\n")
    settings_ = config(str(path), text="{q}{a}", span="{a}", span_pattern="(?m)^", heldout_fraction=0.0)
    splits = load_documents(settings_, BYTES, seed=0, position_mode="span")
    (piece,) = splits.train
    assert BYTES.decode(piece.tokens_T[piece.span_T]) == "ace"
    assert splits.report["without_span"] == 1


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "(?P<x"])
def test_a_broken_span_pattern_is_named(tmp_path, pattern):
    path = write(tmp_path / "a.jsonl", ["abc"])
    with pytest.raises(ConfigError, match=r"data\.span_pattern is .*no regular expression"):
        load_documents(config(path, span_pattern=pattern), BYTES, seed=0)


def test_reading_counts_what_it_drops(tmp_path):
    texts = ["abcdefghij", "abc", "klmnopqrstuv", "abcdefghij", ""]
    path = write(tmp_path / "a.jsonl", texts)
    splits = load_documents(config(path, document_tokens=5, min_tokens=3, heldout_fraction=0.0), BYTES, seed=0)
    assert splits.report == {
        "documents": 5,
        "duplicates": 1,
        "pieces": 8,
        "short": 1,  # "uv"
        "without_span": 0,
        "train": 7,
        "heldout": 0,
        "heldout_unused": 0,
        "train_tokens": 33,
        "heldout_tokens": 0,
    }
    decoded = [BYTES.decode(piece.tokens_T) for piece in splits.train]
    assert decoded == ["abcde", "fghij", "abc", "klmno", "pqrst", "abcde", "fghij"]
    assert len({piece.id for piece in splits.train}) == 7  # copies have ids of their own


def test_mode_span_drops_pieces_without_a_span_token(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "0123456789", "a": "ab"}\n{"q": "0", "a": ""}\n')
    settings_ = config(str(path), text="{q}{a}", span="{a}", document_tokens=5, heldout_fraction=0.0)
    splits = load_documents(settings_, BYTES, seed=0, position_mode="span")
    assert [BYTES.decode(piece.tokens_T) for piece in splits.train] == ["ab"]
    assert splits.report["without_span"] == 3
    assert len(load_documents(settings_, BYTES, seed=0).train) == 4


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(TEXT.filter(str.strip), min_size=1, max_size=20),
    fraction=st.sampled_from([0.0, 0.3, 0.7]),
    data=st.data(),
)
def test_split_depends_on_texts_alone(tmp_path, texts, fraction, data):
    texts += data.draw(st.lists(st.sampled_from(texts), max_size=5))  # copies
    shuffled = data.draw(st.permutations(texts))
    at = data.draw(st.integers(1, len(texts)))
    one = write(tmp_path / "one.jsonl", texts)
    two = [write(tmp_path / f"{i}.jsonl", part) for i, part in enumerate((shuffled[:at], shuffled[at:])) if part]
    change = {"heldout_fraction": fraction, "document_tokens": 8}
    a = load_documents(config(one, **change), BPE, seed=0)
    b = load_documents(config(*two, **change), BPE, seed=1)

    assert a.report == b.report
    assert [piece.id for piece in a.heldout] == [piece.id for piece in b.heldout]
    assert sorted(piece.id for piece in a.train) == sorted(piece.id for piece in b.train)
    # All tokens are somewhere, and every text is on the side its hash says.
    assert a.report["train_tokens"] + a.report["heldout_tokens"] == sum(len(BPE.encode(text)) for text in texts)
    for split, side in ((a.train, False), (a.heldout, True)):
        rows = {int(piece.name.rpartition(":")[2].partition("#")[0]) - 1 for piece in split}
        assert rows == {i for i, text in enumerate(texts) if is_heldout(text, fraction) == side}


def test_split_has_the_size_asked_for_and_grows_with_it():
    texts = [f"document {i}" for i in range(5000)]
    small = {text for text in texts if is_heldout(text, 0.05)}
    large = {text for text in texts if is_heldout(text, 0.2)}
    assert small < large
    assert 190 < len(small) < 310 and 880 < len(large) < 1120  # 4 standard deviations
    # blake2b is fixed: a run resumed by another version of Python must find the same split.
    assert [i for i in range(60) if is_heldout(f"document {i}", 0.05)] == [10, 20, 39]


def test_heldout_documents_caps_the_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"document {i}" for i in range(60)])
    everything = load_documents(config(path, heldout_fraction=0.5), BPE, seed=0)
    capped = load_documents(config(path, heldout_fraction=0.5, heldout_documents=7), BPE, seed=0)
    assert [piece.id for piece in capped.heldout] == [piece.id for piece in everything.heldout[:7]]
    assert capped.report["heldout_unused"] == len(everything.heldout) - 7
    assert [piece.id for piece in capped.train] == [piece.id for piece in everything.train]


def test_progress_is_told(tmp_path):
    calls = []
    load_documents(
        config(write(tmp_path / "a.jsonl", ["a", "b"]), "compose:2"), BYTES, 0, progress=lambda *c: calls.append(c)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("document_tokens", 0),
        ("min_tokens", 0),
        ("min_tokens", 17),
        ("heldout_fraction", 1.0),
        ("heldout_fraction", -0.1),
        ("heldout_fraction", float("nan")),
        ("heldout_documents", -1),
    ],
)
def test_settings_out_of_range(tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"data\.{field} is {value}"):
        load_documents(config(write(tmp_path / "a.jsonl", ["a"]), **{field: value}), BYTES, 0)


def test_broken_line_is_named_while_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not JSON"):
        load_documents(config(str(path)), BYTES, 0)


def test_collate_pads_to_few_lengths():
    documents = pieces([3, 5])
    batch = collate(documents, document_tokens=16, pad_id=99, pad_multiple=4)
    np.testing.assert_array_equal(batch["tokens_BT"], [[0, 0, 0, 99, 99, 99, 99, 99], [1, 1, 1, 1, 1, 99, 99, 99]])
    np.testing.assert_array_equal(batch["span_BT"], [[1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 0, 0]])
    assert {key: (value.tolist(), value.dtype) for key, value in batch.items() if value.ndim == 1} == {
        "length_B": ([3, 5], np.int32),
        "document_B": ([1000, 1001], np.int64),
        "weight_B": ([1.0, 1.0], np.float32),
    }
    assert batch["tokens_BT"].dtype == np.int32 and batch["span_BT"].dtype == bool
    assert collate(documents, 16, 0)["tokens_BT"].shape == (2, 16)  # never more than document_tokens
    assert collate(documents, 5, 0, pad_multiple=4)["tokens_BT"].shape == (2, 5)
    assert collate(pieces([8]), 16, 0, pad_multiple=4)["tokens_BT"].shape == (1, 8)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 40), share=st.floats(0.01, 1), seed=st.integers(-(2**40), 2**40))
def test_every_epoch_holds_every_document_once(count, share, seed):
    batch_documents = max(1, int(count * share))
    batches = train_batches(pieces([2] * count), batch_documents, 4, 0, seed)
    epochs = 3
    stream = []
    while len(stream) < epochs * count:
        batch = next(batches)
        assert batch["tokens_BT"].shape == (batch_documents, 4)
        np.testing.assert_array_equal(batch["tokens_BT"][:, 0] + 1000, batch["document_B"])
        stream.extend(batch["document_B"].tolist())
    orders = [tuple(stream[epoch * count : (epoch + 1) * count]) for epoch in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(1000, 1000 + count))
    if count > 10:  # two equal permutations: less than one in 10^7
        assert len(set(orders)) == epochs


def test_neighbouring_seeds_share_no_epoch():
    def epochs(seed):
        batches = train_batches(pieces([2] * 20), 20, 4, 0, seed)
        return {tuple(next(batches)["document_B"].tolist()) for _ in range(5)}

    assert len(epochs(0) | epochs(1) | epochs(2)) == 15


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=3, max_size=20),
    batch_documents=st.integers(1, 3),
    seed=st.integers(0, 1000),
    stops=st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
def test_resumed_batches_equal_uninterrupted_ones(lengths, batch_documents, seed, stops):
    documents = pieces(lengths)

    def make():
        return train_batches(documents, batch_documents, 12, 0, seed, pad_multiple=4)

    whole = make()
    expected = [next(whole) for _ in range(sum(stops) + 2)]
    batches, seen = make(), 0
    for stop in stops:
        for _ in range(stop):
            same(next(batches), expected[seen])
            seen += 1
        state = batches.get_state()
        kept = copy.deepcopy(state)
        next(batches)  # read ahead, then die: the state must not have moved along
        assert state == kept
        batches = make()
        batches.set_state(json.loads(json.dumps(state)))
    same(next(batches), expected[seen])
    whole.set_state(state)  # backwards
    same(next(whole), expected[seen])


@pytest.mark.parametrize("change", ["documents", "batch", "seed"])
def test_a_state_of_other_data_is_refused(change):
    state = train_batches(pieces([4] * 8), 2, 4, 0, 0).get_state()
    other = {
        "documents": lambda: train_batches(pieces([4] * 9), 2, 4, 0, 0),
        "batch": lambda: train_batches(pieces([4] * 8), 3, 4, 0, 0),
        "seed": lambda: train_batches(pieces([4] * 8), 2, 4, 0, 1),
    }[change]()
    with pytest.raises(ConfigError, match="data position belongs to other documents"):
        other.set_state(state)


def test_too_few_training_documents():
    with pytest.raises(ConfigError, match=r"batch_documents is 4 but data\.sources give 3 training documents"):
        train_batches(pieces([4] * 3), 4, 4, 0, 0)
    with pytest.raises(ConfigError, match="batch_documents is 0"):
        train_batches(pieces([4] * 3), 0, 4, 0, 0)


def test_heldout_batches_keep_the_order_and_weigh_the_filling_nothing():
    documents = pieces([3, 4, 5, 6, 7])
    batches = heldout_batches(documents, 2, limit=10, document_tokens=8, pad_id=0, pad_multiple=8)
    assert [batch["document_B"].tolist() for batch in batches] == [[1000, 1001], [1002, 1003], [1004, 1000]]
    assert [batch["weight_B"].tolist() for batch in batches] == [[1, 1], [1, 1], [1, 0]]
    assert all(batch["weight_B"].dtype == np.float32 for batch in batches)
    limited = heldout_batches(documents, 2, limit=3, document_tokens=8, pad_id=0, pad_multiple=8)
    assert [batch["weight_B"].tolist() for batch in limited] == [[1, 1], [1, 0]]
    (one,) = heldout_batches(documents[:1], 4, limit=3, document_tokens=8, pad_id=0)
    assert one["document_B"].tolist() == [1000] * 4 and one["weight_B"].tolist() == [1, 0, 0, 0]


def test_no_heldout_document():
    with pytest.raises(ConfigError, match=r"no document fell into the held-out split: raise data\.heldout_fraction"):
        heldout_batches([], 2, 10, 8, 0)
    with pytest.raises(ConfigError, match=r"eval\.documents is 0"):
        heldout_batches(pieces([3]), 2, 0, 8, 0)
