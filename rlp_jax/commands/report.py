# SPDX-License-Identifier: Apache-2.0
"""`rlp report`: figures and page of a run, or several runs side by side."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rlp_jax.commands.base import add_parser
from rlp_jax.config import ConfigError

EXAMPLES = """
rlp report runs/quickstart                            figures/*.png and report.html in the run's directory
rlp report runs/quickstart --documents 50             with the gain at every token of 50 held-out documents
rlp report runs/mine runs/other --out both.html       several runs side by side
"""


def add(commands: Any) -> None:
    """The command's parser."""
    parser = add_parser(
        commands, "report", "write figures and report.html of a run again, or compare several runs",
        "Writes the figures and the page of a run, finished or not, and prints the page's path. `rlp train` does it at "
        "the end of a run.",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="a run's directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of several runs: the page that compares them "
                        "(default: comparison.html)")  # fmt: skip
    parser.add_argument("--documents", type=int, metavar="N", help="record the gain at every token of so many held-out "
                        "documents first, before training and at the latest checkpoint")  # fmt: skip
    parser.add_argument("--positions", type=int, metavar="N", help="with --documents: tokens of each at most (default: "
                        "the run's)")  # fmt: skip
    parser.add_argument(
        "--thoughts", type=int, metavar="N", help="with --documents: at each token (default: the run's)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page; prints its path."""
    from rlp_jax.report.page import write_comparison, write_report
    from rlp_jax.report.run import read_run

    for name, least in (("documents", 1), ("positions", 1), ("thoughts", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}: it must be at least {least}")
        if value is not None and args.documents is None:
            raise ConfigError(f"--{name} without --documents: say how many documents to record")
    several = len(args.run_dirs) > 1
    if args.out is not None and not several:
        raise ConfigError("--out is of several runs: the page of one is its report.html")
    for run_dir in args.run_dirs:
        read_run(run_dir)
    if args.documents is not None:
        from rlp_jax.evals.recording import record

        for run_dir in args.run_dirs:
            record(run_dir, args.documents, args.positions, args.thoughts, lambda text: print(text, file=sys.stderr))
            if several:
                write_report(run_dir)
    if several:
        print(write_comparison(args.run_dirs, args.out or Path("comparison.html")))
    else:
        print(write_report(args.run_dirs[0]))
    return 0
