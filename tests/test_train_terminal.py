# SPDX-License-Identifier: Apache-2.0
"""`rlp train` as somebody at a terminal sees it: a live line, Ctrl-C that saves, the command that resumes, a trace."""

import fcntl
import os
import pty
import shlex
import subprocess
import sys
import termios
from pathlib import Path

import jax
import pytest
from tiny_run import compilation, tiny_config

from rlp_jax.config import to_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("terminal")
    config = to_json(tiny_config(root, steps=400))
    (root / "tiny.py").write_text(
        f"from rlp_jax.settings import from_json\n\n\ndef config():\n    return from_json({config!r}, '')\n"
    )
    return root


def environment(root):
    cache = {name: str(value) for name, value in compilation(root / "cache").items()}
    return {**os.environ, **cache, "TERM": "xterm", "COLUMNS": "140", "PYTHONPATH": str(ROOT), "RLP_DEBUG": ""}


def at_a_terminal(root, *command, until):
    """Runs a command on a pseudo-terminal, presses Ctrl-C once `until` has been printed; its output and exit code."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlp_jax", *command], cwd=root, env=environment(root), stdin=slave, stdout=slave,
        stderr=slave, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    printed, pressed = b"", False
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        printed += data
        if not pressed and until in printed:
            os.write(master, b"\x03")
            pressed = True
    os.close(master)
    return printed.decode(errors="replace"), process.wait()


def test_ctrl_c_saves_and_the_printed_command_resumes(root):
    command = ("train", "tiny.py", "--run-dir", "a run", "--set", "eval.every=0", "--profile", "1")
    printed, code = at_a_terminal(root, *command, until=b"tok/s  gain")
    assert code == 130, printed[-2000:]
    assert "the step in progress is finished and saved first" in printed
    assert "Traceback" not in printed and "gain " in printed
    again = printed.split("the same command resumes the run:")[1].strip().splitlines()[0].strip()
    assert again == "rlp train tiny.py --run-dir 'a run' --set eval.every=0 --profile 1"
    (checkpoint,) = (path for path in (root / "a run" / "checkpoints").iterdir() if path.name.isdigit())
    done = int(checkpoint.name)
    assert 1 <= done < 400

    printed, code = at_a_terminal(root, *shlex.split(again)[1:], until=b"resuming")
    assert code == 130 and f"resuming a run after step {done}" in printed, printed[-2000:]

    (trace,) = (root / "a run" / "profile").rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    assert any(list(line.events) for plane in planes for line in plane.lines)
