# SPDX-License-Identifier: Apache-2.0
"""Every format gives the same documents, in any order; what is wrong with a file is one line."""

import gzip
import json
import pickle

import fsspec
import numpy as np
import pytest
from data_formats import jsonl, write

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.columns import write_array_record
from rlp_jax.data.documents import Malformed
from rlp_jax.data.files import JsonlSource, format_of, list_files
from rlp_jax.data.sources import open_sources, stamps

KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "array_record", "hf", "tfds")
RECORDS = [{"text": f"document {i} äöü\n" + "word " * (i % 9), "n": i} for i in range(40)]


def opened(source, **changes):
    return open_sources(DataConfig(sources=(source,), **changes), seed=0)


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf_cache")))
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(tmp_path, kind):
    (source,) = opened(write(tmp_path, kind, RECORDS))
    assert [document.text for document in source.read(0, len(source))] == [record["text"] for record in RECORDS]
    copy = pickle.loads(pickle.dumps(source))  # as reading processes get it
    for i in np.random.default_rng(0).permutation(len(RECORDS))[:10].tolist():
        assert (copy[i].text, copy[i].id) == (RECORDS[i]["text"], i)
    assert source[3].name.endswith(":4")


def test_a_streamed_dataset_comes_from_the_front(tmp_path):
    (source,) = opened(write(tmp_path, "hf:streaming", RECORDS))
    assert source.length is None
    assert [document.text for document in source.read(2, 5)] == [record["text"] for record in RECORDS[2:5]]
    assert len(list(source.read(0, 1000))) == len(RECORDS)


def test_rlp_documents_keep_spans_answers_and_places(tmp_path):
    from rlp_jax.data.rlp_documents import build

    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"q": "2+2?", "a": "4"}, {"q": "1+1?", "a": "2"}]) + b"broken\n")
    data = DataConfig((str(path),), text="{q} {a}", span="{a}", answer="{a}", malformed="skip")
    directory, count, filtered = build("questions", data, tmp_path / "datasets")
    assert count == 2 and filtered.counts == {"malformed": 1}
    for split, number in (("train", 2), ("train[:1]", 1)):
        (source,) = opened(f"tfds:{directory}:{split}")
        assert len(source) == number
    (source,) = opened(f"tfds:{directory}:train")
    assert source[1]._replace(id=0) == ("1+1? 2", ((5, 6),), 0, f"{path}:2", "2")
    with pytest.raises(ConfigError, match="is there already"):
        build("questions", data, tmp_path / "datasets")
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: not JSON"):
        build("broken", DataConfig((str(path),), text="{q}"), tmp_path / "datasets")
    assert not (tmp_path / "datasets" / "rlp_documents" / "broken").exists()


def test_patterns_and_directories(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        content = jsonl([{"text": name}])
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [s[0].text for s in opened(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert [s[0].text for s in opened(str(tmp_path))] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    with pytest.raises(ConfigError, match="no file"):
        opened(str(tmp_path / "*.parquet"))
    assert format_of("x.array_record-00000-of-00002") == ".array_record"
    assert format_of("x.parquet.gz") is None
    (tmp_path / "d[1].jsonl").write_bytes(jsonl([{"text": "literal"}]))
    assert list_files(str(tmp_path / "d[1].jsonl")) == [str(tmp_path / "d[1].jsonl")]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "array_record"])
def test_files_behind_a_url(tmp_path, kind):
    local = write(tmp_path, kind, RECORDS)
    store = fsspec.filesystem("memory")
    store.pipe(f"/bucket/{kind}/x.{kind}", open(local, "rb").read())  # noqa: SIM115
    for source in (f"memory://bucket/{kind}/x.{kind}", f"memory://bucket/{kind}/*.{kind}", f"memory://bucket/{kind}"):
        (found,) = opened(source)
        assert [found[i].text for i in (39, 0, 7)] == [RECORDS[i]["text"] for i in (39, 0, 7)]
    (found,) = opened(f"file://{local}")
    assert found[5].text == RECORDS[5]["text"]
    with pytest.raises(ConfigError, match="no file memory://"):
        opened(f"memory://bucket/gone.{kind}")


def test_unknown_places():
    with pytest.raises(ConfigError, match=r"data\.sources: nosuch://a/b\.jsonl"):
        opened("nosuch://a/b.jsonl")
    for source in ("hf:", "hf:a:b:c:other", "tfds:name", "tfds::train"):
        with pytest.raises(ConfigError, match=r"write (hf|tfds):NAME"):
            opened(source)
    with pytest.raises(ConfigError, match="cannot be had") as caught:
        opened("tfds:nosuch/thing:train")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    for kind in ("parquet", "hf"):
        with pytest.raises(ConfigError, match="no column 'body', the columns are 'text', 'n'"):
            opened(write(tmp_path, kind, RECORDS), text="{body}")


@pytest.mark.parametrize("kind", ["parquet", "array_record", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("content", [b"", b"garbage " * 20000])
def test_files_that_are_not_what_they_say(tmp_path, kind, content):
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        opened(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    (source,) = opened(str(path), malformed="skip")
    (found,) = source.read(0, len(source))
    assert isinstance(found, Malformed)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_the_good_lines_of_a_damaged_file_come_first(tmp_path, kind):
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnop"), (1500, 500))  # several blocks of zstd
    records = [{"text": "".join(row)} for row in letters]
    path = tmp_path / f"cut.{kind}"
    whole = open(write(tmp_path, kind, records), "rb").read()  # noqa: SIM115
    path.write_bytes(whole[: len(whole) * 2 // 3])
    source = JsonlSource(path)
    *good, last = source.read(0, len(source))
    assert isinstance(last, Malformed) and "from this line on" in last.reason
    assert [document.text for document in good] == [record["text"] for record in records[: len(good)]]
    assert len(good) > 600


def test_records_of_bytes(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(str(path), [{"text": "good"}])
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["text"].bytes_list.value.append("grün".encode())
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for raw in (example.SerializeToString(), b"{\xff}", b"\x00\x01\x02", b"", b'{"text": "json"}'):
        writer.write(raw)
    writer.close()
    (source,) = opened(str(path))
    first, *bad, last = source.read(0, len(source))
    assert (first.text, last.text) == ("grün", "json")
    assert [(found.place, found.encoding) for found in bad] == [
        (f"{path}:2", True), (f"{path}:3", False), (f"{path}:4", False),
    ]  # fmt: skip


def test_stamps_tell_contents_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    before = stamps(DataConfig((str(path),)))
    assert before == stamps(DataConfig((str(path),)))
    path.write_text(json.dumps({"text": "longer"}) + "\n")
    assert before != stamps(DataConfig((str(path),)))
