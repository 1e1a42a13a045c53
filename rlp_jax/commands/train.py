# SPDX-License-Identifier: Apache-2.0
"""`rlp train`: a run, from its experiment and settings to its report."""

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any, get_args

from rlp_jax.commands.base import add_parser, add_settings, complain, is_bad_input, one_line, quoted
from rlp_jax.config import Algorithm, Config, ConfigError, Match, with_algorithm

EXAMPLES = """
rlp train quickstart                                  minutes on a CPU; writes runs/quickstart, report.html in it
rlp train quickstart --dry-run                        shapes, parameters, memory and tokens; writes nothing
rlp train smollm2 --with corpus=encyclopedia          an experiment's own arguments
rlp train my_experiment.py --set rlp.group_size=8 --set optimizer.learning_rate=2e-6 --run-dir runs/mine
rlp train quickstart --as cpt --match flops           the rival: next-token loss on the same text, for as much compute
rlp train quickstart --profile 5:6                    trace two steps for XProf
rlp train quickstart --wandb my-project               to Weights & Biases, beside TensorBoard and jsonl
"""


def add(commands: Any) -> None:
    """The command's parser."""
    parser = add_parser(
        commands, "train", "run RLP or a rival; the same command again resumes a run that was stopped",
        "Trains. A run that was stopped or killed is resumed by the same command and gives what it would have given.\n"
        "Ctrl-C finishes the step in progress and saves; a second one stops at once.",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument("experiment", metavar="EXPERIMENT",
                        help="a name of experiments/ (quickstart, ...) or a .py file with config()")  # fmt: skip
    parser.add_argument("--run-dir", type=Path, metavar="DIRECTORY",
                        help="where everything is written (default: runs/NAME)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what the run would compute, with which memory and "
                        "over how many tokens, and write nothing")  # fmt: skip
    settings = parser.add_argument_group("settings")
    settings.add_argument("--steps", type=int, metavar="N", help="training steps")
    settings.add_argument("--seed", type=int, metavar="N", help="of the whole run")
    add_settings(settings)
    rivals = parser.add_argument_group("rivals")
    rivals.add_argument("--as", dest="algorithm", choices=get_args(Algorithm), help="train with another algorithm")
    rivals.add_argument("--match", choices=get_args(Match), help="with --as cpt, sft or rpt: for as many steps as "
                        "match the experiment's RLP run in input tokens, in tokens read and sampled (the paper's "
                        "FLOPs), or in operations counted from both programs; without --as: the experiment is the "
                        "rival, and --match-run the RLP run")  # fmt: skip
    rivals.add_argument("--match-run", type=Path, metavar="RUN_DIR", help="the RLP run whose thoughts' length counts "
                        "(default: the longest they may be)")  # fmt: skip
    rivals.add_argument("--rival-run", type=Path, metavar="RUN_DIR", help="with --match flops and a rival that "
                        "samples: a run of it that tells how much")  # fmt: skip
    watching = parser.add_argument_group("watching", "console, jsonl files and TensorBoard logs come anyway")
    watching.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too (pip install "
                          "'rlp_jax[wandb]'); WANDB_MODE=offline keeps it on this machine")  # fmt: skip
    watching.add_argument("--profile", metavar="STEPS",
                          help="trace these steps for XProf into RUN_DIR/profile, for instance 5:8")  # fmt: skip
    several = parser.add_argument_group("several processes", "on Cloud TPU set RLP_DISTRIBUTED=auto instead")
    several.add_argument("--processes", type=int, metavar="N", help="how many the run has")
    several.add_argument("--process-id", type=int, metavar="N", help="which one this is, from 0")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, any free port")
    parser.set_defaults(run=run)


def settings_of(args: argparse.Namespace) -> tuple[Config, Config]:
    """The run's settings, and those of the RLP run that it is to match. Raises ConfigError."""
    from rlp_jax.settings import load_experiment, override, validate

    config = override(load_experiment(args.experiment, args.arguments), args.overrides)
    for name in ("steps", "seed"):
        if getattr(args, name) is not None:
            config = override(config, [f"{name}={getattr(args, name)}"])
    of_rlp = config
    for option, given in (("--match-run", args.match_run), ("--rival-run", args.rival_run)):
        if args.match is None and given is not None:
            raise ConfigError(f"{option} without --match: say what to match, tokens, flops or counted")
    if args.algorithm is not None:
        config = with_algorithm(config, args.algorithm)
    elif args.match is not None and config.algorithm == "rlp":
        raise ConfigError("--match without --as: say which algorithm is to match RLP, for instance --as cpt")
    elif args.match is not None and args.match_run is None:
        raise ConfigError("--match without --as: name the RLP run that this experiment is to match with --match-run")
    validate(config)
    return config, of_rlp


def run(args: argparse.Namespace) -> int:
    """Trains; prints the path of the report."""
    config, of_rlp = settings_of(args)
    run_dir = args.run_dir or Path("runs") / (config.name if args.match is None else f"{config.name}_{args.match}")

    from rlp_jax.profiling import parse_steps
    from rlp_jax.wandb_writer import check_wandb

    profile = None if args.profile is None else parse_steps(args.profile)
    if args.wandb is not None:
        check_wandb(args.wandb)
    if args.dry_run:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, so no accelerator is taken

        from rlp_jax.aot.dry_run import describe as describe_run
        from rlp_jax.aot.dry_run import dry_run

        print(describe_run(dry_run(_matched(args, config, of_rlp, quiet=False))))
        return 0

    from rlp_jax.distributed import ProcessLost, join
    from rlp_jax.interrupt import Interrupted
    from rlp_jax.rollout.selfcheck import SharingError
    from rlp_jax.storage import EXIT_CODE, StorageError
    from rlp_jax.train import TooManySkipped, train
    from rlp_jax.watchdog import LOST

    try:
        team = join(args.processes, args.process_id, args.coordinator)
    except ProcessLost as error:
        complain(error)
        return LOST
    if not os.environ.get("RLP_DEBUG"):  # Orbax logs tracebacks of a save that failed; the run says so in a line
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        config = _matched(args, config, of_rlp, quiet=not team.first)
        report = train(config, run_dir, team=team, profile=profile, wandb=args.wandb)
    except Interrupted as stopped:
        again = quoted(args.command_line)
        print(
            f"stopped by {stopped}; saved in {run_dir}: the same command resumes the run:\n  {again}", file=sys.stderr
        )
        return team.leave(stopped.exit_code)
    except (SharingError, TooManySkipped) as error:
        complain(error)
        return team.leave(3, one_line(error))
    except StorageError as error:
        complain(error)
        return team.leave(EXIT_CODE, one_line(error))
    except KeyboardInterrupt:
        return team.leave(130, "interrupted")
    except Exception as error:
        if team.alone:
            raise
        bad_input = is_bad_input(error)
        print(f"rlp: error: {one_line(error)}" if bad_input else traceback.format_exc(), file=sys.stderr)
        return team.leave(2, one_line(error)) if bad_input else team.failed(error)
    if team.first:
        print(report)
    return team.leave(0)


def _matched(args: argparse.Namespace, config: Config, of_rlp: Config, quiet: bool) -> Config:
    """With --match: the settings with as many steps as make them equal, and the budget."""
    if args.match is None:
        return config

    from rlp_jax.aot.matching import describe, matched, measure, measure_sampling, recorded_config

    if args.algorithm is None:
        of_rlp = recorded_config(args.match_run)
    sampling = None if args.rival_run is None else measure_sampling(config, args.rival_run)
    config = matched(of_rlp, args.match, measure(of_rlp, args.match_run), config, sampling)
    if not quiet:
        print(describe(config))
    return config
