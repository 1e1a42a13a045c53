# SPDX-License-Identifier: Apache-2.0
"""`rlp compile`: a step compiled for a TPU pod, on a machine without one."""

import argparse
import os
from typing import Any

from rlp_jax.commands.base import add_parser, add_settings
from rlp_jax.config import ConfigError

EXAMPLES = """
rlp compile pod/qwen3_1_7b --topology v5e:16x16       does it fit, what does it move, how long does a step take at least
rlp compile pod/qwen3_14b --topology v5p:4x4x4 --search   the meshes that fit, the fastest first
rlp compile pod/qwen3_1_7b --topology v5e:16x16 --set rlp.microbatches=4 --tokens 512
"""


def add(commands: Any) -> None:
    """The command's parser."""
    parser = add_parser(
        commands, "compile",
        "compile a step for a TPU pod, on a machine without one: does it fit, what does it move and cost",
        "Compiles the two programs of a step with the TPU compiler (pip install 'rlp_jax[tpu]'), from shapes alone, "
        "and says what they\nneed of each chip. Exit code 1: it does not fit.",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a name of experiments/ (pod/qwen3_1_7b, ...) or a .py file with "
        "config()"
    )  # fmt: skip
    parser.add_argument("--topology", required=True, help="chips, for instance v5e:16x16, v5p:4x4x4 or v6e:8x8")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="pods of this topology (default: 1)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of each thought, for the time bound (default: the most there may be)"
    )
    parser.add_argument("--level", choices=("O0", "O1", "O2", "O3"), help="of optimisation; O0 compiles fast and "
                        "overestimates memory (default: as in a run)")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="try meshes, at O0, and rank those that fit")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compiles and says what came of it."""
    from rlp_jax.aot.chips import parse_topology
    from rlp_jax.settings import load_experiment, override, validate

    if args.search and args.level not in (None, "O0"):
        raise ConfigError(f"--level {args.level} with --search: a search compiles at O0")
    config = override(load_experiment(args.experiment, args.arguments), args.overrides)
    validate(config)
    topology = parse_topology(args.topology, args.slices)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from rlp_jax.aot.command import O0, as_json, compile_for, describe, search

    if args.search:
        print(O0)
        ranked = search(config, topology, args.tokens)
        print(describe(ranked[0]))
        result = {"fits": ranked[0]["fits"], "ranked": ranked}
    else:
        result = compile_for(config, topology, args.level, args.tokens)
        print(describe(result))
    if args.json:
        print(as_json(result))
    return 0 if result["fits"] else 1
