# SPDX-License-Identifier: Apache-2.0
"""Several reading processes, a cache, a mixture: what changes how documents come changes nothing about which."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from data_formats import write
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import byte_tokenizer, tiny_config

from rlp_jax.config import Config, ConfigError, DataConfig
from rlp_jax.data.command import Bytes
from rlp_jax.data.documents import TokenizedDocument
from rlp_jax.data.pipeline import load_documents, mixture, train_batches
from rlp_jax.data.reading import read_all
from rlp_jax.data.sources import open_sources
from rlp_jax.settings import check_same_run, fingerprint

# A program without a main guard: a reading process that imported it would start over.
SCRIPT = """
import json, sys
from rlp_jax.config import DataConfig
from rlp_jax.data.command import Bytes
from rlp_jax.data.pipeline import load_documents
print("started")
data = DataConfig(tuple(sys.argv[2:]), malformed="skip", min_tokens=1, document_tokens=64, workers=int(sys.argv[1]))
splits = load_documents(data, Bytes(), 0)
pieces = [(piece.id, piece.tokens_T.tolist(), piece.name) for piece in [*splits.train, *splits.heldout]]
print(json.dumps([splits.report, pieces, list(splits.filtered)]))
"""


def records(count, first=0):
    return [{"text": f"{i} " + "xyz" * (i % 40)} for i in range(first, first + count)]


def same(a, b):
    assert a.report == b.report and a.parts == b.parts and list(a.filtered) == list(b.filtered)
    for one, two in ((a.train, b.train), (a.heldout, b.heldout)):
        assert [(p.id, p.name, p.answer) for p in one] == [(p.id, p.name, p.answer) for p in two]
        for p, q in zip(one, two, strict=True):
            np.testing.assert_array_equal(p.tokens_T, q.tokens_T, strict=True)
            np.testing.assert_array_equal(p.span_T, q.span_T, strict=True)


@pytest.mark.parametrize("how", ["script", "notebook"])
def test_reading_processes_change_nothing(tmp_path, how):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\nbroken\n{"text": "\xff"}\n{"text": "fine"}\n')
    sources = [write(tmp_path, kind, records(150)) for kind in ("jsonl.gz", "parquet")] + [str(tmp_path / "b.jsonl")]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # A notebook's __main__ is no file, like that of a program on standard input.
    command, text = ([str(script)], None) if how == "script" else (["-"], SCRIPT)
    command = [sys.executable, *command, "2", *sources]
    ran = subprocess.run(command, input=text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    started, found = ran.stdout.splitlines()
    assert started == "started"
    data = DataConfig(tuple(sources), malformed="skip", min_tokens=1, document_tokens=64)
    splits = load_documents(data, Bytes(), 0)
    pieces = [[piece.id, piece.tokens_T.tolist(), piece.name] for piece in [*splits.train, *splits.heldout]]
    assert json.loads(found) == [splits.report, pieces, list(splits.filtered)]
    assert (splits.report["documents"], splits.report["malformed"]) == (302, 2)


def test_a_limit_and_streamed_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    sources = [write(tmp_path, kind, records(100)) for kind in ("jsonl", "hf:streaming")]
    for source in sources:
        found = list(read_all(open_sources(DataConfig((source,)), 0), byte_tokenizer(), "", 70, 0))
        assert [tokens.document.text for tokens in found] == [record["text"] for record in records(70)]
    calls = []
    data = DataConfig((sources[0],), documents=5)
    assert load_documents(data, byte_tokenizer(), 0, progress=lambda *c: calls.append(c)).report["documents"] == 5
    assert calls[-1] == (5, 5)


def test_policies_drop_and_say_so(tmp_path):
    texts = ["abcdefgh", "abcdefgh", "a" * 30, "b", "\ufeffabcdefgh"]
    source = write(tmp_path, "jsonl", [{"text": text} for text in texts])
    base = DataConfig((source,), document_tokens=12, min_tokens=4, heldout_fraction=0.0)
    kept = load_documents(base, byte_tokenizer(), 0)
    assert kept.filtered.counts == {"copy_kept": 1, "cut": 1, "short": 1} and len(kept.train) == 6
    strict = dataclasses.replace(base, copies="drop", long="drop")
    dropped = load_documents(strict, byte_tokenizer(), 0)
    assert dropped.filtered.counts == {"copy": 1, "too_long": 1, "short": 1} and len(dropped.train) == 2
    assert dropped.report["too_long"] == 1
    assert [(e["place"], e["reason"], e["detail"]) for e in dropped.filtered] == [
        (f"{source}:2", "copy", ""),
        (f"{source}:3", "too_long", "30 tokens"),
        (f"{source}:4", "short", "1 tokens"),
    ]


def test_a_cache_holds_what_memory_holds(tmp_path):
    source = write(tmp_path, "jsonl", [*records(60), {"text": ""}, *records(3)])
    data = DataConfig((source, "compose:20"), document_tokens=24, min_tokens=2, heldout_fraction=0.2)
    cached = dataclasses.replace(data, cache=str(tmp_path / "cache"))
    plain = load_documents(data, byte_tokenizer(), 0)
    same(plain, load_documents(cached, byte_tokenizer(), 0))
    same(plain, again := load_documents(cached, byte_tokenizer(), 0))
    assert len(again.train[3:7]) == 4 and again.train[3:7][0].id == plain.train[3].id
    one, two = (
        train_batches(splits.train, 7, 24, 0, 5, 8, mixture=mixture(weighted, splits.parts), prefetch=ahead)
        for splits, ahead in ((plain, 0), (again, 3))
        for weighted in (dataclasses.replace(data, weights=(1.0, 2.0)),)
    )
    for _ in range(30):
        a, b = next(one), next(two)
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    assert one.get_state() == two.get_state()  # batches made ahead do not count
    with open(source, "a") as file:
        file.write('{"text": "one more"}\n')
    changed = load_documents(cached, byte_tokenizer(), 0)
    assert changed.report["documents"] == plain.report["documents"] + 1


def test_a_damaged_or_half_made_cache(tmp_path):
    source = write(tmp_path, "jsonl", records(30))
    data = DataConfig((source,), min_tokens=1, cache=str(tmp_path / "cache"))
    plain = load_documents(data, byte_tokenizer(), 0)
    (kept,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    (kept / "tokens").write_bytes((kept / "tokens").read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"data\.cache: .*tokens is damaged: delete"):
        load_documents(data, byte_tokenizer(), 0)
    kept.rename(kept.with_name(f".{kept.name}.unfinished"))  # as a killed process leaves it
    same(plain, load_documents(data, byte_tokenizer(), 0))
    broken = dataclasses.replace(data, text="{gone}")
    with pytest.raises(ConfigError, match="no field 'gone'"):
        load_documents(broken, byte_tokenizer(), 0)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache: .* cannot be written to"):
        load_documents(dataclasses.replace(data, cache=str(tmp_path / "file")), byte_tokenizer(), 0)


@settings(deadline=None, max_examples=8)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=4), data=st.data(), seed=st.integers(0, 99))
def test_mixtures_keep_their_shares_and_resume(counts, data, seed):
    weights = [data.draw(st.sampled_from([0.5, 1.0, 2.0, 7.0])) for _ in counts]
    documents = [TokenizedDocument(np.array([i]), np.ones(1, bool), i, "") for i in range(sum(counts))]
    mixed = list(zip(counts, weights, strict=True))

    def make(rows=None):
        return train_batches(documents, 1, 4, 0, seed, mixture=mixed, rows=rows)

    batches, seen, states = make(), [], []
    for _ in range(100):
        states.append(batches.get_state())
        seen.append(int(next(batches)["document_B"][0]))
    bounds = np.cumsum([0, *counts])
    part = np.searchsorted(bounds, seen, side="right") - 1
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        drawn = np.array(seen)[part == number]
        assert abs(len(drawn) - 100 * share) <= len(counts) + 1  # an even pace
        epoch = drawn[: counts[number]]
        assert len(set(epoch.tolist())) == len(epoch)  # none twice before all have come
    at = data.draw(st.integers(0, 90))
    resumed = make()
    resumed.set_state(json.loads(json.dumps(states[at])))
    assert [int(next(resumed)["document_B"][0]) for _ in range(10)] == seen[at : at + 10]
    with pytest.raises(ConfigError, match="belongs to other documents"):
        train_batches(documents, 1, 4, 0, seed, mixture=[(n, w + 1) for n, w in mixed]).set_state(states[0])


def test_processes_read_their_own_rows_alone():
    class Watched(list):
        ids, lengths, answer_bytes = np.arange(50), np.arange(50) % 7 + 1, 0

        def __getitem__(self, i):
            touched.add(i)
            return super().__getitem__(i)

    length = np.arange(50) % 7 + 1
    documents = Watched(TokenizedDocument(np.full(length[i], i), np.ones(length[i], bool), i, "") for i in range(50))
    touched: set[int] = set()
    whole = next(train_batches(documents, 8, 16, 0, 1, 2))
    for rows in (range(4), range(4, 8)):
        touched.clear()
        part = next(train_batches(documents, 8, 16, 0, 1, 2, rows=rows))
        assert touched == set(whole["document_B"][list(rows)].tolist())
        assert all(np.array_equal(part[key], whole[key][list(rows)]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0, 2.0)}, "data.weights has 2 numbers and data.sources 1 sources"),
        ({"weights": (0.0,)}, "every weight must be positive"),
        ({"weights": (float("nan"),)}, "every weight must be positive"),
        ({"workers": -1}, "data.workers is -1"),
        ({"prefetch": -1}, "data.prefetch is -1"),
        ({"documents": -1}, "data.documents is -1"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_documents(DataConfig(("compose:4",), **changes), byte_tokenizer(), 0)
    with pytest.raises(ConfigError, match="gives no training document"):
        mixture(DataConfig(("a", "b"), weights=(1.0, 1.0)), (3, 0))


def test_how_documents_are_read_may_change_within_a_run(tmp_path):
    config = tiny_config(tmp_path)
    quicker = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=4, prefetch=2, cache="x"))
    assert fingerprint(config) == fingerprint(quicker)
    check_same_run(quicker, config, tmp_path)
    weighted = dataclasses.replace(config, data=dataclasses.replace(config.data, weights=(1.0,)))
    assert fingerprint(config) != fingerprint(weighted)
    with pytest.raises(ConfigError, match=r"data\.weights"):
        check_same_run(weighted, config, tmp_path)
    # A run of before any of these settings has the fingerprint that it had.
    assert fingerprint(Config()) == "687857026c450344"
