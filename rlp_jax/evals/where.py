# SPDX-License-Identifier: Apache-2.0
"""Where in a text thinking pays, and what thoughts quote: `likelihood.py` position by position, with every number kept.

A record a scored position goes to disk, a batch at a time; `breakdown.py` makes tables of the records. What the first
scored token's quote is worth comes from a second forward, over the same thoughts without it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.config import Config, ConfigError, SuiteConfig
from rlp_jax.data.documents import TokenizedDocument
from rlp_jax.data.pipeline import load_documents
from rlp_jax.data.template import TemplateTokens, check_lengths
from rlp_jax.distributed import fetch
from rlp_jax.evals import probes
from rlp_jax.evals.breakdown import summarise
from rlp_jax.evals.likelihood import Thinking, check_batch, think_and_score
from rlp_jax.evals.perplexity import batches_and_key, what_decides, with_settings
from rlp_jax.evals.records import Record, Records
from rlp_jax.evals.token_classes import Rules, classify, surfaces
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.rollout import scoring
from rlp_jax.sharding import mesh_of, over

NAME = "gain"
DIGITS = 7  # of a record's nats, after the point


def heldout_documents(
    config: Config, settings: SuiteConfig, tokenizer: Any, limit: int | None
) -> tuple[Config, list[TokenizedDocument]]:
    """A run's or experiment's held-out documents, which no step of it has seen, and its config with the settings of
    this evaluation. By default as many documents as the run evaluates on."""
    changed = with_settings(config, settings)
    documents = load_documents(config.data, tokenizer, config.seed, changed.rlp.position_mode).heldout
    return dataclasses.replace(changed, seed=settings.seed), documents[: limit or config.eval.documents]


def file_documents(config: Config, tokenizer: Any, limit: int | None) -> list[TokenizedDocument]:
    """The first documents of the file that a config of `perplexity.over_file` is about, by default all."""
    return load_documents(config.data, tokenizer, config.seed, config.rlp.position_mode).train[:limit]


def run_gain(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    tokenizer: Any,
    template: TemplateTokens,
    config: Config,
    documents: list[TokenizedDocument],
    rules: Rules,
    weights: str,
    path: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Thinks about documents and says where and by what it gains.

    Args:
      params, ema_params: policy and no-think baseline.
      config: with the settings of this evaluation; its seed is that of positions and thoughts.
      documents: at least 2 different ones.
      rules: token classes of the user's.
      weights: a fingerprint of the parameters.
      path: of the records. A file that a killed evaluation left is gone on with.

    Returns:
      What `breakdown.summarise` gives.

    Raises:
      ConfigError: documents that do not fit, or a file of other settings. ValueError: a number that is not finite.
    """
    check_lengths(template, config, model.config.max_positions)
    if len({document.id for document in documents}) < 2:
        raise ConfigError(
            f"{len(documents)} documents to think about: the shuffled control needs the thought of another document, "
            "so at least 2"
        )
    batches, key = batches_and_key(config, documents, tokenizer.pad_id, mesh_of(params))
    decided = what_decides(NAME, config, documents, template, weights)
    decided["classes"] = [[name, pattern.pattern] for name, pattern in rules]
    with Records(path, decided, say) as records:
        first, there = _progress(records.rows)
        for number in range(first, len(batches)):
            found = of_batch(model, params, ema_params, batches[number], tokenizer, template, config, rules, key)
            placed = [{"batch": number, "left": len(found) - 1 - i, **row} for i, row in enumerate(found)]
            records.add(placed[there:])  # a batch that was cut short gives the same records again
            there = 0
            say(f"{NAME}: batch {number + 1} of {len(batches)}")
        if not records.rows:
            raise ConfigError("no document has a position to score: check data.span and --position-mode")
        return summarise(records.rows, len(template.close))


