# SPDX-License-Identifier: Apache-2.0
"""report.html: one offline page that says what a run showed, or how several compare, from their directories alone.

Thought text is whatever a model sampled, so it is not trusted. The template escapes what it is given; what the page's
own script shows comes as JSON in script elements that hold no markup, and goes into the page as text, never as markup.
The page's policy allows its own style and script by their hashes and nothing else: no other script, no request.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rlp_jax.config import WITHOUT_THOUGHTS, ConfigError
from rlp_jax.report import curves, documents, thoughts
from rlp_jax.report.figures import draw_figures
from rlp_jax.report.run import Row, Run, read_run
from rlp_jax.report.table import differences, side_by_side, table
from rlp_jax.report.text import script_json, visible
from rlp_jax.report.verdict import verdict
from rlp_jax.writers import write_atomically

STYLES = ("page.css", "curves.css", "viewer.css")
SCRIPTS = ("dom.js", "curves.js", "list.js", "tint.js", "thoughts.js", "viewer.js")  # one after the other


def write_report(run_dir: Path) -> Path:
    """Writes figures/*.png and report.html into a run directory, each of them whole or not at all.

    Args:
      run_dir: a run directory (ARCHITECTURE.md). Files other than config.json may be missing: the page shows what
        there is.

    Returns:
      The path of report.html.

    Raises:
      ReportError: not a run directory, or its config.json or summary.json is damaged.
    """
    run = read_run(run_dir)
    page = render([run])
    draw_figures(run)
    path = run.directory / "report.html"
    write_atomically(path, page)
    return path


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes one page that sets several runs side by side, whole or not at all.

    Args:
      run_dirs: at least one run directory.
      out: the page's file.

    Returns:
      `out`.

    Raises:
      ReportError: as `write_report`. ConfigError: the same run twice, or `out` cannot be a file.
    """
    twice = [path for path, count in Counter(Path(run_dir).resolve() for run_dir in run_dirs).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is there twice: name different runs")
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        what = "is a directory" if out.is_dir() else "lies in a directory that does not exist"
        raise ConfigError(f"--out {out} {what}: name a file")
    write_atomically(out, render([read_run(run_dir) for run_dir in run_dirs]))
    return out


def render(runs: Sequence[Run]) -> str:
    """The page of one run, or of several, as text."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from markupsafe import Markup

    runs, environment = (
        list(runs),
        ImmutableSandboxedEnvironment(
            loader=jinja2.FunctionLoader(_asset),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        ),
    )
    labels = _labels(runs)
    shown = documents.gather(runs, labels)
    style, script = ("".join(map(_asset, names)) for names in (STYLES, SCRIPTS))
    data = {"figures": curves.on_page(runs, labels), "runs": labels, "viewer": shown and shown.index}
    return environment.get_template("page.html").render(
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(script_json(data)),
        documents=Markup("\n".join(shown.lines)) if shown else "",
        title=visible(labels[0]) if len(runs) == 1 else " · ".join(labels),
        runs=[_of_run(run, label) for run, label in zip(runs, labels, strict=True)],
        compared=side_by_side(runs) if len(runs) > 1 else [],
        differences=[
            {"name": visible(row["name"]), "cells": [visible(value) for value in row["cells"]]}
            for row in (differences(runs) if len(runs) > 1 else [])
        ],
        curves=bool(data["figures"]),
        viewer=shown is not None,
    )


def _of_run(run: Run, label: str) -> dict[str, Any]:
    """What the template wants of a run."""
    return {
        "label": label,
        "settings": [visible(text) for text in _settings(run.config)],
        "progress": _progress(run),
        "verdict": verdict(run),
        "table": table(run.before, run.after),
        "after_label": "after" if run.finished else f"step {run.after['step']}" if run.after else "",
        "warnings": [visible(line) for line in _warnings(run)],
        "extremes": thoughts.extremes(run),
        "groups": [] if run.documents else thoughts.groups(run),  # the viewer shows the same and more
        "config": visible(json.dumps(run.config, indent=2, ensure_ascii=False)),
    }


def _labels(runs: list[Run]) -> list[str]:
    """The runs' names; where two are alike, those of their directories, numbered where these are alike too."""
    names = [visible(run.config.get("name") or run.directory.resolve().name) for run in runs]
    if len(set(names)) < len(names):
        names = [visible(run.directory.resolve().name) for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def _asset(name: str) -> str:
    return resources.files("rlp_jax.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _warnings(run: Run) -> list[str]:
    """Each kind of warning once, with the steps it was raised at; then skipped steps and unreadable lines."""
    kinds: dict[str, tuple[list[int], str]] = {}
    for row in run.metrics:
        messages = row.get("warnings") or []
        for message in messages.values() if isinstance(messages, dict) else messages:
            kind = re.sub(r"[\d.]+", "#", str(message))  # the same warning with other numbers in it
            steps, _ = kinds.get(kind, ([], ""))
            kinds[kind] = ([*steps, row["step"]], str(message))
    lines = [f"{_steps(steps)}: {message}" for steps, message in kinds.values()]
    told = {row["step"] for row in run.metrics if row.get("warnings")}
    if silent := [step for step in run.skipped if step not in told]:
        lines.append(f"{_steps(silent)}: rewards or gradients were not finite, the update was skipped")
    lines += [f"{name}: {count} unreadable line{'s' * (count > 1)}" for name, count in run.unreadable.items()]
    return lines


def _steps(steps: list[int]) -> str:
    if len(steps) <= 3:
        return f"Step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def _progress(run: Run) -> str:
    done, planned = (run.metrics[-1]["step"] if run.metrics else 0), run.config.get("steps")
    if not run.metrics:
        return "No training step logged yet."
    return f"{done} of {planned} steps" if isinstance(planned, int) else f"{done} steps"


def _settings(config: Row) -> list[str]:
    """The few settings a reader wants to see at the top."""

    def at(*path):
        value = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    thoughts = [
        ("{} positions each", at("rlp", "positions") if at("rlp", "positions") != 1 else None),
        ("{} thoughts a position", at("rlp", "group_size")),
        ("up to {} tokens a thought", at("rlp", "thought_tokens")),
        ("temperature {}", at("rlp", "temperature")),
    ]
    parts = [
        ("{}", at("algorithm") if at("algorithm") != "rlp" else None),
        ("{}", at("model")),
        ("{} documents a batch", at("batch_documents")),
        *([] if at("algorithm") in WITHOUT_THOUGHTS else thoughts),
        ("learning rate {}", at("optimizer", "learning_rate")),
        ("seed {}", at("seed")),
    ]
    return [form.format(value) for form, value in parts if value not in (None, "")]
