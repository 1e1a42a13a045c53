# SPDX-License-Identifier: Apache-2.0
"""Reference pages made from the code before Sphinx reads them: settings from config.py, commands from the parser.

python docs/_ext/generated.py        # only checks: exit code 1 and a line for each setting without a comment
"""

import argparse
import ast
import io
import os
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
SETTINGS = ROOT / "rlp_jax" / "config.py"
FINDINGS = {  # pages of docs/results, from what is committed beside the results
    "experiments/README.md": "experiments.md",
    "experiments/paper/RESULTS.md": "paper.md",
    "experiments/benchmarks/NOTES.md": "notes.md",
}


class Undocumented(ValueError):
    """Settings without a comment: a line each."""


class Field(NamedTuple):
    """A setting as its source has it."""

    name: str
    type: str
    default: str
    comment: str


class Section(NamedTuple):
    """A dataclass of settings."""

    name: str
    doc: str
    fields: tuple[Field, ...]


def sections(source: str) -> list[Section]:
    """The dataclasses of a module. A field's comment is what stands above it and at the end of its lines.

    Raises:
      Undocumented: fields without a comment.
    """
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("#").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found, missing = [], []
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)):
            continue
        fields = []
        for item in node.body:
            if not isinstance(item, ast.AnnAssign):
                continue
            above, line = [], item.lineno - 1
            while line in alone:
                above.insert(0, comments[line])
                line -= 1
            lines = range(item.lineno, item.end_lineno + 1)
            comment = " ".join([*above, *(comments[n] for n in lines if n in comments)])
            default = ast.unparse(item.value) if item.value else "required"
            fields.append(Field(item.target.id, ast.unparse(item.annotation), default, comment))
            if not comment and not default.endswith("Config()") and default not in ("Template()", "Budget()"):
                missing.append(f"{node.name}.{item.target.id} (line {item.lineno}) has no comment")
        found.append(Section(node.name, ast.get_docstring(node) or "", tuple(fields)))
    if missing:
        raise Undocumented("\n".join(missing))
    return found


def settings_page(source: str) -> str:
    """The settings as a page of Markdown."""
    found = sections(source)
    parts = {f.type: f.name for section in found if section.name == "Config" for f in section.fields}
    lines = [
        "# Settings",
        "",
        "Every setting, as `rlp_jax/config.py` has it. On the command line `--set rlp.group_size=8`, in Python",
        "`dataclasses.replace`. A part named here with a prefix is set with that prefix.",
    ]
    for section in found:
        prefix = parts.get(section.name)
        lines += ["", f"## {section.name}" + (f": `{prefix}.*`" if prefix else ""), "", section.doc, ""]
        if section.fields:
            lines += ["| setting | type | default | what, unit and why |", "|---|---|---|---|"]
        for field in section.fields:
            said = field.comment or f"see [{field.type}](#{_anchor(field.type, field.name)})"
            code = (field.name, field.type, field.default)
            lines.append("| " + " | ".join([*(_code(c) for c in code), said.replace("|", "\\|")]) + " |")
    return "\n".join(lines) + "\n"


def commands_page(parser: argparse.ArgumentParser) -> str:
    """Every command's help as a page of Markdown."""
    os.environ["COLUMNS"] = "100"
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    lines = [
        "# Commands",
        "",
        "What `rlp --help` and `rlp COMMAND --help` print.",
        "",
        "```text",
        parser.format_help().rstrip(),
        "```",
    ]
    for name, command in commands.items():
        lines += ["", f"## rlp {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def findings_page(source: str) -> str:
    """A committed page of results with its links as seen from docs/results."""
    folder = (ROOT / source).parent

    def moved(match: re.Match) -> str:
        target, _, anchor = match[1].partition("#")
        if not target or "://" in target:
            return match[0]
        there = Path(os.path.normpath(folder / target)).relative_to(ROOT).as_posix()
        return f"]({FINDINGS.get(there, '../../' + there)}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, (ROOT / source).read_text(encoding="utf-8"))


def write(app=None) -> None:
    """Writes the pages; one that says what it said is left alone, so that Sphinx does not read it again."""
    from rlp_jax.cli import parser

    pages = {"settings.md": settings_page(SETTINGS.read_text(encoding="utf-8")), "commands.md": commands_page(parser())}
    written = {REFERENCE / name: text for name, text in pages.items()}
    written |= {ROOT / "docs" / "results" / name: findings_page(source) for source, name in FINDINGS.items()}
    for path, text in written.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _anchor(type_name: str, prefix: str) -> str:
    return f"{type_name}-{prefix}".lower()


def setup(app):
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    try:
        sections(SETTINGS.read_text(encoding="utf-8"))
    except Undocumented as error:
        sys.exit(str(error))
