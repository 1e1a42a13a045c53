# SPDX-License-Identifier: Apache-2.0
"""Pure functions over a run's numbers."""

import numpy as np
import pytest

from rlp_jax.metrics import ThoughtStart, collapse_warnings, mean_ci95, row_warnings, spread_warnings


def test_interval_by_hand():
    mean, (low, high) = mean_ci95([1.0, 2.0, 3.0, 4.0])
    half = 1.96 * np.sqrt(5 / 3) / 2
    assert mean == 2.5
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))


def test_interval_covers_the_mean_in_about_95_of_100_samples():
    rng = np.random.default_rng(0)
    hits = sum(low <= 0.3 <= high for _, (low, high) in (mean_ci95(rng.normal(0.3, 2, 200)) for _ in range(2000)))
    assert 0.93 < hits / 2000 < 0.97


def test_interval_of_one_and_of_no_values():
    assert mean_ci95([2.0]) == (2.0, (2.0, 2.0))
    with pytest.raises(ValueError, match="no values"):
        mean_ci95([])


def started(thought_len=40.0, stop_rate=0.5):
    start = ThoughtStart()
    for offset in (-2, -1, 0, 1, 2):
        start = start.add(thought_len + offset, stop_rate)
    return start


def test_the_start_is_the_average_of_the_first_steps_and_then_fixed():
    start = started().add(1000.0, 1.0)
    assert start.thought_len == pytest.approx(40.0)
    assert start.stop_rate == pytest.approx(0.5)
    assert ThoughtStart().add(float("nan"), 0.5) == ThoughtStart()


@pytest.mark.parametrize(
    ("thought_len", "stop_rate", "kinds"),
    [
        (40.0, 0.5, set()),
        (10.1, 0.5, set()),
        (9.9, 0.5, {"thought_length"}),
        (2.0, 1.0, {"thought_length", "empty_thoughts"}),
        (40.0, 0.01, {"stop_rate"}),
        (float("nan"), 0.5, set()),
    ],
)
def test_collapses(thought_len, stop_rate, kinds):
    assert set(collapse_warnings(started(), thought_len, stop_rate, close_tokens=2)) == kinds


def test_a_stop_rate_that_was_always_low_is_no_collapse():
    assert collapse_warnings(started(stop_rate=0.1), 40.0, 0.0, close_tokens=2) == {}


def test_silent_while_the_start_is_measured():
    assert collapse_warnings(ThoughtStart().add(40.0, 0.5), 1.0, 1.0, close_tokens=1) == {}


@pytest.mark.parametrize(
    ("reward_mean", "reward_std", "warned"),
    [
        (-1.0, 0.04, True),
        (-1.0, 0.0, True),
        (-1.0, 0.06, False),
        (-0.1, 0.04, False),
        (1.0, 0.0, False),  # all thoughts are right
        (0.0, 0.0, False),
        (float("nan"), 0.0, False),
        (-1.0, float("nan"), False),
    ],
)
def test_thoughts_that_all_cost_the_same(reward_mean, reward_std, warned):
    assert list(spread_warnings(reward_mean, reward_std)) == ["no_spread"] * warned


def test_a_row_has_both_kinds_and_what_it_lacks_is_not_known():
    row = {"thought_len": 2.0, "stop_rate": 1.0, "reward_mean": -2.0, "reward_std": 0.0}
    start, warnings = row_warnings(started(), row, close_tokens=2)
    assert start == started() and set(warnings) == {"thought_length", "empty_thoughts", "no_spread"}
    assert "2.00 nats" in warnings["no_spread"]
    assert set(row_warnings(start, row | {"reward_std": None}, close_tokens=2)[1]) == set(warnings) - {"no_spread"}
    start, warnings = row_warnings(ThoughtStart(), {"reward_mean": -2.0, "reward_std": 0.0}, close_tokens=2)
    assert start == ThoughtStart() and set(warnings) == {"no_spread"}
