# SPDX-License-Identifier: Apache-2.0
"""Goodput's accounting, and the traces of `--profile`."""

import jax
import jax.numpy as jnp
import pytest

from rlp_jax.config import ConfigError
from rlp_jax.goodput import CompileTime, Intervals, first_start, goodput, productive
from rlp_jax.profiling import Profiler, parse_steps


def total(*intervals):
    seconds = Intervals()
    for interval in intervals:
        seconds.add(*interval)
    return seconds.total()


def test_nested_intervals_count_once():
    assert total((0, 2), (3, 4)) == 3
    assert total((1, 2), (3, 4), (0, 5)) == 5  # two traces inside a third
    assert total((0, 2), (1, 4)) == 4
    assert total((0, 1), (5, 6), (5.5, 7)) == 3


def test_a_run_of_two_starts_by_hand():
    """Started at 1000. Three steps of 10 s, the first compiled for 8; a checkpoint after the second; killed after the
    third; started again at 1100, compiled for 5 of 15 seconds: at 1120 two steps and one count."""
    saved = productive(10, 8) + productive(10, 0)
    assert saved == 12
    assert goodput(saved + productive(10, 0), 1000, 1050) == pytest.approx(22 / 50)
    assert goodput(saved + productive(15, 5), 1000, 1120) == pytest.approx(22 / 120)


def test_goodput_is_a_share():
    assert productive(1.0, 3.0) == 0.0  # a clock's resolution must not make it negative
    assert goodput(5.0, 10.0, 10.0) == 1.0 and goodput(0.0, 10.0, 20.0) == 0.0


def test_the_first_start_is_written_down_once(tmp_path):
    first = first_start(tmp_path)
    assert first_start(tmp_path) == first and float((tmp_path / "started").read_text()) == first
    (tmp_path / "started").write_text("")  # cut off
    assert first_start(tmp_path) >= first


def test_compiling_is_seen_and_running_is_not():
    with CompileTime() as compiling:
        function = jax.jit(lambda x: jnp.sin(x) * 17.25)
        function(jnp.ones(3)).block_until_ready()
        assert compiling.lap() > 0
        function(jnp.ones(3)).block_until_ready()
        assert compiling.lap() == 0


@pytest.mark.parametrize(("text", "steps"), [("5", [5]), ("5:8", [5, 6, 7, 8]), ("1:1", [1])])
def test_steps_to_trace(text, steps):
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["", "0", "8:5", "5:", "a:b", "-1"])
def test_impossible_steps_to_trace(text):
    with pytest.raises(ConfigError, match="--profile is"):
        parse_steps(text)


def test_a_trace_is_written_once_and_when_the_run_breaks_off(tmp_path):
    with Profiler(tmp_path / "whole", range(2, 4)) as profiler:
        written = []
        for step in range(1, 6):
            profiler.before(step)
            written.append(profiler.after(step))
    assert written == [False, False, True, False, False]
    assert len(list((tmp_path / "whole" / "profile").rglob("*.xplane.pb"))) == 1

    with pytest.raises(RuntimeError, match="broken"), Profiler(tmp_path / "broken", range(1, 9)) as profiler:
        profiler.before(1)
        raise RuntimeError("broken")
    assert list((tmp_path / "broken" / "profile").rglob("*.xplane.pb"))
