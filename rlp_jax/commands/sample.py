# SPDX-License-Identifier: Apache-2.0
"""`rlp sample`: thoughts over one text and what each is worth, once or in a conversation."""

import argparse
from pathlib import Path
from typing import Any

from rlp_jax.commands.base import MODEL, add_parser
from rlp_jax.config import ConfigError

EXAMPLES = """
rlp sample quickstart --text "c flip turn swap = e ." --position 12
rlp sample runs/mine --file text.txt --position 40 --thoughts 8 --horizon 4
rlp sample runs/mine --interactive                    a prompt: enter texts, change settings with :help, :position ...
"""


def add(commands: Any) -> None:
    """The command's parser."""
    parser = add_parser(
        commands, "sample", "think over a text; show thoughts and the gain of each",
        "Samples thoughts before one token of a text, and says how much likelier each makes the tokens that follow, in "
        "nats a token,\nagainst no thought at all. At the end of the text there is nothing to score.",
        EXAMPLES,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the text itself")
    text.add_argument("--file", type=Path, help="a UTF-8 text file")
    text.add_argument("--interactive", action="store_true", help="read texts and commands from standard input")
    parser.add_argument(
        "--position", type=int, metavar="N", help="token to think before (default: the end of the text)"
    )
    parser.add_argument("--thoughts", type=int, default=4, metavar="N", help="how many (default: 4)")
    parser.add_argument("--tokens", type=int, metavar="N",
                        help="cap on a thought (default: the experiment's, at most 256)")  # fmt: skip
    parser.add_argument("--horizon", type=int, metavar="N",
                        help="tokens scored after a thought (default: the experiment's)")  # fmt: skip
    parser.add_argument("--temperature", type=float, help="default: the experiment's")
    parser.add_argument("--seed", type=int, default=0, help="decides the thoughts (default: 0)")
    parser.add_argument("--experiment", help="take the thought's template from it (default: a run directory's own, or "
                        "that of the experiment which trains this model)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Thinks; prints the thoughts."""
    from rlp_jax.settings import load_experiment

    for name in ("thoughts", "tokens", "horizon", "temperature"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} is {value}: it must be positive")
    text = args.text if args.file is None else args.file.read_text(encoding="utf-8")
    config = load_experiment(args.experiment) if args.experiment else None

    from rlp_jax.evals.think import open_thinker
    from rlp_jax.evals.thinking_text import describe

    thinker = open_thinker(args.model, config)
    if args.interactive:
        from rlp_jax.commands.conversation import Conversation, talk

        talk(
            Conversation(thinker, args.position, args.thoughts, args.tokens, args.temperature, args.horizon, args.seed)
        )
        return 0
    thinking = thinker.think(
        text, args.position, args.thoughts, args.tokens, args.temperature, args.horizon, args.seed
    )  # fmt: skip
    print(describe(thinking, thinker.tokenizer))
    return 0
