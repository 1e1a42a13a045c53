# SPDX-License-Identifier: Apache-2.0
"""`rlp data`: what documents hold, how fast they are read, and documents as a TFDS dataset."""

import argparse
from pathlib import Path
from typing import Any

from rlp_jax.commands.base import add_parser, add_settings

EXAMPLES = """
rlp data check corpus/*.jsonl.gz --model quickstart   what is malformed, a copy, too short or too long
rlp data bench --experiment quickstart --run runs/quickstart
rlp data build corpus.parquet --name mine --data-dir datasets
"""


def add(commands: Any) -> None:
    """The command's parser, and those of its own commands."""
    top = add_parser(
        commands, "data", "check documents, measure reading, write them as a dataset",
        "Reads documents as a run would, without one. A source is a file, a directory, a pattern, a URL, hf:... or "
        "tfds:..., as in data.sources.",
        EXAMPLES,
    )  # fmt: skip
    inner = top.add_subparsers(dest="data_command", required=True, metavar="COMMAND", title="commands")

    check = inner.add_parser("check", help="what is malformed, a copy, too short or too long: counted and listed")
    check.add_argument("--out", type=Path, metavar="FILE", help="write the whole list there, a JSON object a line")
    check.set_defaults(run=_check)

    bench = inner.add_parser("bench", help="documents a second, beside what a run's steps take")
    bench.add_argument("--run", dest="run_dir", type=Path, metavar="RUN_DIR", help="whose steps tell the appetite")
    bench.add_argument("--batch", type=int, metavar="N", help="documents a batch (default: the experiment's)")
    bench.set_defaults(run=_bench)

    build = inner.add_parser("build", help="write documents as rlp_documents/NAME of tensorflow-datasets")
    build.add_argument("--name", required=True, help="of the dataset's configuration")
    build.add_argument("--data-dir", type=Path, required=True, metavar="DIRECTORY",
                       help="directory of datasets, as TFDS_DATA_DIR names it")  # fmt: skip
    build.set_defaults(run=_build)

    for parser in (check, bench, build):
        parser.add_argument("sources", nargs="*", metavar="SOURCE", help="(default: the experiment's)")
        parser.add_argument("--experiment", metavar="NAME", help="take settings and tokenizer from it")
        parser.add_argument("--model", help="take the tokenizer of this one")
        add_settings(parser)
        parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def _check(args: argparse.Namespace) -> int:
    from rlp_jax.data.command import check

    return check(args)


def _bench(args: argparse.Namespace) -> int:
    from rlp_jax.data.command import bench

    return bench(args)


def _build(args: argparse.Namespace) -> int:
    from rlp_jax.data.command import build

    return build(args)
