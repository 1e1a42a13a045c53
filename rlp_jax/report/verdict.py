# SPDX-License-Identifier: Apache-2.0
"""What the held-out figures of a run say, in a sentence or two."""

import math

from rlp_jax.config import WITHOUT_THOUGHTS
from rlp_jax.report.numbers import form
from rlp_jax.report.run import Row, Run, number


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
    shown = form(gain, "+.3f") + " nats a token"
    if after and math.isfinite(number(before, "gain")):
        shown += f" (before: {form(number(before, 'gain'), '+.3f')})"
    if above_zero and above_controls:
        kind, text = "good", f"{now}, thinking pays: {shown} on held-out text, clearly above zero"
        text += {0: "", 1: " and above its control"}.get(len(controls), " and above both controls") + "."
    elif above_zero:
        kind, text = "mixed", f"{now}, the gain of {shown} is above zero but not clearly above the controls "
        text += f"({form(best, '+.3f')}): it may owe more to the format than to what the thoughts say."
    elif controls and above_controls:
        kind, text = "mixed", f"{now}, thoughts do not pay yet ({shown}), but what they say helps: "
        text += f"the better control stands at {form(best, '+.3f')}."
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
    text = f"{now}, the policy's cross-entropy without a thought is {form(policy, '.3f')} nats a token on held-out text"
    text += f" (before: {form(start, '.3f')})" if after else ""
    kind = ("good" if policy < start else "bad") if after else "none"
    return kind, f"{text}. No thought was trained; after one it is {form(think, '.3f')}."


def _lower(row: Row, key: str) -> float:
    """The lower end of the value's interval, the value itself where it has none."""
    low = number(row, f"{key}_ci95", 0)
    return low if math.isfinite(low) else number(row, key)
