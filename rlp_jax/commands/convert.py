# SPDX-License-Identifier: Apache-2.0
"""`rlp convert`: a model becomes a Hugging Face directory."""

import argparse
from pathlib import Path
from typing import Any

from rlp_jax.commands.base import MODEL, add_parser

EXAMPLES = """
rlp convert runs/mine exported                        the policy of a run
rlp convert runs/mine exported --ema                  its moving average
rlp convert smollm2-135m-instruct weights --dtype bfloat16
"""


def add(commands: Any) -> None:
    """The command's parser."""
    parser = add_parser(
        commands, "convert", "write a model as a Hugging Face directory",
        "Writes a directory of config.json, safetensors and tokenizer.json that transformers loads: all of it or "
        "nothing.",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument("source", metavar="MODEL", help=MODEL)
    parser.add_argument("destination", metavar="DIRECTORY", type=Path, help="a new directory")
    parser.add_argument("--ema", action="store_true", help="of a run: the moving average instead of the policy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the stored weights (default: float32, bit for bit)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts; prints the directory."""
    from rlp_jax.api import export

    print(export(args.source, args.destination, ema=args.ema, dtype=args.dtype))
    return 0
