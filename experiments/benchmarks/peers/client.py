# SPDX-License-Identifier: Apache-2.0
"""Our side: starts a peer in its environment and asks it to take its turn."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import tempfile

from peers.environments import Missing

HERE = pathlib.Path(__file__).parent
SETTINGS = {
    # Freed memory stays with the process, ours and theirs: torch otherwise returns its activations after every step,
    # and a third of its time goes into having them back.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "JAX_TRACEBACK_FILTERING": "off",  # the last line of an error is then the error
}


class Peer(contextlib.AbstractContextManager):
    """A script of this folder, run by `python` and loaded with `job`; `go()` is one run of the workload.

    Raises:
      Missing: the script failed; with the last line of what it said.
    """

    def __init__(self, python: pathlib.Path, script: str, job: dict):
        self.script, self.log = script, tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS
        self.process = subprocess.Popen([python, HERE / script], text=True, bufsize=1, env=environment, **pipes)
        try:
            self.facts = self._ask(json.dumps(job))["ready"]
        except Missing:
            self.close()
            raise

    def go(self) -> dict:
        """One run: {"seconds", "tokens", "peak_bytes"}."""
        return self._ask("go")

    def _ask(self, line: str) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        self.process.wait()
        self.log.seek(0)
        said = [text.strip() for text in self.log.read().splitlines() if text.strip()]
        if self.process.returncode == -signal.SIGKILL:
            raise Missing(f"{self.script} was killed, as the system does when memory runs out")
        raise Missing(f"{self.script} ended with code {self.process.returncode}: {(said or ['no message'])[-1]}")

    def close(self) -> None:
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __exit__(self, *_):
        self.close()
