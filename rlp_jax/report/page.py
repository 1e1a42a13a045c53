"""report.html: one offline page that says what a run showed, from the files of its directory alone.

Thought text is whatever a model sampled, so it is not trusted: the template escapes everything, and the page forbids
itself every script and every request.
"""

import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rlp_jax.config import WITHOUT_THOUGHTS
from rlp_jax.report.figures import draw_figures
from rlp_jax.report.run import Row, Run, number, read_run
from rlp_jax.writers import write_atomically

# Label, key (its interval is under KEY_ci95), format, which change is an improvement (+1, -1; 0: neither).
TABLE = (
    ("Information gain", "gain", "+.3f", +1),
    ("Control: empty thought", "gain_empty", "+.3f", 0),
    ("Control: shuffled thought", "gain_shuffled", "+.3f", 0),
    ("Gain over the empty thought", "gain_over_empty", "+.3f", +1),
    ("Gain over the shuffled thought", "gain_over_shuffled", "+.3f", +1),
    ("Cross-entropy after a thought", "ce_think", ".3f", -1),
    ("Cross-entropy without (moving average)", "ce_no_think", ".3f", 0),
    ("Cross-entropy without (policy)", "ce_no_think_policy", ".3f", 0),
    ("Cross-entropy after an empty thought", "ce_empty", ".3f", 0),
    ("Cross-entropy after a shuffled thought", "ce_shuffled", ".3f", 0),
    ("Accuracy after a thought", "acc_think", ".1%", +1),
    ("Accuracy without", "acc_no_think", ".1%", 0),
    ("Thought length, tokens", "thought_len", ".1f", 0),
    ("Thoughts that end by themselves", "stop_rate", ".1%", 0),
)
SAMPLES = 3  # documents shown early, and again late
TEXT_LIMIT = 4000  # characters of a thought
PREFIX_LIMIT = 400  # characters of a prefix, its end


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
    page = render(run, draw_figures(run))
    path = run.directory / "report.html"
    # A lone surrogate is legal in JSON but not in UTF-8.
    write_atomically(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def render(run: Run, curves: Sequence[Any]) -> str:
    """The page as text. `curves` have a name, a title and an svg that is trusted."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("rlp_jax.report").joinpath("template.html").read_text(encoding="utf-8")
    early, late = sample_thoughts(run.thoughts)
    return environment.from_string(source).render(
        name=str(run.config.get("name") or run.directory.name),
        settings=_settings(run.config),
        progress=_progress(run),
        verdict=verdict(run),
        table=_table(run.before, run.after),
        after_label="after" if run.finished else f"step {run.after['step']}" if run.after else "",
        warnings=_warnings(run),
        curves=[(curve.name, Markup(curve.svg)) for curve in curves],
        groups=[
            (label, [_thought_row(row) for row in rows]) for label, rows in (("Early", early), ("Late", late)) if rows
        ],
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )


def verdict(run: Run) -> tuple[str, str]:
    """What the held-out figures say: ("good" | "mixed" | "bad" | "none", one or two sentences)."""
    before, after = run.before, run.after
    row = after or before
    gain = number(row, "gain")
    if not math.isfinite(gain):
        return "none", "No held-out evaluation yet."
    if run.config.get("algorithm") in WITHOUT_THOUGHTS:
        return _verdict_without_thoughts(run)
    controls = [key for key in ("empty", "shuffled") if math.isfinite(number(row, f"gain_{key}"))]
    best = max([number(row, f"gain_{key}") for key in controls], default=math.nan)
    above_zero = _lower(row, "gain") > 0
    # Paired intervals where the evaluation has them; else the gain's own interval against the control's mean.
    above_controls = all(
        _lower(row, f"gain_over_{key}") > 0
        if math.isfinite(number(row, f"gain_over_{key}"))
        else _lower(row, "gain") > number(row, f"gain_{key}")
        for key in controls
    )
    now = "After training" if run.finished else "So far" if after else "Before training"
    shown = _form(gain, "+.3f") + " nats a token"
    if after and math.isfinite(number(before, "gain")):
        shown += f" (before: {_form(number(before, 'gain'), '+.3f')})"
    if above_zero and above_controls:
        kind, text = "good", f"{now}, thinking pays: {shown} on held-out text, clearly above zero"
        text += {0: "", 1: " and above its control"}.get(len(controls), " and above both controls") + "."
    elif above_zero:
        kind, text = "mixed", f"{now}, the gain of {shown} is above zero but not clearly above the controls "
        text += f"({_form(best, '+.3f')}): it may owe more to the format than to what the thoughts say."
    elif controls and above_controls:
        kind, text = "mixed", f"{now}, thoughts do not pay yet ({shown}), but what they say helps: "
        text += f"the better control stands at {_form(best, '+.3f')}."
    else:
        kind, text = "bad", f"{now}, thinking does not pay: {shown} on held-out text."

    start, end = number(before, "ce_think"), number(after, "ce_think")
    if after and gain > number(before, "gain") and end >= start:
        kind = "mixed" if kind == "good" else kind
        text += (
            f" Beware: the gain rose, but the cross-entropy after a thought did not fall ({start:.3f} to {end:.3f});"
            " the prediction without a thought became worse."
        )
    policy = number(row, "ce_no_think_policy")
    if gain > 0 and number(row, "ce_think") >= policy:
        kind = "mixed" if kind == "good" else kind
        text += (
            f" Beware: the policy itself predicts as well without a thought (cross-entropy {policy:.3f}, after one"
            f" {number(row, 'ce_think'):.3f}); the gain is the moving average's lag."
        )
    return kind, text


def _verdict_without_thoughts(run: Run) -> tuple[str, str]:
    """Of a run that trained plain prediction: its own measure first, then what thoughts are worth all the same."""
    before, after = run.before, run.after
    row, start = after or before, number(before, "ce_no_think_policy")
    policy, think = number(row, "ce_no_think_policy"), number(row, "ce_think")
    now = "After training" if run.finished else "So far" if after else "Before training"
    text = (
        f"{now}, the policy's cross-entropy without a thought is {_form(policy, '.3f')} nats a token on held-out text"
    )
    text += f" (before: {_form(start, '.3f')})" if after else ""
    kind = ("good" if policy < start else "bad") if after else "none"
    return kind, f"{text}. No thought was trained; after one it is {_form(think, '.3f')}."


def _lower(row: Row, key: str) -> float:
    """The lower end of the value's interval, the value itself where it has none."""
    low = number(row, f"{key}_ci95", 0)
    return low if math.isfinite(low) else number(row, key)


def sample_thoughts(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the first and of the last step that hold thoughts, the same documents in both where there are any."""
    if not rows:
        return [], []
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    last = [row for row in rows if row["step"] == rows[-1]["step"]] if rows[-1]["step"] > rows[0]["step"] else []
    shared = {row.get("document") for row in first} & {row.get("document") for row in last}
    return tuple(sorted(group, key=lambda row: row.get("document") not in shared)[:SAMPLES] for group in (first, last))


def _thought_row(row: Row) -> dict[str, Any]:
    """One place in a document and its thoughts, best reward first."""

    def reward(thought):
        value = number(thought, "reward")
        return value if math.isfinite(value) else -math.inf

    prefix = _text(row.get("prefix"))
    thoughts = [
        {
            "text": _shorten(_text(t.get("text"))),
            "reward": _form(number(t, "reward"), "+.3f"),
            "sign": "up" if number(t, "reward") > 0 else "down",
            "advantage": _form(number(t, "advantage"), "+.3f"),
            "length": _form(number(t, "length"), ".0f"),
            "stopped": t.get("stopped") is not False,
        }
        for t in sorted(row["thoughts"], key=reward, reverse=True)
    ]
    return {
        "step": row["step"],
        "prefix": ("… " if len(prefix) > PREFIX_LIMIT else "") + prefix[-PREFIX_LIMIT:],
        "target": _text(row.get("target")),
        "s_ema": _form(number(row, "s_ema"), ".3f"),
        "ends": [("best", thoughts[0]), ("worst", thoughts[-1])] if len(thoughts) > 1 else [("only", thoughts[0])],
        "rest": thoughts[1:-1],
    }


def _table(before: Row, after: Row) -> list[dict[str, str]]:
    rows = []
    for label, key, form, better in TABLE:
        old, new = number(before, key), number(after, key)
        if math.isfinite(old) or math.isfinite(new):
            change = new - old
            good = "good" if change * better > 0 else "bad" if change * better < 0 else ""
            rows.append(
                {
                    "label": label,
                    "before": _form(old, form),
                    "before_interval": _interval(before, key, form),
                    "after": _form(new, form),
                    "after_interval": _interval(after, key, form),
                    "change": _form(100 * change, "+.1f") + " points"
                    if "%" in form
                    else _form(change, "+" + form.lstrip("+")),
                    "good": good,
                }
            )
    return rows


def _interval(row: Row, key: str, form: str) -> str:
    low, high = (number(row, f"{key}_ci95", i) for i in (0, 1))
    return f"{_form(low, form)} to {_form(high, form)}" if math.isfinite(low) and math.isfinite(high) else ""


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


def _form(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "–"
    text = f"{value:{form}}"
    return text.lstrip("+-") if not re.search("[1-9]", text) else text.replace("-", "−")  # nothing has no sign


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …"
