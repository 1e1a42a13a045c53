# SPDX-License-Identifier: Apache-2.0
"""The live line: time left from the clock, tokens a second from the row, a sparkline of the gain."""

import io
import itertools

import pytest
from rich.console import Console

from rlp_jax import live
from rlp_jax.live import BARS, PLAIN_BARS, Live, duration, sparkline, tokens_per_s


def drawn(monkeypatch, terminal, steps=10, encoding="utf-8"):
    """What three of the steps leave on a console, 90 seconds each."""
    clock = itertools.count(0.0, 90.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    shown = Live(Console(file=out, force_terminal=terminal, width=120), steps)
    lefts = []
    for step, gain in ((1, -0.5), (2, 0.0), (3, 0.5)):
        shown.step({"step": step, "reward_mean": gain, "seconds": 2.0, "input_tokens": 100, "sampled_tokens": 900})
        lefts.append(shown.left())
    shown.close()
    out.flush()
    return raw.getvalue().decode(encoding), lefts


def test_a_terminal_shows_time_left_speed_and_gain(monkeypatch):
    text, lefts = drawn(monkeypatch, terminal=True)
    assert "3/10" in text and "10:30 left" in text and "500 tok/s" in text and "gain +0.500 ▁▅█" in text
    assert lefts == ["", "  12:00 left", "  10:30 left"]


def test_away_from_a_terminal_nothing_is_drawn(monkeypatch):
    text, lefts = drawn(monkeypatch, terminal=False)
    assert text == "" and lefts[-1] == "  10:30 left"


def test_a_terminal_without_unicode_gets_plain_bars(monkeypatch):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True)
    shown = Live(console, 2)
    shown.close()
    assert shown._bars == PLAIN_BARS


def test_tokens_a_second_are_those_read_and_sampled_over_the_whole_step():
    assert tokens_per_s({"seconds": 4.0, "input_tokens": 100, "sampled_tokens": 300}) == 100.0
    assert tokens_per_s({"seconds": 4.0, "input_tokens": 100}) == 25.0
    assert tokens_per_s({"seconds": 0.0, "input_tokens": 100}) is None and tokens_per_s({"seconds": 1.0}) is None


def test_a_row_without_a_finite_gain_changes_no_sparkline():
    shown = Live(Console(file=io.StringIO()), 5)
    for gain in (0.1, float("nan"), None, 0.2):
        shown.step({"step": 1, "reward_mean": gain})
    assert list(shown._gains) == [0.1, 0.2]


@pytest.mark.parametrize(("values", "wanted"), [([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0.0, 7.0, 3.0], "▁█▄")])
def test_sparkline(values, wanted):
    assert sparkline(values) == wanted and set(wanted) <= set(BARS)


@pytest.mark.parametrize(("seconds", "wanted"), [(7, "0:07"), (754.9, "12:34"), (3723, "1:02:03")])
def test_duration(seconds, wanted):
    assert duration(seconds) == wanted
