# SPDX-License-Identifier: Apache-2.0
"""`rlp sample --interactive`: texts in, thoughts and their gains out, with one loaded model and its programs kept."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlp_jax.commands.base import one_line
from rlp_jax.config import ConfigError
from rlp_jax.evals.think import Thinker, Thinking
from rlp_jax.evals.thinking_text import best_first, place, tinted, title, token_texts
from rlp_jax.nearest import suggest

PROMPT = "rlp> "
HELP = """\
Enter a text to think over; an empty line thinks over it again, with the next seed.
  :file PATH              the text of a UTF-8 file
  :position N             think before token N; -1 is the last token, "end" the end of the text (nothing to score)
  :thoughts N             how many thoughts
  :tokens N               cap on a thought; without N: the text's tokens, numbered, to choose a position from
  :horizon N              tokens scored after a thought
  :temperature X          of sampling
  :seed N                 decides the thoughts
  :show best|all          which thoughts are printed, the best first
  :tokens-log-ratio I     each token of thought I and its log-probability against the no-think baseline's model
  :settings               all of these as they are
  :help, :quit
Tokens are tinted, green for more likely: the text's by the gain of a thought, a thought's by its log-ratio."""


@dataclasses.dataclass
class Conversation:
    """What has been set, said and thought so far. None: as the model's experiment says."""

    thinker: Thinker
    position: int | None = None  # None: the last token, so that there is something to score
    thoughts: int = 4
    tokens: int | None = None
    temperature: float | None = None
    horizon: int | None = None
    seed: int = 0
    show: str = "all"
    text: str = ""
    last: Thinking | None = None
    at_end: bool = False

    def answer(self, line: str, console: Console) -> bool:
        """Does what one line says. Returns whether the conversation goes on.

        Raises:
          ValueError, OSError: what the line asks for cannot be done; nothing has changed.
        """
        name, _, value = line.strip().partition(" ")
        value = value.strip()
        if name.startswith(":"):
            if name not in COMMANDS:
                raise ConfigError(f"unknown command {name!r}{suggest(name, COMMANDS)}; :help explains them")
            return COMMANDS[name](self, value, console) is not False
        if line.strip():
            self.think(line.rstrip("\n"), self.seed, console)
        elif self.text:
            self.think(self.text, self.seed + 1, console)
        else:
            console.print("enter a text, or :help", markup=False, highlight=False)
        return True

    def think(self, text: str, seed: int, console: Console) -> None:
        """Thinks over a text and shows it."""
        encoded = self.thinker.tokenizer.encode(text)
        if not encoded:
            raise ConfigError("the text is empty")
        position = -1 if self.position is None else self.position
        if position < 0:
            position = len(encoded) + position
        if self.at_end:
            position = len(encoded)
        waiting = console.status("thinking") if console.is_terminal else contextlib.nullcontext()
        with waiting:
            thinking = self.thinker.think(
                encoded, position, self.thoughts, self.tokens, self.temperature, self.horizon, seed
            )
        self.text, self.seed, self.last = text, seed, thinking
        self.show_thoughts(console)

    def show_thoughts(self, console: Console) -> None:
        """The latest thoughts, the best first."""
        thinking, tokenizer = self.last, self.thinker.tokenizer
        say(console, place(thinking, tokenizer))
        target = token_texts(tokenizer, thinking.target)
        if thinking.target:
            say(console, f"without a thought: {thinking.s_ema:+.3f} nats a token")
        for g in best_first(thinking)[: 1 if self.show == "best" else None]:
            say(console, "\n" + title(thinking, g))
            pieces = token_texts(tokenizer, thinking.thoughts[g])
            say(console, tinted(pieces, thinking.log_ratio_GL[g, : len(pieces)]))
            if thinking.target:
                gains = ", ".join(
                    f"{piece!r} {gain:+.3f}" for piece, gain in zip(target, thinking.gain_GH[g], strict=True)
                )
                say(console, Text.assemble("→ ", tinted(target, thinking.gain_GH[g]), f"   {gains}"))


def talk(conversation: Conversation, console: Console | None = None) -> None:
    """Reads lines until :quit or the end of the input. What cannot be done is a line, and the conversation goes on."""
    console = console or Console()
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        say(console, "enter a text to think over; :help lists commands, :quit ends")
    while True:
        try:
            line = input(PROMPT) if terminal else sys.stdin.readline()
            if not terminal and not line:
                return
            if not conversation.answer(line, console):
                return
        except EOFError:
            say(console, "")
            return
        except KeyboardInterrupt:
            say(console, "\n(:quit ends)")
        except (ValueError, OSError) as error:
            say(console, f"error: {one_line(error)}")


