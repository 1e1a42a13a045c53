# SPDX-License-Identifier: Apache-2.0
"""`rlp data`, through the command line."""

import gzip
import json

import pytest
from data_formats import jsonl

from rlp_jax.cli import main
from rlp_jax.data.command import appetite


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    texts = ["flip turn swap = e .", "flip turn swap = e .", "a", "flip " * 40]
    path.write_bytes(gzip.compress(jsonl([{"text": text} for text in texts]) + b"\xff\n[1]\n"))
    return str(path)


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_check_counts_lists_and_fails(tmp_path, source, capsys):
    options = ["--model", "quickstart", "--set", "data.document_tokens=32", "--set", "data.min_tokens=3"]
    assert main(["data", "check", source, *options, "--out", str(tmp_path / "list.jsonl")]) == 1
    out = capsys.readouterr().out
    assert f"{source}:5: byte 0xff is not UTF-8" in out and f"{source}:6: expected a JSON object, found list" in out
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [(int(e["place"].rpartition(":")[2]), e["reason"]) for e in listed] == [
        (2, "copy_kept"), (3, "short"), (4, "cut"), (5, "encoding"), (6, "malformed"),
    ]  # fmt: skip
    assert main(["data", "check", "compose:5", "--json"]) == 0
    assert last_json(capsys)["filtered"] == {}
    assert main(["data", "check", str(tmp_path / "gone.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_build_then_read_back(tmp_path, source, capsys, monkeypatch):
    command = ["data", "build", source, "--name", "mine", "--data-dir", str(tmp_path / "sets")]
    assert main(command) == 2
    assert f"{source}:5: byte 0xff is not UTF-8" in capsys.readouterr().err
    assert main([*command, "--set", "data.malformed=skip", "--json"]) == 0
    built = last_json(capsys)
    assert built["documents"] == 4 and built["filtered"] == {"encoding": 1, "malformed": 1}
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    assert main(["data", "check", f"tfds:{built['directory']}:train", "--json"]) == 0
    assert last_json(capsys)["report"]["documents"] == 4


def test_bench_compares_with_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    rates = (1.0, 3.0, 200.0)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step_documents_per_s": rate}) + "\n" for rate in rates))
    assert appetite(run) == 3.0
    command = ["data", "bench", "compose:40", "--model", "quickstart", "--batch", "4", "--run", str(run), "--json"]
    assert main(command) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["documents"] == 40 and result["step_documents_per_s"] == 3.0
    assert result["loader_documents_per_s"] > 0 and f"the steps of {run} take 3.0 documents/s" in out
    (run / "metrics.jsonl").unlink()
    assert main(command) == 2
