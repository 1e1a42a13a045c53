# SPDX-License-Identifier: Apache-2.0
"""`rlp sample --interactive` over piped lines: what it answers, that errors end nothing, that programs are kept."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_run import hasty_compilation, tiny_config

from rlp_jax.commands.conversation import COMMANDS, HELP, Conversation, talk
from rlp_jax.evals import think
from rlp_jax.evals.think import open_thinker
from rlp_jax.evals.thinking_text import printable, tinted, token_texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    root = tmp_path_factory.mktemp("conversation")
    config = tiny_config(root)
    with hasty_compilation(root / "cache"):
        yield open_thinker(config.model, config)


def said(monkeypatch, thinker, *lines, terminal=False):
    """What a conversation prints."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    conversation = Conversation(thinker, thoughts=2, tokens=4)
    talk(conversation, Console(file=out, force_terminal=terminal, color_system="truecolor" if terminal else None))
    return out.getvalue(), conversation


def test_a_text_gives_thoughts_with_their_gains(monkeypatch, thinker):
    out, conversation = said(monkeypatch, thinker, "4 abcdabcd")
    assert "before token 9 of 10: ...'4 abcdabc'" in out and "without a thought: -" in out
    gains = [float(line.split("gain ")[1].split(",")[0]) for line in out.splitlines() if line.startswith("[")]
    assert len(gains) == 2 and gains == sorted(gains, reverse=True)
    np.testing.assert_allclose(sorted(gains), sorted(conversation.last.gain_G), atol=6e-4)
    assert "→ d   'd' " in out


def test_settings_change_what_comes_next(monkeypatch, thinker):
    out, conversation = said(
        monkeypatch, thinker, ":thoughts 3", ":position 4", ":horizon 3", ":show best", ":temperature 0.5", "4 abcdabcd"
    )
    assert "before token 4 of 10: ...'4 ab'" in out and out.count("gain ") == 1
    assert conversation.last.gain_GH.shape == (3, 3)
    assert thinker.tokenizer.decode(conversation.last.target) == "cda"


def test_the_end_of_a_text_has_no_gain(monkeypatch, thinker):
    out, _ = said(monkeypatch, thinker, ":position end", "4 abcd")
    assert "before token 6 of 6" in out and "gain" not in out


def test_an_empty_line_thinks_again_with_the_next_seed(monkeypatch, thinker):
    out, conversation = said(monkeypatch, thinker, "", "4 abcdabcd", "")
    assert out.startswith("enter a text") and out.count("before token 9") == 2 and conversation.seed == 1


def test_what_is_wrong_is_a_line_and_the_conversation_goes_on(monkeypatch, thinker, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    lines = {
        ":thougts 3": "error: unknown command ':thougts': did you mean :thoughts?",
        ":thoughts many": "error: :thoughts is 'many': write a whole number of at least 1, for instance :thoughts 4",
        ":thoughts 0": "error: :thoughts is '0': write a whole number",
        ":temperature 0": "error: :temperature is '0': write a number above 0",
        ":temperature nan": "error: :temperature is 'nan'",
        ":position x": "error: :position is 'x'",
        ":show some": "error: :show is 'some': write best or all",
        ":file": "error: :file needs a path",
        f":file {tmp_path / 'none.txt'}": "none.txt: No such file",
        f":file {tmp_path / 'bad.txt'}": "error: 'utf-8' codec",
        ":tokens-log-ratio 1": "error: :tokens-log-ratio: there is no thought yet",
        "x" * 500: "error: text, thought and tags need",
    }
    out, conversation = said(monkeypatch, thinker, *lines, ":thoughts")
    assert out.count("error: ") == len(lines)
    for wanted in lines.values():
        assert wanted in out
    assert out.splitlines()[-1] == "thoughts 2" and conversation.text == ""


def test_quit_ends_and_help_names_every_command(monkeypatch, thinker):
    out, _ = said(monkeypatch, thinker, ":help", ":settings", ":quit", ":settings")
    assert all(name in HELP for name in COMMANDS) and HELP in out
    assert out.count("temperature 0.7") == 1 and "tokens 4" in out


def test_files_tokens_and_log_ratios(monkeypatch, thinker, tmp_path):
    (tmp_path / "text.txt").write_text("4 abcd")
    out, _ = said(monkeypatch, thinker, f":file {tmp_path / 'text.txt'}", ":tokens", ":tokens-log-ratio 2")
    assert "0:'4' 1:' ' 2:'a'" in out and "all ratios are 0" in out
    assert "error" not in out and "+0.0000" in out


def test_programs_are_used_again(monkeypatch, thinker):
    said(monkeypatch, thinker, "4 abcdabcd")
    before = think._think._cache_size()
    said(monkeypatch, thinker, "17 dcba", ":temperature 0.9", ":tokens 3", ":position 3", ":seed 5", "8 aaaabbbbccccdd")
    assert think._think._cache_size() == before


def test_a_trained_policy_has_log_ratios_and_its_gain_is_against_the_average(thinker):
    import jax

    moved = jax.tree.map(lambda x: x * 1.1, thinker.params)
    trained = thinker._replace(params=moved)
    thinking = trained.think("4 abcdabcd", 4, 3, 5, horizon=2)
    assert np.abs(thinking.log_ratio_GL[0, : thinking.length_G[0]]).max() > 0
    plain = thinker.think("4 abcdabcd", 4, 3, 5, horizon=2)
    assert not plain.log_ratio_GL.any() and plain.s_ema == pytest.approx(thinking.s_ema, rel=1e-5)
    np.testing.assert_allclose(thinking.gain_GH.mean(-1), thinking.gain_G, rtol=1e-4, atol=1e-5)


def test_padding_and_room_change_no_thought(thinker):
    """The cap is a number, not a shape: a smaller one cuts the same thoughts."""
    long = thinker.think("4 abcdabcd", 4, 2, 12, horizon=2)
    short = thinker.think("4 abcdabcd", 4, 2, 3, horizon=2)
    for a, b in zip(long.thoughts, short.thoughts, strict=True):
        assert b == a[: len(b)] and len(b) <= 3


def test_colours_and_control_characters(monkeypatch, thinker):
    out, _ = said(monkeypatch, thinker, "4 abcdabcd", terminal=True)
    assert "\x1b[" in out
    assert printable("a\x1b[31mb\r\nc\u202e") == "a\\x1b[31mb\\r\nc\\u202e"
    text = tinted(["up", "flat", "down\x1b"], np.array([1.0, 0.0, -1.0]))
    assert text.plain == "upflatdown\\x1b"
    assert [span.style for span in text.spans if span.style] == [
        "black on rgb(155,235,155)",
        "black on rgb(235,155,155)",
    ]


def test_characters_of_several_tokens_come_with_the_last(thinker):
    tokens = thinker.tokenizer.encode("aé→b")
    assert token_texts(thinker.tokenizer, tokens) == ["a", "", "é", "", "", "→", "b"]


def test_the_command_with_piped_input(thinker, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rlp_jax", "sample", "quickstart", "--interactive", "--thoughts", "2", "--tokens", "6"],
        input=":bogus\nc flip turn swap = e .\n:quit\n", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unknown command ':bogus'" in done.stdout and done.stdout.count("] gain ") == 2
