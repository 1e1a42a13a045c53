# SPDX-License-Identifier: Apache-2.0
"""Sources: what they give, and the one line that names file, line and field when a file is broken."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlp_jax.config import ConfigError, DataConfig
from rlp_jax.data.documents import Document
from rlp_jax.data.sources import JsonlSource, TextSource, open_sources

# Everything but half surrogate pairs, which are not text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_all(path, text="{text}", span=""):
    source = JsonlSource(path, text, span)
    return [source[i] for i in range(len(source))]


def error(path, text="{text}", span=""):
    with pytest.raises(ConfigError) as caught:
        read_all(path, text, span)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_fields_make_text_and_span(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "4 + 4?", "a": 8}, {"q": "8 - 4?", "a": "4"})
    first, second = read_all(path, "Q: {q}\nA: {a}\n", "{a}")
    assert first == Document("Q: 4 + 4?\nA: 8\n", ((13, 14),), 0, f"{path}:1")
    # "4" stands in the question too: the span is where the template puts it.
    assert second == Document("Q: 8 - 4?\nA: 4\n", ((13, 14),), 1, f"{path}:2")


@pytest.mark.parametrize(
    ("text", "span", "marked"),
    [
        ("{q} {a}", "", ["ab c ab"]),
        ("{q} {a}", "{a}", ["ab"]),
        ("{q} {a}", "{q} {a}", ["ab c ab"]),
        ("{a}{q}{a}", "{a}", ["ab", "ab"]),
        ("{{{a}}} {q}", "{a}", ["ab"]),
        ("{q} end", "end", ["end"]),
        ("{q} {a}", "c", ["c"]),
        ("{q} {a}", "{part}", ["b c"]),
        ("{q}{none}", "{none}", []),
    ],
)
def test_spans(tmp_path, text, span, marked):
    path = write(tmp_path / "a.jsonl", {"q": "ab c", "a": "ab", "part": "b c", "none": ""})
    (document,) = read_all(path, text, span)
    assert [document.text[start:end] for start, end in document.spans] == marked
    if text == "{{{a}}} {q}":
        assert document.spans == ((1, 3),)


def test_a_span_found_in_the_text_is_the_last_one(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "7 and 7", "answer": "7"})
    assert read_all(path, span="{answer}")[0].spans == ((6, 7),)


def test_items_of_fields_and_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", {"meta": {"title": "T"}, "parts": ["x", "y"], "n": 1.5})
    assert read_all(path, "{meta[title]} {parts[1]} {n:.2f}")[0].text == "T y 1.50"


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=6), data=st.data())
def test_records_come_back_whole_and_in_any_order(tmp_path, texts, data):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=data.draw(st.booleans())) for text in texts]
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(lines), max_size=len(lines)))
    content = "".join("\n \r\n"[: 3 * gap] + line + "\n" for gap, line in zip(gaps, lines, strict=True))
    if data.draw(st.booleans()):
        content = content.rstrip("\n")
    mark = b"\xef\xbb\xbf" if data.draw(st.booleans()) else b""
    path.write_bytes(mark + content.encode())
    source = JsonlSource(path)
    assert len(source) == len(texts)
    for i in data.draw(st.permutations(range(len(texts)))):
        assert (source[i].text, source[i].id) == (texts[i], i)
        number = int(source[i].name.rpartition(":")[2])
        stored = path.read_bytes().removeprefix(mark).split(b"\n")[number - 1]
        assert json.loads(stored) == {"text": texts[i]}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    good=st.integers(0, 5),
    blank=st.integers(0, 2),
    bad=st.sampled_from(
        [
            (b'{"text": "a"', "not JSON"),
            (b"plain", "not JSON"),
            (b'["text"]', "expected a JSON object, found list"),
            (b"3", "expected a JSON object, found int"),
            (b'{"txt": "a", "id": 1}', "no field 'text', the fields are 'txt', 'id'"),
            (b"{}", "no field 'text', the fields are none"),
            (b'{"text": null}', "field 'text' is null"),
            (b'{"text": ["a"]}', "field 'text' is a list"),
            (b'{"text": {"a": 1}}', "field 'text' is an object"),
            (b'{"text": "\xff"}', "byte 0xff is not UTF-8"),
            (b'{"text": "\\ud83d"}', "\\ud83d is half of a character"),
            (b"[" * 100_000, "cannot read this JSON"),
        ]
    ),
)
def test_a_broken_line_is_named(tmp_path, good, blank, bad):
    raw, expected = bad
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * good + b"\n" * blank + raw + b'\n{"text": "fine"}\n')
    message = error(path)
    assert message.startswith(f"{path}:{good + blank + 1}: ")
    assert expected in message


def test_what_else_can_be_wrong_with_a_record(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "meta": {"b": "c"}, "answer": "z"})
    assert error(path, "{meta[x]}") == f"{path}:1: no 'meta[x]' in field 'meta'"
    assert error(path, "{text.x}") == f"{path}:1: no 'text.x' in field 'text'"
    assert error(path, "{text:d}").startswith(f"{path}:1: ")
    assert error(path, span="{answer}") == f"{path}:1: data.span gives 'z', which is not in the document's text"
    assert "no field 'gone'" in error(path, span="{gone}")


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{0}", "text"])
def test_broken_templates(tmp_path, template):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    assert error(path, text=template).startswith(f"data.text is {template!r}")


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\ntwö\n".encode())
    source = TextSource(path)
    assert len(source) == 1
    assert source[0] == Document("one\n\ntwö\n", ((0, 9),), 0, f"{path}:1")


def test_text_file_that_is_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\nthr\xe9e\n")
    with pytest.raises(ConfigError, match=r"a\.txt:3: byte 0xe9 is not UTF-8"):
        TextSource(path)[0]


def test_directories_are_read_in_order_of_name(tmp_path):
    write(tmp_path / "b.jsonl", {"text": "b"})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("z")
    (tmp_path / "notes.md").write_text("not read")
    sources = open_sources(DataConfig(sources=(str(tmp_path),)), seed=0)
    assert [source[0].text for source in sources] == ["z", "b"]


def test_generators_go_by_name():
    (source,) = open_sources(DataConfig(sources=("compose:5",)), seed=3)
    assert len(source) == 5
    assert source[4].text and source[4].text == open_sources(DataConfig(sources=("compose:9",)), seed=3)[0][4].text
    assert source[4].text != open_sources(DataConfig(sources=("compose:5",)), seed=4)[0][4].text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gone.jsonl", "no file"),
        ("gone", "none of a .jsonl, .txt, .parquet or .array_record file"),
        ("some.csv", "none of a .jsonl, .txt, .parquet or .array_record file"),
        ("empty.jsonl", "holds no documents"),
        ("blank.jsonl", "holds no documents"),
        ("empty.txt", "is empty"),
        ("blank.txt", "is empty"),
        ("folder", "a directory without a .jsonl, .txt, .parquet or .array_record file"),
    ],
)
def test_sources_that_cannot_be_opened(tmp_path, source, expected):
    (tmp_path / "folder").mkdir()
    (tmp_path / "some.csv").write_text("a,b")
    for name, content in (("empty.jsonl", ""), ("blank.jsonl", "\n  \n"), ("empty.txt", ""), ("blank.txt", " \n")):
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        open_sources(DataConfig(sources=(str(tmp_path / source),)), seed=0)[0][0]
    assert source in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["compose:", "compose:0", "compose:-3", "compose:x", "compose:²"])
def test_generators_of_no_size(source):
    with pytest.raises(ConfigError, match="number of documents"):
        open_sources(DataConfig(sources=(source,)), seed=0)


def test_no_source_at_all():
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        open_sources(DataConfig(), seed=0)
