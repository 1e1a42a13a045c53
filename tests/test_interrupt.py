# SPDX-License-Identifier: Apache-2.0
"""Signals: the first is a request, the second the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlp_jax.interrupt import Interrupted, StopSignals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request(signum, code, capsys):
    before = signal.getsignal(signum)
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        assert stop.requested
        with pytest.raises(Interrupted) as error:
            stop.check()
    assert error.value.exit_code == code
    assert signal.getsignal(signum) is before
    assert "finished and saved first" in capsys.readouterr().err


def test_work_that_changes_nothing_ends_at_once_and_saves():
    saved, done = [], []
    with StopSignals() as stop:
        with pytest.raises(Interrupted), stop.at_once(lambda: saved.append(1)):
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(1)
        assert (saved, done) == ([1], [])
        with pytest.raises(Interrupted), stop.at_once(lambda: saved.append(1)):
            done.append(1)  # the request still stands
    assert (saved, done) == ([1, 1], [])


def test_the_second_signal_ends_the_process():
    program = """
import os, signal
from rlp_jax.interrupt import StopSignals
with StopSignals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGTERM and done.stdout == "first\n"
