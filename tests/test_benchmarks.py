# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: a side that is lost on the way does not take the others' figures with it."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
PEER = """
import json, os, signal, sys
job = json.loads(sys.stdin.readline())
print(json.dumps({"ready": {}}), flush=True)
for turn, line in enumerate(sys.stdin):
    if turn == job["turns"]:
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"seconds": 0.0, "tokens": turn, "peak_bytes": 1}), flush=True)
"""


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("timing")


def test_a_peer_that_is_killed_drops_out_and_the_table_says_why(timing, tmp_path):
    from peers.client import Peer

    script, gone, ours = tmp_path / "peer.py", {}, []
    script.write_text(PEER)
    with (
        Peer(Path(sys.executable), str(script), {"turns": 2}) as short,
        Peer(Path(sys.executable), str(script), {"turns": 9}) as long,
    ):
        candidates = {"ours": lambda: ours.append(1), "short": short.go, "long": long.go}
        seconds = timing.take_turns(candidates, 3, gone)
    assert gone == {"short_missing": f"{script} was killed, as the system does when memory runs out"}
    assert list(seconds) == ["ours", "long"] and [len(times) for times in seconds.values()] == [3, 3]
    assert len(ours) == 4  # one does not count
    assert list(timing.against_ours(seconds)) == ["vs_long", "vs_long_range"]


def test_our_side_may_not_drop_out(timing):
    from peers.environments import Missing

    def lost():
        raise Missing("gone")

    with pytest.raises(Missing, match="gone"):
        timing.take_turns({"ours": lost}, 1, {})
    with pytest.raises(Missing, match="gone"):
        timing.take_turns({"ours": lambda: None, "peer": lost}, 1)


def test_a_ratio_is_the_median_of_the_rounds(timing, capsys):
    result = timing.against_ours({"ours": [1.0, 2.0, 4.0], "peer": [2.0, 6.0, 4.0]})
    assert result == {"vs_peer": 2.0, "vs_peer_range": [1.0, 3.0]}
    timing.finish(result, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
