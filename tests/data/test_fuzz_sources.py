# SPDX-License-Identifier: Apache-2.0
"""Random bytes among good records: no crash, no good record lost, every bad one counted and listed."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.command import Bytes
from rlp_jax.data.filters import Filtered
from rlp_jax.data.pipeline import load_documents

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
# Lines of anything, and lines that are nearly right.
GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT, st.lists, max_leaves=4).map(
        lambda value: json.dumps(value).encode()
    ),
    st.dictionaries(st.sampled_from(["txt", "Text", ""]), TEXT, max_size=2).map(
        lambda value: json.dumps(value).encode()
    ),
    st.sampled_from(
        [b'{"text": null}', b'{"text": [1]}', b'{"text": "\\ud800"}', b'{"text": "a"', b"[" * 5000, b"\x00"]
    ),
)
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, **changes):
    data = DataConfig((str(path),), document_tokens=10**6, min_tokens=1, heldout_fraction=0.0, **changes)
    return load_documents(data, Bytes(), 0)


def usable(line: bytes) -> bool:
    """What the format says of a line, without our reader."""
    try:
        record = json.loads(line.decode())
        return (
            isinstance(record, dict)
            and isinstance(record["text"], str | int | float)
            and bool(str(record["text"]).encode())
        )
    except (ValueError, KeyError, RecursionError):
        return False


@FUZZ
@given(lines=st.lists(st.tuples(st.booleans(), TEXT, GARBAGE), min_size=1, max_size=12))
@example(lines=[(True, "a", b""), (False, "", b"\xef\xbb\xbf"), (True, "b", b"")])
def test_jsonl(tmp_path, lines):
    path = tmp_path / "a.jsonl"
    raw = [json.dumps({"text": text}).encode() if good else garbage for good, text, garbage in lines]
    path.write_bytes(b"\n".join([*raw, b'{"text": "last"}']))
    written = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [i for i, line in enumerate(written, 1) if line.removeprefix(b"\xef\xbb\xbf").strip() and not usable(
        line.removeprefix(b"\xef\xbb\xbf"))]  # fmt: skip
    good = [json.loads(line.removeprefix(b"\xef\xbb\xbf"))["text"] for i, line in enumerate(written, 1)
            if line.removeprefix(b"\xef\xbb\xbf").strip() and i not in expected]  # fmt: skip
    splits = read(path, malformed="skip")
    assert [bytes(piece.tokens_T.astype("u1")).decode() for piece in splits.train] == [str(text) for text in good]
    listed = [int(e["place"].rpartition(":")[2]) for e in splits.filtered if e["reason"] in ("malformed", "encoding")]
    assert listed == expected and splits.report["malformed"] == len(expected)
    assert splits.report["documents"] == len(good)
    if expected:
        with pytest.raises(ConfigError, match=rf"a\.jsonl:{expected[0]}: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@FUZZ
@given(content=st.binary(max_size=200), kind=st.sampled_from(["txt", "txt.gz", "jsonl.gz", "jsonl.zst", "parquet"]))
@example(content=b"\x1f\x8b\x08\x00", kind="jsonl.gz")
@example(content=b"PAR1" * 4, kind="parquet")
@example(content=b"\x28\xb5\x2f\xfd\x04", kind="jsonl.zst")
def test_whole_files_of_anything(tmp_path, content, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    splits = read(path, malformed="skip")
    assert splits.report["documents"] + splits.report["malformed"] >= 1
    assert sum(splits.filtered.counts[reason] for reason in ("malformed", "encoding")) == splits.report["malformed"]


@FUZZ
@given(at=st.integers(0, 10**6), flip=st.integers(1, 255), kind=st.sampled_from(["jsonl.gz", "jsonl.zst", "parquet"]))
def test_one_wrong_byte_in_a_compressed_file(tmp_path, at, flip, kind):
    from data_formats import write

    texts = [f"{i} " + "abc" * i for i in range(30)]
    path = tmp_path / f"records.{kind}"
    raw = bytearray(open(write(tmp_path, kind, [{"text": text} for text in texts]), "rb").read())  # noqa: SIM115
    raw[at % len(raw)] ^= flip
    path.write_bytes(raw)
    try:
        splits = read(path, malformed="skip")
    except ConfigError as error:  # the name of the column itself was hit
        assert "no column" in str(error)
        return
    assert splits.report["documents"] == len(texts) or splits.report["malformed"] or splits.train


def test_the_list_survives_saving(tmp_path):
    filtered = Filtered()
    for i in range(5):
        filtered.add("short", f"f:{i}", "1 tokens", "\ud800<script>\n" * 20)
    filtered.save(tmp_path / "filtered.jsonl")
    again = Filtered.load(tmp_path / "filtered.jsonl")
    assert list(again) == list(filtered) and again.counts == filtered.counts == {"short": 5}
    assert all("\n" not in line for line in (tmp_path / "filtered.jsonl").read_text().splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["filtered.jsonl"]
