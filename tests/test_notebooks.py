# SPDX-License-Identifier: Apache-2.0
"""What the notebooks hold, without running them: `notebooks/execute.py` runs them, in .ci/run."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELLS = {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in NOTEBOOKS}
NAMES = list(CELLS)


def code(name: str) -> list[str]:
    return ["".join(cell["source"]) for cell in CELLS[name] if cell["cell_type"] == "code"]


def test_there_are_five_in_order():
    assert [name[:3] for name in NAMES] == ["01_", "02_", "03_", "04_", "05_"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_run_is_kept(name):
    for cell in CELLS[name]:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
        assert cell["metadata"] == {}
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|Users|tmp|content)/", text)
    assert len(text) < 40_000


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_and_the_second_has_the_sizes(name):
    first, second, *_ = code(name)
    assert first.startswith("REPOSITORY = ")
    shared = first.partition("# Installs rlp_jax")[2]
    assert shared and shared == code(NAMES[0])[0].partition("# Installs rlp_jax")[2]
    assert 'QUICK = bool(os.environ.get("RLP_NOTEBOOK_QUICK"))' in second
    assert re.search(r"(?m)^\w*STEPS = .* if QUICK else ", second)


def test_the_first_cell_says_what_to_do_where_nothing_can_be_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="write its address into REPOSITORY"):
        exec(compile(code(NAMES[0])[0], "first cell", "exec"), {})


def test_simulated_devices_are_asked_for_before_jax_is_there():
    first = code("05_from_one_chip_to_a_pod")[0]
    assert first.index("xla_force_host_platform_device_count=8") < first.index("import jax")


def test_what_they_name_exists():
    for name, cells in CELLS.items():
        text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for path in re.findall(r"`((?:rlp_jax|tpu|experiments)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"
        for other in re.findall(r"\*(0\d)\*", text):
            assert any(stem.startswith(other) for stem in NAMES), f"{name}: {other}"


@pytest.mark.parametrize("name", NAMES)
def test_they_are_valid(name):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra: notebooks")
    nbformat.validate(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))


def test_a_cell_that_fails_is_not_passed_over(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra: notebooks")
    exceptions = pytest.importorskip("nbclient.exceptions", reason="needs the extra: notebooks")
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)

    sources = ("import os", "assert os.environ['RLP_NOTEBOOK_QUICK'] == '1'", "open('here', 'w').close()", "1 / 0")
    for count in (3, 4):
        cells = [nbformat.v4.new_code_cell(source) for source in sources[:count]]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{count}.ipynb")
    ran = execute.execute(tmp_path / "3.ipynb", tmp_path, quick=True)
    assert float(ran.cells[-1].outputs[0].text) > 0
    assert (tmp_path / "here").is_file() and not os.path.exists("here")
    with pytest.raises(exceptions.CellExecutionError, match="division by zero"):
        execute.execute(tmp_path / "4.ipynb", tmp_path, quick=True)
