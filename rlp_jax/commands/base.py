# SPDX-License-Identifier: Apache-2.0
"""What the commands share: a parser whose errors are one line with the nearest names, and common options."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rlp_jax.nearest import suggest
from rlp_jax.watchdog import of_runtime

MODEL = "preset, Hugging Face directory, GGUF file or run directory"


class Parser(argparse.ArgumentParser):
    """Errors in one line, like those of every command, with the nearest name for one that is misspelt."""

    commands: dict[str, argparse.ArgumentParser] | None = None  # of the parser of all commands
    _words: Sequence[str] = ()  # of the command line

    def parse_args(self, args=None, namespace=None):
        """As argparse does, and keeps the words to find the command in whose options a name is near."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        invalid = re.match(r"(argument .*?: invalid choice: \W?(.*?)'?) \(choose from (.*)\)$", message, re.DOTALL)
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if invalid:
            said, given, choices = invalid.groups()
            message = said + suggest(given, re.findall(r"[\w.-]+", choices))
        elif unknown:
            near = suggest(unknown.group(1), self._options())
            message += near if "did you mean" in near else ""
        self.exit(2, f"rlp: error: {message} (see {self.prog} --help)\n")

    def _options(self) -> list[str]:
        named = [self.commands[word] for word in self._words if self.commands and word in self.commands]
        return [option for parser in named or [self] for option in re.findall(r"--[\w-]+", parser.format_usage())]


def add_parser(commands: Any, name: str, help: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command of its own.

    Args:
      commands: what `add_subparsers` gives.
      help: its line in `rlp --help`.
      description: what it does, for `rlp NAME --help`.
      examples: lines of commands, each with a comment.
    """
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_settings(group: Any) -> None:
    """The options of commands that take an experiment."""
    group.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
                       help="any setting of config.py, for instance rlp.group_size=8; may be repeated")  # fmt: skip
    group.add_argument("--with", dest="arguments", action="append", default=[], metavar="NAME=VALUE",
                       help="an argument of the experiment's config(), for instance corpus=encyclopedia; may be "
                       "repeated")  # fmt: skip


def is_bad_input(error: BaseException) -> bool:
    """Whether the user is to mend it, exit code 2, and a line says how; RLP_DEBUG shows all tracebacks."""
    ours = isinstance(error, (ValueError, OSError)) and not of_runtime(error)
    return ours and not os.environ.get("RLP_DEBUG")


def one_line(error: BaseException) -> str:
    """An error as a user reads it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def complain(error: BaseException | str) -> None:
    """One line on standard error."""
    print(f"rlp: error: {error if isinstance(error, str) else one_line(error)}", file=sys.stderr)


def quoted(arguments: Iterable[str]) -> str:
    """A command line as one types it."""
    import shlex

    return shlex.join(arguments)