def say(console: Console, text: str | Text) -> None:
    """A line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _number(name: str, kind: type, least: float, above: bool = False) -> Callable[[Conversation, str, Console], None]:
    """The command that sets a number, and shows it where none is given."""

    def command(conversation: Conversation, value: str, console: Console) -> None:
        if value:
            try:
                number = kind(value)
            except ValueError:
                number = None
            if number is None or not (number > least if above else number >= least) or number == float("inf"):
                wanted = "a whole number" if kind is int else "a number"
                bound = f"{'above' if above else 'of at least'} {least:g}"
                raise ConfigError(f":{name} is {value!r}: write {wanted} {bound}, for instance :{name} "
                                  f"{'0.7' if kind is float else '4'}")  # fmt: skip
            setattr(conversation, name, number)
        _show(conversation, name, console)

    return command


def _show(conversation: Conversation, name: str, console: Console) -> None:
    value = getattr(conversation, name)
    rlp = conversation.thinker.rlp
    usual = {"tokens": min(rlp.thought_tokens, 256), "temperature": rlp.temperature, "horizon": rlp.horizon}
    if name == "position":
        value = "end" if conversation.at_end else -1 if value is None else value
    say(console, f"{name} {usual[name] if value is None else value}")


def _position(conversation: Conversation, value: str, console: Console) -> None:
    if value == "end":
        conversation.at_end = True
    elif value:
        try:
            conversation.position, conversation.at_end = int(value), False
        except ValueError:
            raise ConfigError(f":position is {value!r}: write a token's number, -1 for the last, or end") from None
    _show(conversation, "position", console)


def _tokens(conversation: Conversation, value: str, console: Console) -> None:
    if value or not conversation.text:
        _number("tokens", int, 1)(conversation, value, console)
        return
    tokenizer = conversation.thinker.tokenizer
    pieces = token_texts(tokenizer, tokenizer.encode(conversation.text))
    say(console, " ".join(f"{number}:{piece!r}" for number, piece in enumerate(pieces)))


def _show_which(conversation: Conversation, value: str, console: Console) -> None:
    value = value.lower()
    if value not in ("best", "all"):
        raise ConfigError(f":show is {value!r}: write best or all")
    conversation.show = value
    if conversation.last is not None:
        conversation.show_thoughts(console)


def _file(conversation: Conversation, value: str, console: Console) -> None:
    if not value:
        raise ConfigError(":file needs a path, for instance :file text.txt")
    conversation.think(Path(value).expanduser().read_text(encoding="utf-8"), conversation.seed, console)


def _log_ratio(conversation: Conversation, value: str, console: Console) -> None:
    last = conversation.last
    if last is None:
        raise ConfigError(":tokens-log-ratio: there is no thought yet, enter a text first")
    if not (value.isdecimal() and 1 <= int(value) <= len(last.thoughts)):
        raise ConfigError(f":tokens-log-ratio is {value!r}: write a thought's number, 1 to {len(last.thoughts)}")
    g = int(value) - 1
    pieces = token_texts(conversation.thinker.tokenizer, last.thoughts[g])
    ratios = last.log_ratio_GL[g, : len(pieces)]
    say(console, tinted(pieces, ratios))
    for number, (piece, ratio) in enumerate(zip(pieces, ratios, strict=True), 1):
        say(console, f"{number:4d} {ratio:+8.4f}  {piece!r}")
    if conversation.thinker.params is conversation.thinker.ema_params:
        say(console, "(this model is its own baseline: all ratios are 0; a run directory has two)")


def _settings(conversation: Conversation, value: str, console: Console) -> None:
    for name in ("position", "thoughts", "tokens", "horizon", "temperature", "seed", "show"):
        _show(conversation, name, console)


def _help(conversation: Conversation, value: str, console: Console) -> None:
    say(console, HELP)


def _quit(conversation: Conversation, value: str, console: Console) -> bool:
    return False


COMMANDS: dict[str, Callable[[Conversation, str, Console], bool | None]] = {
    ":file": _file,
    ":position": _position,
    ":thoughts": _number("thoughts", int, 1),
    ":tokens": _tokens,
    ":horizon": _number("horizon", int, 1),
    ":temperature": _number("temperature", float, 0.0, above=True),
    ":seed": _number("seed", int, 0),
    ":show": _show_which,
    ":tokens-log-ratio": _log_ratio,
    ":settings": _settings,
    ":help": _help,
    ":quit": _quit,
}
