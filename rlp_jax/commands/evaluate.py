# SPDX-License-Identifier: Apache-2.0
"""`rlp eval`: benchmarks, perplexity, and where in text thoughts gain."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from rlp_jax.commands.base import MODEL, add_parser, complain
from rlp_jax.config import PositionMode

TASKS = "gsm8k, math500, minerva, amc23, aime25, mmlu, mmlu_pro, gpqa_diamond, perplexity, gain"
EXAMPLES = """
rlp eval runs/mine --tasks gsm8k,mmlu --data benchmarks --samples 8
rlp eval runs/mine --tasks perplexity --data text.jsonl   with and without thoughts, and both controls
rlp eval runs/mine --tasks gain --position-mode uniform   where in held-out text thinking pays, and what thoughts quote
rlp eval smollm2-135m-instruct --tasks gsm8k --limit 50 --think
"""


def add(commands: Any) -> None:
    """The command's parser."""
    parser = add_parser(
        commands, "eval", "benchmarks, perplexity with and without thoughts, where thoughts gain",
        "Evaluates a model. Every response is a line of the task's .jsonl; the same command again goes on where one "
        "was stopped.\nBenchmarks need the judge of answers: pip install 'rlp_jax[eval]'.",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--tasks", required=True, metavar="NAME[,NAME]", help=TASKS)
    parser.add_argument("--data", help="a .jsonl file, a directory of them, or a Hugging Face dataset as "
                        "NAME:CONFIG:SPLIT (default: the task's own; of gain, held-out documents)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="the first so many problems of each task")
    parser.add_argument("--ema", action="store_true", help="of a run: the moving average instead of the policy")
    parser.add_argument("--experiment", help="take the thought's template from it (default: as for sample)")
    parser.add_argument("--seed", type=int, help="of the samples")
    parser.add_argument("--batch", type=int, metavar="N", help="responses decoded at a time")
    parser.add_argument("--mesh", metavar="AXIS=N[,AXIS=N]", help="devices along data, fsdp and tensor (default: as "
                        "the run had them, where they are as many; else weights over all)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIRECTORY",
                        help="of the records (default: RUN/evals/STEP or evals/MODEL)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    responses = parser.add_argument_group("responses and thoughts")
    responses.add_argument("--max-tokens", type=int, metavar="N", help="cap on a response")
    responses.add_argument("--samples", type=int, metavar="N", help="sampled responses a problem, beside the greedy "
                           "one (default: none); thoughts a position of perplexity and gain")  # fmt: skip
    responses.add_argument("--temperature", type=float, help="of the samples")
    responses.add_argument("--shots", type=int, metavar="N",
                           help="worked examples before a question; 0: an instruction instead")  # fmt: skip
    responses.add_argument("--think", action="store_true", default=None,
                           help="a thought before each response, framed as in training")  # fmt: skip
    responses.add_argument("--thought-tokens", type=int, metavar="N", help="cap on a thought")
    text = parser.add_argument_group("perplexity and gain")
    text.add_argument("--text", help="of a record: a format string such as {question}")
    text.add_argument("--positions", type=int, metavar="N", help="of a document")
    text.add_argument("--position-mode", choices=get_args(PositionMode),
                      help="which positions these are (default: as the run or experiment draws them)")  # fmt: skip
    text.add_argument("--classes", type=Path, metavar="FILE", help="token classes of your own, for gain: a JSON object "
                      "of names and regular expressions over the text")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates; prints what came of it."""
    import dataclasses

    from rlp_jax.config import SuiteConfig

    names = [field.name for field in dataclasses.fields(SuiteConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    tasks = tuple(name.strip() for name in args.tasks.split(",") if name.strip())

    from rlp_jax.evals.command import Request, as_json, describe, evaluate
    from rlp_jax.storage import EXIT_CODE, StorageError

    request = Request(
        args.model, tasks, args.data, SuiteConfig(**given), args.limit, args.ema, args.experiment, args.text, args.out,
        args.classes, args.mesh,
    )  # fmt: skip
    try:
        result = evaluate(request, lambda text: print(text, file=sys.stderr, flush=True))
    except StorageError as error:
        complain(error)
        return EXIT_CODE
    print(describe(result))
    if args.json:
        print(as_json(result))
    return 0
