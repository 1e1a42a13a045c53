# SPDX-License-Identifier: Apache-2.0
"""documents.jsonl of a run that has ended, or has not recorded as much: `every_token.py` on its start and its latest
checkpoint."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlp_jax.checkpoint import load_run
from rlp_jax.checkpoints_io.load import load
from rlp_jax.config import Config, ConfigError, ReportConfig
from rlp_jax.data.pipeline import heldout_batches, load_documents
from rlp_jax.data.template import check_lengths, template_tokens
from rlp_jax.evals.every_token import FILE, first_documents, rows_of
from rlp_jax.report.run import read_run
from rlp_jax.state import Purpose, step_key
from rlp_jax.writers import strict, write_atomically


def record(
    run_dir: Path, documents: int, positions: int | None, thoughts: int | None, say: Callable[[str], None]
) -> Path:
    """Records held-out documents before training and after the latest checkpoint, in place of what was recorded of
    these steps.

    Args:
      run_dir: a run directory with a checkpoint.
      documents: how many.
      positions: of each at most; None: as the run says.
      thoughts: at each position; None: as the run says.
      say: told how far it is.

    Returns:
      The path of documents.jsonl, written whole or not at all.

    Raises:
      ConfigError: nothing to record. ValueError: not a run directory, no checkpoint, or its model or data are gone.
    """
    run_dir, known = Path(run_dir), read_run(run_dir).documents
    run = load_run(run_dir)
    own = run.config.report
    settings = ReportConfig(documents, positions or own.positions, thoughts or own.group_size)
    config = dataclasses.replace(run.config, report=settings)
    template = template_tokens(config.template, run.tokenizer)
    check_lengths(template, config, run.model.config.max_positions)
    batches = _batches(config, run.tokenizer)
    key = step_key(config.seed, 0, Purpose.EVALUATION)
    states = [(run.step, run.params, run.ema_params)]
    if run.step:
        start = load(config.model, config.compute_dtype).params
        states.insert(0, (0, start, start))
    rows: list[dict[str, Any]] = []
    for step, params, ema_params in states:
        for number, batch in enumerate(batches, 1):
            found = rows_of(run.model, params, ema_params, batch, run.tokenizer, template, config, key)
            rows += [{"step": step} | row for row in found]
            say(f"documents at step {step}: batch {number} of {len(batches)}")
    if not rows:
        raise ConfigError(f"{run_dir} has no held-out document with a position to score")
    kept = [row for row in known if row["step"] not in (0, run.step)]
    rows = sorted([*kept, *rows], key=lambda row: row["step"])
    lines = (json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically(run_dir / FILE, "".join(lines))
    return run_dir / FILE


def _batches(config: Config, tokenizer: Any) -> list[dict[str, Any]]:
    examples = config.sft if config.algorithm == "sft" else None
    given = config.data, tokenizer, config.seed, config.rlp.position_mode
    documents = load_documents(*given, examples=examples, questions=config.algorithm == "rlvr").heldout
    documents = documents[: config.report.documents]
    rows = min(config.eval.batch_documents, len(documents))
    shape = (config.data.document_tokens, tokenizer.pad_id)
    return list(first_documents(heldout_batches(documents, rows, len(documents), *shape), len(documents)))
