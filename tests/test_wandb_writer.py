# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases: offline with the real library; its absence or failure is a line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlp_jax.cli import main
from rlp_jax.config import ConfigError
from rlp_jax.wandb_writer import Wandb, check_wandb

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from pathlib import Path
from rlp_jax.writers import RunLog

with RunLog(Path(sys.argv[1]), 2, wandb="tests", config={"rlp": {"group_size": 4}}) as log:
    log.step({"step": 1, "loss": 0.125, "seconds": 1.0, "warnings": []})
    log.step({"step": 2, "loss": float("nan"), "seconds": 1.0, "warnings": []})
"""


def records(run_dir):
    """The history of the one offline run. The file is a LevelDB log, whose framing is read by hand: behind 7 bytes of
    its own come blocks of 32 KiB, in them pieces of records: checksum, length, kind (whole, first, middle, last).
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    data, at, piece, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record, piece = wandb_internal_pb2.Record.FromString(piece), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_numbers_reach_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    done = subprocess.run(  # the library writes its file out when the process ends
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "warning" not in done.stdout, done.stderr
    rows = records(tmp_path)
    assert [row.get("train/loss") for row in rows] == [0.125, None]
    assert [row["_step"] for row in rows] == [1, 2]


def test_a_failure_is_one_line_and_training_goes_on(tmp_path):
    class Broken:
        def log(self, *args, **kwargs):
            raise OSError("no space\nleft")

    said = []
    writer = Wandb.__new__(Wandb)
    writer._run, writer._say = Broken(), said.append
    writer.add({"loss": 1.0}, 1)
    writer.add({"loss": 1.0}, 2)
    writer.close()
    (line,) = said
    assert line.startswith("warning: Weights & Biases: no space left")


def test_without_the_library_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "wandb" else found(name, *args)
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--wandb", "mine"]) == 2
    err = capsys.readouterr().err
    assert err == "rlp: error: --wandb needs a library: pip install 'rlp_jax[wandb]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "a:b"])
def test_names_that_cannot_be_a_projects(name):
    with pytest.raises(ConfigError, match="--wandb is"):
        check_wandb(name)


def test_the_library_is_not_imported_unless_used():
    code = "import sys, rlp_jax.train, rlp_jax.writers\nassert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
