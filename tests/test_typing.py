# SPDX-License-Identifier: Apache-2.0
"""The package says that it is typed (py.typed). A program of a user is checked: right passes, wrong fails."""

import subprocess
import sys
from pathlib import Path

import pytest

import rlp_jax

TESTS = Path(__file__).parent
WRONG = {
    "objective.information_gain(s_pred_G, s_ema)": "objective.information_gain(s_pred_G)",
    'model="quickstart"': "model=1",
    "RLPConfig(group_size=4)": "RLPConfig(group_sise=4)",
    "capacity=4": 'capacity="4"',
    "advantage_G, mask_GL).mean()": "advantage_G, mask_GL).shape",
}


def test_the_marker_is_there():
    assert (Path(rlp_jax.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
def test_a_typed_program_of_a_user(tmp_path):
    """Checked once right and once with a mistake a line, so that each annotation is seen to bite."""
    pytest.importorskip("mypy", reason="needs the extra dev")
    right = (TESTS / "typed_user.py").read_text()
    wrong = right
    for good, bad in WRONG.items():
        assert good in wrong
        wrong = wrong.replace(good, bad, 1)
    lines = {
        number for number, (a, b) in enumerate(zip(right.splitlines(), wrong.splitlines(), strict=True), 1) if a != b
    }
    for name, program in (("right", right), ("wrong", wrong)):
        (tmp_path / f"{name}.py").write_text(program)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\nignore_missing_imports = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line.split(":") for line in done.stdout.splitlines() if ": error:" in line]
    assert [error for error in errors if error[0] == "right.py"] == [], done.stdout
    assert {int(error[1]) for error in errors} == lines, done.stdout + done.stderr
