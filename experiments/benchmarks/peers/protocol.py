# SPDX-License-Identifier: Apache-2.0
"""The peer's side of the conversation, with the standard library alone: it runs in the peer's own environment.

One JSON line on standard input is the job. The peer loads what it needs and answers {"ready": {...}}. Then each line
"go" asks for one run of the workload, answered by one JSON line with its seconds, tokens and peak memory. In between it
waits for its turn, without using the processor. Whatever the peer's libraries print goes to standard error.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable


def peak_bytes() -> int:
    """The process's peak resident memory so far (VmHWM)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


class Conversation:
    """With the process that asks. A training loop that cannot be called a step at a time has it wait for its turns."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.job = json.loads(sys.stdin.readline())
        self._start = 0.0

    def ready(self, facts: dict) -> None:
        """Everything is loaded. `facts` are to be reported: versions, what must agree between the sides."""
        print(json.dumps({"ready": facts}), file=self._answers)

    def begin(self) -> None:
        """Waits for a turn; ends the process where there are no more."""
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self._start = time.perf_counter()

    def end(self, tokens: int) -> None:
        """The turn is over, with so many tokens made."""
        seconds = time.perf_counter() - self._start
        answer = {"seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=self._answers)


def serve(prepare: Callable[[dict], tuple[Callable[[], int], dict]]) -> None:
    """Answers until standard input ends.

    Args:
      prepare: of the job; returns the run, which returns its tokens, and the facts to report.
    """
    conversation = Conversation()
    run, facts = prepare(conversation.job)
    conversation.ready(facts)
    while True:
        conversation.begin()
        conversation.end(run())