def of_batch(
    model: LanguageModel,
    params: Params,
    ema_params: Params,
    batch: dict[str, Any],
    tokenizer: Any,
    template: TemplateTokens,
    config: Config,
    rules: Rules,
    key: jax.Array,
) -> list[Record]:
    """The records of one batch's documents that count, in order of rows and positions. H scored tokens, G thoughts.

    Each holds: document (id), position, tokens (of the document); of each scored token: target (text), class, in_span,
    entropy (nats, of the plain prediction), ce_no_think, ce_no_think_policy, ce_empty [H], ce_think and ce_shuffled
    [G][H], gain, format, generic, content [H]; of each thought: thought (text), length, stopped, quotes and
    quotes_shuffled (name to [G], see `probes.Quotes`), ce_removed and ce_removed_other ([H], or None: the thought
    does not quote the first scored token, or holds too few other ones); known (`probes.is_known`).
    """
    check_batch(batch)
    settings = config.rlp, config.eval, config.mesh
    with over(mesh_of(params)):
        thinking = fetch(_think(model, template, *settings, params, ema_params, batch, key))
    host = {name: np.asarray(fetch(value)) for name, value in batch.items()}
    counted_B = host.get("weight_B", np.ones(len(host["length_B"]))) > 0
    texts = _Texts(host, tokenizer, rules, thinking, len(template.close), config)
    edits = texts.edits(counted_B, config.seed)
    ce_removed = {}
    if edits:
        with over(mesh_of(params)):
            ce_removed = _score_edits(model, params, template, config, host, thinking, edits)
    return [_record(texts, thinking, ce_removed, b, k) for b, k in _counted(thinking, counted_B)]


class _Texts:
    """A batch's documents and thoughts as words, surfaces and classes, each worked out once, on the host.

    Args:
      close: tokens of the closing tag.
    """

    def __init__(self, host: dict, tokenizer: Any, rules: Rules, thinking: Thinking, close: int, config: Config):
        self.host, self.tokenizer, self.thinking, self._close = host, tokenizer, thinking, close
        self.horizon, self.group = config.rlp.horizon, config.eval.group_size
        self._word, self._rules = probes.Words(tokenizer), rules
        self.document = functools.cache(self._document)
        self.thought = functools.cache(self._thought)

    def _document(self, b: int) -> tuple[list[str], list[str], list]:
        """Surfaces, classes and words of a row's document."""
        tokens = self.host["tokens_BT"][b, : self.host["length_B"][b]].tolist()
        parts = surfaces(tokens, self.tokenizer)
        return parts, classify(parts, self._rules), self._word(tokens)

    def _thought(self, b: int, k: int, g: int) -> tuple[list[int], list]:
        """Tokens and words of a sampled thought, a sampled closing tag left out."""
        thoughts, r = self.thinking.thoughts, k * self.group + g
        length = int(thoughts.length_BR[b, r]) - (self._close if thoughts.stopped_BR[b, r] else 0)
        tokens = thoughts.thought_BRL[b, r, :length].tolist()
        return tokens, self._word(tokens)

    def quotes(self, b: int, k: int, of: int) -> dict[str, list]:
        """What the thoughts of row `of` quote at a position of row b, a column a field of `probes.Quotes`."""
        words, t = self.document(b)[2], int(self.thinking.position_BK[b, k])
        found = [probes.find_quotes(self.thought(of, k, g)[1], words, t, self.horizon) for g in range(self.group)]
        return {name: [getattr(quotes, name) for quotes in found] for name in probes.Quotes._fields}

    def edits(self, counted_B: np.ndarray, seed: int) -> dict[tuple, tuple[list[int], list[int] | None]]:
        """(b, k, g) of each thought that quotes, to its tokens without the runs of the target, and without as many
        others; None where it does not hold as many."""
        edits = {}
        for b, k in _counted(self.thinking, counted_B):
            t = int(self.thinking.position_BK[b, k])
            target = self.document(b)[2][t : t + self.horizon]
            for g in range(self.group):
                tokens, words = self.thought(b, k, g)
                places = probes.quoted_places(words, target)
                others = probes.other_places(len(words), places, (seed, int(self.host["document_B"][b]), t, g))
                if places:
                    other = None if others is None else probes.without(tokens, others)
                    edits[b, k, g] = probes.without(tokens, places), other
        return edits


