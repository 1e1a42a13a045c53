# SPDX-License-Identifier: Apache-2.0
"""The command line: `rlp train | eval | sample | convert | report | data | compile`, a module of `commands/` each.

Nothing of jax is imported before a command needs it, so `rlp --help` answers at once. Bad input is one line on
standard error and exit code 2. 1: `compile` found that a run does not fit, or any failure not listed here. 3: a
run that diverged. 130 and 143: a run that was interrupted and saved. 74: storage kept failing, the last checkpoint is
as it was. 75: a process of a run in several was lost, start all of them again.
"""

import argparse
import sys
from collections.abc import Sequence

from rlp_jax.commands import compile, convert, data, evaluate, report, sample, train
from rlp_jax.commands.base import Parser, complain, is_bad_input

COMMANDS = (train, sample, evaluate, convert, report, data, compile)  # in the order of `rlp --help`

EPILOG = """
start here:
  rlp train quickstart                    RLP in minutes on a CPU, nothing is downloaded
  rlp train quickstart --dry-run          what that run would compute, and how much memory it would take
  rlp sample runs/quickstart --interactive
  rlp COMMAND --help                      options of a command, with examples

exit codes: 0 done; 2 bad input, in one line; 3 the run diverged; 130, 143 interrupted and saved; 74 storage failed;
75 a process of the run was lost; 1 anything else. RLP_DEBUG=1 shows the traceback of an error.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(
        prog="rlp",
        description="RLP, reinforcement as a pretraining objective: a language model learns to think before it "
        "predicts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"rlp_jax {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    top.commands = commands.choices
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. RLP_DEBUG=1 shows the traceback of an error."""
    args = parser().parse_args(argv)
    args.command_line = ["rlp", *(sys.argv[1:] if argv is None else argv)]
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if not is_bad_input(error):
            raise
        complain(error)
        return 2


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("rlp_jax")
    except metadata.PackageNotFoundError:
        return "(not installed)"
