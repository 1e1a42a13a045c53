# SPDX-License-Identifier: Apache-2.0
"""What the loop says of a step: its row of metrics, a few of its thoughts, the documents of one that was skipped."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from rlp_jax.algorithms import Decode
from rlp_jax.config import Config
from rlp_jax.distributed import Team, fetch
from rlp_jax.learner import Samples, Scores
from rlp_jax.metrics import ThoughtStart, row_warnings
from rlp_jax.writers import RunLog

THOUGHTS_DOCUMENTS = 2
PREFIX_CHARACTERS = 400


@dataclasses.dataclass
class Progress:
    """The loop's own counters, part of every checkpoint. `evaluations` holds the first and the last evaluation,
    `productive` the seconds of all steps (goodput.py)."""

    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = -1
    start: ThoughtStart = dataclasses.field(default_factory=ThoughtStart)
    warned: list[str] = dataclasses.field(default_factory=list)
    evaluations: dict[str, Any] = dataclasses.field(default_factory=dict)
    productive: float = 0.0

    @classmethod
    def from_json(cls, values: dict) -> "Progress":
        return cls(**(values | {"start": ThoughtStart(*values["start"])}))


class Clock:
    """Seconds of each phase of a step; tells the watchdog of each."""

    def __init__(self, team: Team):
        self._team = team
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str, arrays: Any = None) -> None:
        """Ends a phase, once these arrays have been computed."""
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now
        self._team.tick(phase)

    def row(self) -> dict[str, float]:
        phases = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        return {"seconds": sum(self.seconds.values())} | phases

    def appetite(self, documents: int) -> dict[str, float]:
        """Documents a second that the step takes, and that the loader could give it: waiting for a batch is its whole
        time where none is made ahead."""
        step = sum(seconds for phase, seconds in self.seconds.items() if phase != "data")
        return {
            "step_documents_per_s": documents / max(step, 1e-9),
            "loader_documents_per_s": documents / max(self.seconds.get("data", 0.0), 1e-9),
        }


def appetite_message(row: dict, prefetch: int) -> str:
    """What the loader gives beside what the step takes, for the console."""
    gives, takes = row["loader_documents_per_s"], row["step_documents_per_s"]
    bound = "" if gives >= takes else ": the step waits for data, see data.prefetch and data.cache"
    least = "at least " if prefetch else ""
    return f"data: the loader gives {least}{gives:,.0f} documents/s, the step takes {takes:,.1f}{bound}"


def throughput(config: Config, batch: dict, samples: Samples | None, clock: Clock) -> dict[str, float]:
    """Tokens of the batch's documents and of the thoughts sampled over them, thought tokens sampled a second, and
    tokens learnt from a second: each document once and its thoughts. A judge may sample on, so its time counts."""
    read = int(np.sum(fetch(batch["length_B"])))
    rate = 1 / max(clock.seconds["learn"], 1e-9)
    if samples is None:
        return {"input_tokens": read, "learner_tokens_per_s": read * rate}
    sampled = int(np.sum(fetch(samples.sampled_B)))
    return {
        "input_tokens": read,
        "sampled_tokens": sampled,
        "sampled_tokens_per_s": sampled / max(clock.seconds["sample"] + clock.seconds.get("judge", 0.0), 1e-9),
        "learner_tokens_per_s": (read + sampled) * config.rlp.updates_per_batch * rate,
    }


def watch(progress: Progress, row: dict, close_tokens: int, log: RunLog) -> dict[str, Any]:
    """Counts skipped steps, looks for dying thoughts, says what is new on the console. Returns entries of the row."""
    warnings = {}
    if row["finite"] == 1.0:
        progress.skipped_in_a_row = 0
    else:
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        warnings["not_finite"] = "loss, reward or gradient is not finite: the step is skipped"
    if "thought_len" in row:
        progress.start, of_thoughts = row_warnings(progress.start, row, close_tokens)
        warnings |= of_thoughts
    for kind, text in warnings.items():
        if kind not in progress.warned or kind == "not_finite":
            log.message(f"warning: step {row['step']}: {text}")
    progress.warned = sorted(warnings)
    return {"skipped": progress.skipped, "warnings": list(warnings.values())}


def not_finite_rows(n: int, batch: dict, samples: Samples | None, scores: Scores | None, decode: Decode) -> list[dict]:
    """The documents behind a step that was not finite, for nonfinite.jsonl: those with a score or a reward that is not,
    or all of them, where only the gradient of their sum was not.

    Args:
      n: the step.
      batch, samples, scores: its, wherever they lie; without samples there are no positions and rewards to tell of.
      decode: token ids to text.
    """
    batch, samples, scores = fetch((batch, samples, scores))
    bad_B = np.zeros(len(batch["length_B"]), bool)
    if samples is not None:
        bad_BKG = ~np.isfinite(scores.reward_BKG) | ~np.isfinite(samples.s_ema_BKH).all(-1)[..., None]
        bad_B = (bad_BKG & samples.valid_BK[..., None]).any((1, 2))
    rows = []
    for b in np.flatnonzero(bad_B if bad_B.any() else np.ones_like(bad_B)):
        tokens = batch["tokens_BT"][b, : batch["length_B"][b]].tolist()
        row = {"step": n, "document": int(batch["document_B"][b]), "text": decode(tokens), "tokens": tokens}
        if samples is not None:
            chosen = np.flatnonzero(samples.valid_BK[b])
            row |= {
                "positions": samples.position_BK[b, chosen].tolist(),
                "s_ema": samples.s_ema_BKH[b, chosen].mean(-1).tolist(),
                "rewards": scores.reward_BKG[b, chosen].tolist(),
            }
        rows.append(row)
    return rows


def skipped_message(count: int, rows: list[dict], file: str) -> str:
    """Why the run ends: after so many steps, the last of which is that of these rows of nonfinite.jsonl."""
    documents = [str(row["document"]) for row in rows]
    shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
    return (
        f"{count} steps in a row were not finite, the last one step {rows[0]['step']} on documents {shown}: "
        f"lower optimizer.learning_rate or look at these documents in {file}"
    )


def thought_rows(
    n: int, batch: dict, samples: Samples | None, scores: Scores | None, decode: Decode, close: int
) -> list[dict]:
    """A few documents of a step with all thoughts of their first position, for thoughts.jsonl; none without samples.

    Args:
      n: the step.
      batch, samples, scores: its, wherever they lie.
      decode: token ids to text.
      close: tokens of the closing tag.
    """
    if samples is None:
        return []
    shown = np.flatnonzero(fetch(samples.valid_BK)[:, 0])[:THOUGHTS_DOCUMENTS]
    batch, samples, scores = fetch((batch, samples, scores), shown)
    horizon, rows = samples.s_ema_BKH.shape[-1], []
    for b in range(len(shown)):
        tokens_T, t = np.asarray(batch["tokens_BT"])[b, : batch["length_B"][b]], int(samples.position_BK[b, 0])
        thoughts = []
        for g, (length, stopped) in enumerate(zip(samples.length_BKG[b, 0], samples.stopped_BKG[b, 0], strict=True)):
            content = samples.thought_BKGL[b, 0, g, : length - close if stopped else length]
            thoughts.append(
                {
                    "text": decode(content.tolist()),
                    "reward": float(scores.reward_BKG[b, 0, g]),
                    "advantage": float(scores.advantage_BKG[b, 0, g]),
                    "length": int(length),
                    "stopped": bool(stopped),
                }
            )
        rows.append(
            {
                "step": n,
                "document": int(batch["document_B"][b]),
                "prefix": decode(tokens_T[:t].tolist())[-PREFIX_CHARACTERS:],
                "target": decode(tokens_T[t : t + horizon].tolist()),
                "s_ema": float(samples.s_ema_BKH[b, 0].mean()) if samples.verdict is None else None,
                "thoughts": thoughts,
            }
        )
    return rows