def _record(texts: _Texts, thinking: Thinking, ce_removed: dict, b: int, k: int) -> Record:
    t, H, G = int(thinking.position_BK[b, k]), texts.horizon, texts.group
    parts, classes, words = texts.document(b)
    scored = slice(t, t + H)
    ce = {name: -value[b, k].astype(np.float64) for name, value in thinking.logprob.items()}
    ce["empty"] = ce["empty"][0]
    think_H, shuffled_H = ce["think"].mean(0), ce["shuffled"].mean(0)
    entropy_H = thinking.entropy_BT[b, scored].astype(np.float64)
    if not all(np.isfinite(value).all() for value in (*ce.values(), entropy_H)):
        raise ValueError(f"{NAME}: document {texts.host['document_B'][b]}, position {t}: not finite; are the weights?")
    gains = {
        "gain": ce["no_think"] - think_H,
        "format": ce["no_think"] - ce["empty"],
        "generic": ce["empty"] - shuffled_H,
        "content": shuffled_H - think_H,
    }
    of_group = slice(k * G, (k + 1) * G)
    removed = [ce_removed.get((b, k, g), (None, None)) for g in range(G)]
    return {
        "document": int(texts.host["document_B"][b]),
        "position": t,
        "tokens": len(parts),
        "target": parts[scored],
        "class": classes[scored],
        "in_span": texts.host["span_BT"][b, scored].tolist(),
        "entropy": _rounded(entropy_H),
        **{name: _rounded(value) for name, value in gains.items()},
        **{f"ce_{name}": _rounded(value) for name, value in ce.items()},
        "thought": [texts.tokenizer.decode(texts.thought(b, k, g)[0]) for g in range(G)],
        "length": thinking.thoughts.length_BR[b, of_group].tolist(),
        "stopped": thinking.thoughts.stopped_BR[b, of_group].tolist(),
        "known": probes.is_known(words, t),
        "quotes": texts.quotes(b, k, b),
        "quotes_shuffled": texts.quotes(b, k, int(thinking.other_B[b])),
        "ce_removed": [None if pair[0] is None else _rounded(pair[0]) for pair in removed],
        "ce_removed_other": [None if pair[1] is None else _rounded(pair[1]) for pair in removed],
    }


def _score_edits(
    model: LanguageModel, params: Params, template: TemplateTokens, config: Config, host: dict, thinking: Thinking,
    edits: dict,
) -> dict[tuple, tuple[np.ndarray, np.ndarray | None]]:  # fmt: skip
    """(b, k, g) to the cross-entropies [H] after both edits of a thought."""
    thoughts, (B, K), G = thinking.thoughts, thinking.position_BK.shape, config.eval.group_size
    close = list(template.close)
    token_BRL = np.concatenate([thoughts.thought_BRL] * 2, 1)
    length_BR = np.concatenate([thoughts.length_BR] * 2, 1)
    stopped_BR = np.concatenate([thoughts.stopped_BR] * 2, 1)
    for (b, k, g), edit in edits.items():
        for number, tokens in enumerate(edit):
            if tokens is None:
                continue
            r = number * K * G + k * G + g
            sampled = [*tokens, *close] if stopped_BR[b, r] else tokens
            token_BRL[b, r, : len(sampled)], length_BR[b, r] = sampled, len(sampled)
    scored = scoring.Thoughts(token_BRL, length_BR, stopped_BR)
    plain = host["tokens_BT"], thinking.position_BK, thinking.target_BKH
    logprob_BRH = fetch(_score(model, template, config.rlp.temperature, G, params, *plain, scored))
    ce_2BKGH = -np.stack([half.reshape(B, K, G, -1) for half in np.split(logprob_BRH, 2, 1)]).astype(np.float64)
    return {
        place: (ce_2BKGH[0][place], None if other is None else ce_2BKGH[1][place])
        for place, (_, other) in edits.items()
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _think(model, template, rlp, settings, mesh, params, ema_params, batch, key):
    return think_and_score(model, template, rlp, settings, mesh, params, ema_params, batch, key, entropies=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _score(model, template, temperature, G, params, tokens_BT, position_BK, target_BKH, thoughts):
    """Log-probabilities of the targets, [B, R, H], after thoughts with R = 2·K·G: all positions, twice."""
    prefix_BK = position_BK + len(template.context)
    _, cache = model.hidden(params, scoring.with_context(tokens_BT, template.context), stops_BK=prefix_BK)
    prefix_BR, target_BRH = (jnp.concatenate([jnp.repeat(x, G, 1)] * 2, 1) for x in (prefix_BK, target_BKH))
    scored = scoring.score_branches(model, params, cache, prefix_BR, thoughts, target_BRH, template, temperature)
    return scored.target_logprob_BRH


def _counted(thinking: Thinking, counted_B: np.ndarray) -> Iterator[tuple[int, int]]:
    return ((int(b), int(k)) for b, k in np.argwhere(np.asarray(thinking.valid_BK) & counted_B[:, None]))


def _progress(rows: list[Record]) -> tuple[int, int]:
    """The batch to go on with, and how many of its records are there."""
    if not rows:
        return 0, 0
    last = rows[-1]
    if last["left"] == 0:
        return last["batch"] + 1, 0
    return last["batch"], sum(row["batch"] == last["batch"] for row in rows)


def _rounded(value: np.ndarray) -> list:
    return np.round(value, DIGITS).tolist()
