"""The command line: `rlp train | eval | sample | convert | report | compile`.

Nothing of jax is imported before a command needs it, so `rlp --help` answers at once. Bad input is one line on
standard error and exit code 2. 1: `compile` found that a run does not fit, or any failure not listed here. 3: a
run that diverged. 130 and 143: a run that was interrupted and saved. 74: storage kept failing, the last checkpoint is
as it was. 75: a process of a run in several was lost, start all of them again.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rlp_jax.config import Algorithm, ConfigError, Match, PositionMode, with_algorithm


class Parser(argparse.ArgumentParser):
    """Errors in one line, like those of every command."""

    def error(self, message: str):
        self.exit(2, f"rlp: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="rlp", description="RLP, reinforcement as a pretraining objective: a language model learns to "
                 "think before it predicts.")  # fmt: skip
    top.add_argument("--version", action="version", version=f"rlp_jax {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="run RLP; the same command again resumes a run that was stopped")
    train.add_argument(
        "experiment", help="a name of experiments/ (quickstart, smollm2, ...) or a .py file with config()"
    )
    train.add_argument("--run-dir", type=Path, help="where everything is written (default: runs/NAME)")
    train.add_argument("--steps", type=int, help="training steps")
    train.add_argument("--seed", type=int, help="of the whole run")
    train.add_argument("--with", dest="arguments", action="append", default=[], metavar="NAME=VALUE",
                       help="an argument of the experiment's config(), for instance corpus=encyclopedia")  # fmt: skip
    train.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE",
                       help="any setting of config.py, for instance rlp.group_size=8; may be repeated")  # fmt: skip
    train.add_argument("--as", dest="algorithm", choices=get_args(Algorithm), help="train with another algorithm")
    train.add_argument("--match", choices=get_args(Match), help="with --as cpt, sft or rpt: for as many steps as match "
                       "the experiment's RLP run in input tokens, in tokens read and sampled (the paper's FLOPs), or "
                       "in operations counted from both programs; without --as: the experiment is the rival, and "
                       "--match-run the RLP run")  # fmt: skip
    train.add_argument("--match-run", type=Path, metavar="RUN_DIR", help="the RLP run whose thoughts' length counts "
                       "(default: the longest they may be)")  # fmt: skip
    train.add_argument("--rival-run", type=Path, metavar="RUN_DIR", help="with --match flops and a rival that samples: "
                       "a run of it that tells how much")  # fmt: skip
    train.add_argument("--profile", metavar="STEPS", help="trace these steps for XProf, for instance 5:8")
    several = train.add_argument_group("several processes", "on Cloud TPU set RLP_DISTRIBUTED=auto instead")
    several.add_argument("--processes", type=int, help="how many the run has")
    several.add_argument("--process-id", type=int, help="which one this is, from 0")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, any free port")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="think over a text; show thoughts and the gain of each")
    sample.add_argument("model", help="preset, Hugging Face directory, GGUF file or run directory")
    text = sample.add_mutually_exclusive_group(required=True)
    text.add_argument("--text")
    text.add_argument("--file", type=Path, help="a UTF-8 text file")
    sample.add_argument("--position", type=int, help="token to think before (default: the end of the text)")
    sample.add_argument("--thoughts", type=int, default=4)
    sample.add_argument("--tokens", type=int, help="cap on a thought (default: the experiment's, at most 256)")
    sample.add_argument("--horizon", type=int, help="tokens scored after a thought (default: the experiment's)")
    sample.add_argument("--temperature", type=float, help="default: the experiment's")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--experiment", help="take the thought's template from it (default: a run directory's own, or "
                        "that of the experiment which trains this model)")  # fmt: skip
    sample.set_defaults(run=_sample)

    evaluate = commands.add_parser(
        "eval",
        help="benchmarks, perplexity with and without thoughts, where thoughts gain; the same command again goes on "
        "where one stopped",
    )
    evaluate.add_argument("model", help="preset, Hugging Face directory, GGUF file or run directory")
    tasks = "gsm8k, math500, minerva, amc23, aime25, mmlu, mmlu_pro, gpqa_diamond, perplexity, gain"
    evaluate.add_argument("--tasks", required=True, metavar="NAME[,NAME]", help=tasks)
    evaluate.add_argument("--data", help="a .jsonl file, a directory of them, or a Hugging Face dataset as "
                          "NAME:CONFIG:SPLIT (default: the task's own; of gain, held-out documents)")  # fmt: skip
    evaluate.add_argument("--limit", type=int, help="the first so many problems of each task")
    evaluate.add_argument("--max-tokens", type=int, help="cap on a response")
    evaluate.add_argument("--samples", type=int, help="sampled responses a problem, beside the greedy one (default: "
                          "none); thoughts a position of perplexity and gain")  # fmt: skip
    evaluate.add_argument("--temperature", type=float, help="of the samples")
    evaluate.add_argument("--shots", type=int, help="worked examples before a question; 0: an instruction instead")
    evaluate.add_argument("--think", action="store_true", default=None,
                          help="a thought before each response, framed as in training")  # fmt: skip
    evaluate.add_argument("--thought-tokens", type=int, help="cap on a thought")
    evaluate.add_argument("--positions", type=int, help="of a document, for perplexity and gain")
    evaluate.add_argument("--position-mode", choices=get_args(PositionMode),
                          help="which positions these are (default: as the run or experiment draws them)")  # fmt: skip
    evaluate.add_argument("--classes", type=Path, help="token classes of your own, for gain: a JSON object of names "
                          "and regular expressions over the text")  # fmt: skip
    evaluate.add_argument("--text", help="of a record, for perplexity and gain: a format string such as {question}")
    evaluate.add_argument("--experiment", help="take the thought's template from it (default: as for sample)")
    evaluate.add_argument("--ema", action="store_true", help="of a run: the moving average instead of the policy")
    evaluate.add_argument("--seed", type=int, help="of the samples")
    evaluate.add_argument("--batch", type=int, help="responses decoded at a time")
    evaluate.add_argument("--out", type=Path, help="directory of the records (default: RUN/evals/STEP or evals/MODEL)")
    evaluate.add_argument("--json", action="store_true", help="end with one line of JSON")
    evaluate.set_defaults(run=_eval)

    convert = commands.add_parser("convert", help="write a model as a Hugging Face directory")
    convert.add_argument("source", help="preset, Hugging Face directory, GGUF file or run directory")
    convert.add_argument("destination", type=Path, help="a new directory")
    convert.add_argument("--ema", action="store_true", help="of a run: the moving average instead of the policy")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                         help="of the stored weights (default: float32, bit for bit)")  # fmt: skip
    convert.set_defaults(run=_convert)

    report = commands.add_parser("report", help="write figures and report.html of a run again, or compare several runs")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", type=Path, metavar="FILE", help="of several runs: the page that compares them "
                        "(default: comparison.html)")  # fmt: skip
    report.add_argument("--documents", type=int, help="record the gain at every token of so many held-out documents "
                        "first, before training and at the latest checkpoint")  # fmt: skip
    report.add_argument("--positions", type=int, help="with --documents: tokens of each at most (default: the run's)")
    report.add_argument("--thoughts", type=int, help="with --documents: at each token (default: the run's)")
    report.set_defaults(run=_report)

    compiled = commands.add_parser(
        "compile",
        help="compile a step for a TPU pod, on a machine without one: does it fit, what does it move and cost",
    )
    compiled.add_argument("experiment", help="a name of experiments/ (pod/qwen3_1_7b, ...) or a .py file with config()")
    compiled.add_argument("--topology", required=True, help="chips, for instance v5e:16x16, v5p:4x4x4 or v6e:8x8")
    compiled.add_argument("--slices", type=int, default=1, help="pods of this topology (default: 1)")
    compiled.add_argument(
        "--tokens", type=int, help="of each thought, for the time bound (default: the most there may be)"
    )
    compiled.add_argument("--level", choices=("O0", "O1", "O2", "O3"), help="of optimisation; O0 compiles fast and "
                          "overestimates memory (default: as in a run)")  # fmt: skip
    compiled.add_argument("--search", action="store_true", help="try meshes, at O0, and rank those that fit")
    compiled.add_argument("--json", action="store_true", help="end with one line of JSON")
    compiled.add_argument("--with", dest="arguments", action="append", default=[], metavar="NAME=VALUE")
    compiled.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    compiled.set_defaults(run=_compile)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. RLP_DEBUG=1 shows the traceback of an error."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("RLP_DEBUG"):
            raise
        print(f"rlp: error: {one_line(error)}", file=sys.stderr)
        return 2


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("rlp_jax")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _train(args) -> int:
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
    run_dir = args.run_dir or Path("runs") / (config.name if args.match is None else f"{config.name}_{args.match}")

    from rlp_jax.profiling import parse_steps

    profile = None if args.profile is None else parse_steps(args.profile)

    from rlp_jax.distributed import ProcessLost, join
    from rlp_jax.interrupt import Interrupted
    from rlp_jax.rollout.selfcheck import SharingError
    from rlp_jax.storage import EXIT_CODE, StorageError
    from rlp_jax.train import TooManySkipped, train
    from rlp_jax.watchdog import LOST

    try:
        team = join(args.processes, args.process_id, args.coordinator)
    except ProcessLost as error:
        print(f"rlp: error: {one_line(error)}", file=sys.stderr)
        return LOST
    if not os.environ.get("RLP_DEBUG"):  # Orbax logs tracebacks of a save that failed; the run says so in a line
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        if args.match is not None:
            from rlp_jax.aot.matching import describe, matched, measure, measure_sampling, recorded_config

            if args.algorithm is None:
                of_rlp = recorded_config(args.match_run)
            sampling = None if args.rival_run is None else measure_sampling(config, args.rival_run)
            config = matched(of_rlp, args.match, measure(of_rlp, args.match_run), config, sampling)
            if team.first:
                print(describe(config))
        report = train(config, run_dir, team=team, profile=profile)
    except Interrupted as stopped:
        print(f"stopped by {stopped}; saved in {run_dir}: the same command resumes the run", file=sys.stderr)
        return team.leave(stopped.exit_code)
    except (SharingError, TooManySkipped) as error:
        print(f"rlp: error: {one_line(error)}", file=sys.stderr)
        return team.leave(3, one_line(error))
    except StorageError as error:
        print(f"rlp: error: {one_line(error)}", file=sys.stderr)
        return team.leave(EXIT_CODE, one_line(error))
    except KeyboardInterrupt:
        return team.leave(130, "interrupted")
    except Exception as error:
        if team.alone:
            raise
        bad_input = isinstance(error, (ValueError, OSError)) and not os.environ.get("RLP_DEBUG")
        print(f"rlp: error: {one_line(error)}" if bad_input else traceback.format_exc(), file=sys.stderr)
        return team.leave(2, one_line(error)) if bad_input else team.failed(error)
    if team.first:
        print(report)
    return team.leave(0)


def _sample(args) -> int:
    from rlp_jax.settings import load_experiment

    for name in ("thoughts", "tokens", "horizon", "temperature"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} is {value}: it must be positive")
    text = args.text if args.file is None else args.file.read_text(encoding="utf-8")
    config = load_experiment(args.experiment) if args.experiment else None

    from rlp_jax.evals.think import open_thinker

    thinker = open_thinker(args.model, config)
    thinking = thinker.think(text, args.position, args.thoughts, args.tokens, args.temperature, args.horizon, args.seed)
    tokens, position, tokenizer = thinking.tokens, thinking.position, thinker.tokenizer
    print(f"before token {position} of {len(tokens)}: ...{tokenizer.decode(tokens[:position])[-200:]!r}")
    if thinking.gain_G is not None:
        target = tokenizer.decode(thinking.target)
        print(f"the text goes on with {target!r}: {thinking.s_ema:+.3f} nats a token without a thought")
    for g, thought in enumerate(thinking.thoughts):
        gain = "" if thinking.gain_G is None else f"gain {thinking.gain_G[g]:+.3f}, "
        end = "" if thinking.stopped_G[g] else ", cut at the cap"
        print(f"\n[{g + 1}] {gain}{thinking.length_G[g]} tokens{end}\n{tokenizer.decode(thought)}")
    return 0


def _eval(args) -> int:
    import dataclasses

    from rlp_jax.config import SuiteConfig

    names = [field.name for field in dataclasses.fields(SuiteConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    tasks = tuple(name.strip() for name in args.tasks.split(",") if name.strip())

    from rlp_jax.evals.command import Request, as_json, describe, evaluate
    from rlp_jax.storage import EXIT_CODE, StorageError

    request = Request(
        args.model, tasks, args.data, SuiteConfig(**given), args.limit, args.ema, args.experiment, args.text, args.out,
        args.classes,
    )  # fmt: skip
    try:
        result = evaluate(request, lambda text: print(text, file=sys.stderr, flush=True))
    except StorageError as error:
        print(f"rlp: error: {one_line(error)}", file=sys.stderr)
        return EXIT_CODE
    print(describe(result))
    if args.json:
        print(as_json(result))
    return 0


def _convert(args) -> int:
    from rlp_jax.api import export

    print(export(args.source, args.destination, ema=args.ema, dtype=args.dtype))
    return 0


def _compile(args) -> int:
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


def _report(args) -> int:
    from rlp_jax.report.page import write_comparison, write_report
    from rlp_jax.report.run import read_run

    for name, value, least in (("documents", args.documents, 1), ("positions", args.positions, 1),
                               ("thoughts", args.thoughts, 2)):  # fmt: skip
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
    print(write_comparison(args.run_dirs, args.out or Path("comparison.html")) if several else
          write_report(args.run_dirs[0]))  # fmt: skip
    return 0
