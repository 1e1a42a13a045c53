# SPDX-License-Identifier: Apache-2.0
"""The documentation's Python runs page by page, its `rlp` commands parse, and no setting lacks a comment."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from rlp_jax.cli import parser

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import generated  # noqa: E402

PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts] + [ROOT / "CONTRIBUTING.md"]
GENERATED = {"settings.md", "commands.md", *generated.FINDINGS.values()}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("rlp ")]


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages if page.name not in GENERATED]


@pytest.mark.parametrize("page", named(p for p in PAGES if blocks(p, "python")))
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", named(p for p in PAGES if commands(p)))
def test_commands_parse(page):
    for command in commands(page):
        try:
            parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit as end:  # --version and --help end with 0
            assert not end.code, command


def test_a_wrong_command_does_not_parse():
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "quickstart", "--no-such-option"])


def test_every_setting_has_a_comment():
    assert generated.sections(generated.SETTINGS.read_text(encoding="utf-8"))


def test_comment_above_and_beside_belong_to_the_field():
    source = "@dataclasses.dataclass\nclass A:\n    x: int = 1  # one\n    # above\n    y: str = '#'  # beside\n"
    assert [field.comment for field in generated.sections(source)[0].fields] == ["one", "above beside"]


def test_a_setting_without_a_comment_is_named():
    with pytest.raises(generated.Undocumented, match=r"A\.y \(line 4\)"):
        generated.sections("@dataclass\nclass A:\n    x: int = 1  # one\n    y: int = 2\n")


def test_pages_show_defaults_and_options():
    assert "| `group_size` | `int` | `16` |" in generated.settings_page(generated.SETTINGS.read_text(encoding="utf-8"))
    assert "## rlp train" in generated.commands_page(parser())
