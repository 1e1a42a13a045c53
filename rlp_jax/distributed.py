# SPDX-License-Identifier: Apache-2.0
"""A run in several processes (multi-controller JAX): how they find each other and the few things they agree on.

All processes run the same program; each holds some of the devices and reads the documents of its own rows of a batch.
What is written to disk or console comes from process 0. With one process everything here does nothing.
"""

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rlp_jax.config import ConfigError
from rlp_jax.interrupt import Interrupted, StopSignals
from rlp_jax.sharding import batch_sharding, document_shards
from rlp_jax.watchdog import Verdict, Watchdog, of_runtime

# Seconds. A host that swaps or writes a checkpoint may be silent for a while; no phase of a step takes half an hour.
SILENT = ("RLP_SILENT_SECONDS", 60.0)  # without a sign of life a process is dead
STALLED = ("RLP_STALLED_SECONDS", 1800.0)  # in one phase of a step a process hangs
JOIN_SECONDS = 600  # for all processes to start


class ProcessLost(RuntimeError):
    """The processes of the run did not find each other."""


class Team:
    """The processes of a run; `Team()` is whatever processes JAX knows of, without a watchdog."""

    def __init__(self, watchdog: Watchdog | None = None, client: Any = None):
        self._watchdog, self._client = watchdog, client

    @property
    def count(self) -> int:
        return jax.process_count()

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return jax.process_index() == 0

    def tick(self, phase: str) -> None:
        """Tells the watchdog that a phase of the loop is finished."""
        if self._watchdog is not None:
            self._watchdog.tick(phase)

    def largest(self, value: int) -> int:
        """The largest of all processes' values; every process calls it at the same point."""
        return value if self.alone else int(multihost_utils.process_allgather(np.int32(value)).max())

    def wait(self, what: str) -> None:
        """Returns when all processes are here."""
        if not self.alone:
            multihost_utils.sync_global_devices(what)

    def same(self, facts: dict[str, str]) -> None:
        """Checks that all processes say the same of themselves, so that none runs another program than its peers.

        Raises:
          ConfigError: in all processes, naming what differs and where.
        """
        if self.alone:
            return
        digests = [list(hashlib.sha256(fact.encode()).digest()[:8]) for fact in facts.values()]
        of_all = multihost_utils.process_allgather(np.asarray(digests, np.int32))
        for i, name in enumerate(facts):
            differing = np.flatnonzero((of_all[:, i] != of_all[0, i]).any(-1))
            if len(differing):
                listed = ", ".join(map(str, differing))
                raise ConfigError(
                    f"{name}: not the same in process 0 and process {listed}; every process needs the same files, "
                    "arguments and packages, and a run directory that all of them share"
                )

    def stop_signals(self) -> StopSignals:
        """SIGINT and SIGTERM, to whichever process they come."""
        return StopSignals() if self.alone else AgreedStop(self)

    def leave(self, code: int, message: str = "") -> int:
        """The end of this process: together with the others where all of them end (no message), else telling them why.

        Returns:
          The exit code; a process that leaves others behind does not come back from here.
        """
        if self._watchdog is None:
            return code
        if message:
            self._watchdog.leave(Verdict(code, message))
        self._client.wait_at_barrier("rlp/end", int(1000 * seconds(*STALLED)))
        self._watchdog.stop()
        jax.distributed.shutdown()
        return code

    def failed(self, error: Exception) -> int:
        """The end of this process after an error that may be another one's fault: a collective operation fails where a
        process died. The watchdog then ends this one first, with the other's name."""
        if self._watchdog is not None and of_runtime(error):
            self._watchdog.wait_for_verdict()
        return self.leave(1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


class AgreedStop(StopSignals):
    """StopSignals of several processes: all see a signal at the same point, whichever of them has got it.

    Reading `requested` is that point, so every process has to read it equally often.
    """

    def __init__(self, team: Team):
        super().__init__()
        self._team, self._agreed = team, 0

    @property
    def requested(self) -> bool:
        self._agreed = self._team.largest(self._signum or 0)
        return self._agreed > 0

    def check(self) -> None:
        if self._agreed:
            raise Interrupted(self._agreed)

    @contextlib.contextmanager
    def at_once(self, before: Callable[[], None]):
        """Work ends between two of its batches (`between`): inside one the others would wait for this process."""
        try:
            yield
        except Interrupted:
            before()
            raise

    def between(self, batches: Iterable) -> Iterator:
        for batch in batches:
            if self.requested:
                raise Interrupted(self._agreed)
            self._team.tick("an evaluation batch")
            yield batch


def join(processes: int | None = None, process_id: int | None = None, coordinator: str | None = None) -> Team:
    """Joins the processes of this run; before anything touches a device.

    Args:
      processes, process_id, coordinator: how many, which one this is, HOST:PORT of process 0. All None: RLP_DISTRIBUTED
        set to "auto" asks the environment (Cloud TPU, GKE, Slurm), otherwise this process is alone.

    Raises:
      ConfigError: they do not fit together.
      ProcessLost: the others did not come.
    """
    given = {"--processes": processes, "--process-id": process_id, "--coordinator": coordinator}
    missing = [name for name, value in given.items() if value is None]
    asked = os.environ.get("RLP_DISTRIBUTED", "")
    if asked not in ("", "auto"):
        raise ConfigError(f"RLP_DISTRIBUTED is {asked!r}: write auto, or leave it out for a single process")
    if missing and len(missing) < len(given):
        raise ConfigError(f"{', '.join(missing)} missing: {', '.join(given)} belong together")
    if missing and not asked:
        return Team()
    if not missing:
        host, _, port = coordinator.rpartition(":")
        if processes < 1 or not 0 <= process_id < processes or not host or not port.isdigit():
            raise ConfigError(
                f"--processes {processes} --process-id {process_id} --coordinator {coordinator}: the id is from 0 to "
                "the number of processes less one, the coordinator HOST:PORT of process 0"
            )
    silent, stalled = seconds(*SILENT), seconds(*STALLED)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the default from jax 0.12
    jax.config.update("jax_enable_preemption_service", False)  # signals are agreed on step by step instead
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=int(10 * silent) + 10,  # the watchdog is to be first
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ProcessLost(f"the processes of this run did not find each other: {reason}") from error
    if jax.process_count() == 1:
        return Team()
    client = _client()
    client.key_value_set(f"rlp/host/{jax.process_index()}", socket.gethostname())
    client.wait_at_barrier("rlp/hosts", 1000 * JOIN_SECONDS)
    hosts = {int(key.rpartition("/")[2]): host for key, host in client.key_value_dir_get("rlp/host/")}
    names = [f"process {i} on {hosts[i]}" for i in range(jax.process_count())]
    watchdog = Watchdog(client, jax.process_index(), names, silent, stalled)
    watchdog.start()
    return Team(watchdog, client)


def _client() -> Any:
    """The client of JAX's coordination service; JAX has no public way to its key-value store (Orbax does the same)."""
    from jax._src import distributed

    return distributed.global_state.client


def seconds(name: str, default: float) -> float:
    """A positive number of seconds from the environment.

    Raises:
      ConfigError: it is something else.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ConfigError(f"{name} is {text!r}: write a positive number of seconds")
    return value


def own_rows(mesh: jax.sharding.Mesh | None, documents: int) -> np.ndarray:
    """Rows of a batch of this many documents that this process's devices hold, ascending."""
    if mesh is None or documents % document_shards(mesh):
        return np.arange(documents)
    held = batch_sharding(mesh).addressable_devices_indices_map((documents,)).values()
    return np.unique(np.concatenate([np.arange(documents)[index] for index in held]))


def fetch(tree: Any, rows: np.ndarray | None = None) -> Any:
    """Numpy copies of arrays, wherever their parts lie; with several processes all of them have to call it.

    Args:
      tree: arrays, numpy ones as they are.
      rows: take these along the first axis, all others stay where they are.
    """
    if rows is not None:
        tree = _take(tree, rows)
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_fetch, tree)


def _fetch(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


@jax.jit
def _take(tree: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], tree)
