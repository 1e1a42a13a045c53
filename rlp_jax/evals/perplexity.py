# SPDX-License-Identifier: Apache-2.0
"""Perplexity of documents with and without thoughts, and with both controls: `likelihood.py` over a file, a batch of
documents a record."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlp_jax.config import Config, ConfigError, SuiteConfig
from rlp_jax.data.documents import TokenizedDocument
from rlp_jax.data.pipeline import Batch, heldout_batches, load_documents
from rlp_jax.data.template import TemplateTokens, check_lengths
from rlp_jax.evals import likelihood
from rlp_jax.evals.records import Records
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.sharding import mesh_of, place_batch
from rlp_jax.state import Purpose, step_key

NAME = "perplexity"


def over_file(
    config: Config, settings: SuiteConfig, data: str, text: str | None, template: TemplateTokens, max_positions: int
) -> Config:
    """The config of a model's experiment with another file to evaluate, all of it, in pieces that leave room for
    thoughts in the model's context.

    Args:
      text: format string over a record's fields; None: the experiment's.
    """
    around = sum(map(len, (template.context, template.open, template.close)))
    room = max(max_positions - around - settings.thought_tokens - config.rlp.horizon, config.data.min_tokens)
    document_tokens = min(config.data.document_tokens, room)
    changed = {"sources": (data,), "heldout_fraction": 0.0, "document_tokens": document_tokens}
    if text is not None:
        changed |= {"text": text, "span": "", "span_pattern": ""}
    return dataclasses.replace(
        with_settings(config, settings), seed=settings.seed, data=dataclasses.replace(config.data, **changed)
    )


def with_settings(config: Config, settings: SuiteConfig) -> Config:
    """The config with the thoughts and positions that the settings ask for."""
    thoughts = {"group_size": settings.samples} if settings.samples else {}
    chosen = {"position_mode": settings.position_mode} if settings.position_mode else {}
    return dataclasses.replace(
        config,
        rlp=dataclasses.replace(
            config.rlp, thought_tokens=settings.thought_tokens, temperature=settings.temperature, **chosen
        ),
        eval=dataclasses.replace(config.eval, positions=settings.positions, **thoughts),
    )


def batches_and_key(
    config: Config, documents: list[TokenizedDocument], pad_id: int, mesh: Mesh | None
) -> tuple[list[Batch], jax.Array]:
    """The batches of documents to think about, on the mesh, and the key of positions and thoughts."""
    rows = min(config.eval.batch_documents, len(documents))
    batches = heldout_batches(documents, rows, len(documents), config.data.document_tokens, pad_id)
    return [place_batch(batch, mesh) for batch in batches], step_key(config.seed, 0, Purpose.EVALUATION)


def what_decides(
    task: str, config: Config, documents: list[TokenizedDocument], template: TemplateTokens, weights: str
) -> dict[str, Any]:
    """What records of documents that were thought about depend on."""
    return {
        "task": task,
        "weights": weights,
        "documents": [document.id for document in documents],
        "template": [list(part) for part in template],
        **{name: dataclasses.asdict(getattr(config, name)) for name in ("rlp", "eval")},
        "seed": config.seed,
    }


def run_perplexity(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    tokenizer: Any,
    template: TemplateTokens,
    config: Config,
    weights: str,
    limit: int | None,
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Cross-entropies of the documents' scored tokens and what follows from them.

    Args:
      params, ema_params: policy and no-think baseline.
      config: of `over_file`.
      weights: a fingerprint of the parameters.
      limit: the first so many documents (pieces of `data.document_tokens`).
      path: of the records.

    Returns:
      As `likelihood.evaluate`, and ppl_think, ppl_empty, ppl_shuffled, ppl_no_think (the baseline's) and
      ppl_no_think_policy: the exponential of the mean cross-entropy of a scored token.

    Raises:
      ConfigError: documents that cannot be read or do not fit, or a file of other settings.
    """
    check_lengths(template, config, model.config.max_positions)
    documents = load_documents(config.data, tokenizer, config.seed, config.rlp.position_mode).train[:limit]
    if len(documents) < 2:
        raise ConfigError(
            f"{', '.join(config.data.sources)} has {len(documents)} documents of at least {config.data.min_tokens} "
            "tokens: the shuffled control needs the thought of another document, so at least 2"
        )
    batches, key = batches_and_key(config, documents, tokenizer.pad_id, mesh_of(params))
    decided = what_decides(NAME, config, documents, template, weights)
    with Records(path, decided, say) as records:
        for number in range(len(records.rows), len(batches)):
            out = likelihood.of_documents(model, params, ema_params, batches[number], template, config, key)
            values = {name: np.asarray(value, np.float64).tolist() for name, value in out.items()}
            records.add([{"id": number, **values}])
            say(f"{NAME}: batch {number + 1} of {len(batches)}")
        names = [name for name in records.rows[0] if name != "id"]
        columns = {name: np.array([x for row in records.rows for x in row[name]]) for name in names}
    if not columns["ce_think"].size:
        raise ConfigError("no document has a position to score: check data.span and rlp.position_mode")
    result = likelihood.summarise(columns)
    perplexities = {
        name.replace("ce_", "ppl_"): math.exp(value) for name, value in result.items() if name.startswith("ce_")
    }
    return perplexities | result
