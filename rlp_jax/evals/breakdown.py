# SPDX-License-Identifier: Apache-2.0
"""Tables of the records of `where.py`: plain functions of them.

Gains are nats a scored token. The split is that of `likelihood.summarise`: means over documents of each one's mean,
intervals paired by document. Tables of tokens and of thoughts are means over these, and their intervals are clustered
by document, as the tokens of one are not independent.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from rlp_jax.evals.alarms import of_evaluation
from rlp_jax.evals.likelihood import interval
from rlp_jax.evals.probes import Quotes
from rlp_jax.evals.records import Record

GAINS = ("gain", "format", "generic", "content")
BINS = 5  # of entropy and of place, equally full


def summarise(rows: Sequence[Record], close_tokens: int) -> dict[str, Any]:
    """What the records say.

    Args:
      rows: of `where.of_batch`, at least one.
      close_tokens: of the closing tag.

    Returns:
      documents, positions, scored_tokens; of `split`; thought_len, stop_rate; where: of `tables`;
      probes: of `of_quotes`; alarms: kind to message.
    """
    thinking = {"thought_len": _document_means(rows, "length"), "stop_rate": _document_means(rows, "stopped")}
    means = {name: float(value.mean()) for name, value in thinking.items()}
    quotes = of_quotes(rows)
    return {
        "documents": len(thinking["thought_len"]),
        "positions": len(rows),
        "scored_tokens": sum(len(row["target"]) for row in rows),
        **split(rows),
        **means,
        "where": tables(rows),
        "probes": quotes,
        "alarms": of_evaluation(quotes, **means, close_tokens=close_tokens),
    }


def split(rows: Sequence[Record]) -> dict[str, Any]:
    """The gain and its parts, each with `_ci95`; they add up to it.

    format: an empty thought against none. generic: another document's thought against the empty one. content: the own
    thought against the other document's. drift is a part of format: the policy without a thought against the baseline.
    """
    ce = {name: _document_means(rows, f"ce_{name}") for name in _CE}
    gains = {
        "gain": ce["no_think"] - ce["think"],
        "format": ce["no_think"] - ce["empty"],
        "generic": ce["empty"] - ce["shuffled"],
        "content": ce["shuffled"] - ce["think"],
        "drift": ce["no_think"] - ce["no_think_policy"],
    }
    result: dict[str, Any] = {f"ce_{name}": float(value.mean()) for name, value in ce.items()}
    for name, gain_D in gains.items():
        result[name], result[f"{name}_ci95"] = float(gain_D.mean()), interval(gain_D)
    return result


_CE = ("think", "empty", "shuffled", "no_think", "no_think_policy")


def clustered(value_N: Sequence[float], document_N: Sequence[Hashable]) -> tuple[float, list[float] | None]:
    """The mean of all values and its 95% interval, values of one document being one draw (the linearised ratio
    estimator; of equally many values a document, it is `likelihood.interval` of their means). None for one document."""
    value_N = np.asarray(value_N, np.float64)
    mean = float(value_N.mean())
    _, index_N = np.unique(np.asarray(document_N), return_inverse=True)
    off_D = np.bincount(index_N, weights=value_N - mean)
    D, N = len(off_D), len(value_N)
    if D < 2:
        return mean, None
    half = 1.96 * math.sqrt(D / (D - 1) * float((off_D**2).sum())) / N
    return mean, [mean - half, mean + half]


def tables(rows: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Gain and its parts of scored tokens by class, by data.span, by entropy of the plain prediction and by place
    (tokens of the document before it). Each row: label, count (tokens), documents, gain, format, generic, content and
    their intervals; bins ascending with their low and high end, else the most frequent first."""
    tokens = {name: [x for row in rows for x in row[name]] for name in GAINS}
    tokens["document"] = [row["document"] for row in rows for _ in row["target"]]
    span = ["in data.span" if inside else "outside" for row in rows for inside in row["in_span"]]
    entropy = [x for row in rows for x in row["entropy"]]
    place = [row["position"] + h for row in rows for h in range(len(row["target"]))]
    return {
        "class": _table(tokens, [name for row in rows for name in row["class"]]),
        "span": _table(tokens, span),
        "entropy": _binned(tokens, np.round(entropy, 3)),
        "place": _binned(tokens, np.asarray(place)),
    }


def _table(tokens: dict[str, list], labels: Sequence[Hashable]) -> list[dict[str, Any]]:
    grouped: dict[Hashable, list[int]] = {}
    for i, label in enumerate(labels):
        grouped.setdefault(label, []).append(i)
    result = []
    for label in sorted(grouped, key=lambda label: (-len(grouped[label]), label)):
        document_N = [tokens["document"][i] for i in grouped[label]]
        entry = {"label": label, "count": len(document_N), "documents": len(set(document_N))}
        for name in GAINS:
            entry[name], entry[f"{name}_ci95"] = clustered([tokens[name][i] for i in grouped[label]], document_N)
        result.append(entry)
    return result


def _binned(tokens: dict[str, list], value_N: np.ndarray) -> list[dict[str, Any]]:
    edges = bin_edges(value_N)
    bin_N = np.searchsorted(edges[1:-1], value_N, side="right")
    ends = [(float(low), float(high)) for low, high in itertools.pairwise(edges)]
    found = sorted(_table(tokens, bin_N.tolist()), key=lambda entry: entry["label"])
    return [
        entry | {"label": f"{low:g} to {high:g}", "low": low, "high": high}
        for entry, (low, high) in zip(found, ends, strict=True)
    ]


def bin_edges(value_N: np.ndarray) -> np.ndarray:
    """Ends of at most BINS equally full bins: [low, high), the last one with its end. Equal values share a bin, so
    there may be fewer; each end is a value that occurs, so none is empty."""
    edges = np.unique(np.quantile(value_N, np.linspace(0, 1, BINS + 1), method="inverted_cdf"))
    return edges if len(edges) > 1 else np.repeat(edges, 2)


def of_quotes(rows: Sequence[Record]) -> dict[str, Any]:
    """What thoughts quote, and what that is worth. Means over thoughts; each name with `_ci95` beside it.

    Returns:
      quotes: for each field of `probes.Quotes`, and for target_known and target_new (by whether the first scored token
        stands in the prefix), a dict of positions (where it can be quoted at all), own, shuffled (rates of the own
        thought and of another document's) and excess (own minus shuffled). None where there is no such position.
      quoting: thoughts that quote the first scored token: thoughts (their number), known (the share of them whose quote
        stands in the prefix), gain, gain_of_others (thoughts that do not), difference (between both at one position,
        where there are both); gain_without (after runs of the target were taken out of them), carried (gain minus
        that); of those that hold as many other tokens, carried_other (what taking as many of these out costs) and
        carried_beyond_other (carried minus that).
      gain, gain_without: of all thoughts, as they are and with quotes taken out.
    """
    columns = {name: (name, lambda row: True) for name in Quotes._fields}
    columns["target_known"] = ("target", lambda row: row["known"])
    columns["target_new"] = ("target", lambda row: not row["known"])
    quotes = {name: _rates([row for row in rows if wanted(row)], column) for name, (column, wanted) in columns.items()}
    return {"quotes": quotes, **_worth(rows)}


def _rates(rows: Sequence[Record], column: str) -> dict[str, Any] | None:
    rows = [row for row in rows if row["quotes"][column][0] is not None]
    if not rows:
        return None
    own_N = np.array([np.mean(row["quotes"][column]) for row in rows])
    shuffled_N = np.array([np.mean(row["quotes_shuffled"][column]) for row in rows])
    document_N = [row["document"] for row in rows]
    columns = {"own": own_N, "shuffled": shuffled_N, "excess": own_N - shuffled_N}
    return {"positions": len(rows), **_means({name: (value, document_N) for name, value in columns.items()})}


def _worth(rows: Sequence[Record]) -> dict[str, Any]:
    every, without, quoting, others, difference, after, carried, other, beyond, known = ([] for _ in range(10))
    for row in rows:
        document, gains = row["document"], {True: [], False: []}
        for g, quotes in enumerate(row["quotes"]["target"]):
            gain = _gain(row, row["ce_think"][g])
            gains[quotes].append(gain)
            every.append((gain, document))
            left = gain if row["ce_removed"][g] is None else _gain(row, row["ce_removed"][g])
            without.append((left, document))
            (quoting if quotes else others).append((gain, document))
            if quotes:
                after.append((left, document))
                carried.append((gain - left, document))
                known.append((float(row["known"]), document))
            if row["ce_removed_other"][g] is not None:
                without_others = _gain(row, row["ce_removed_other"][g])
                other.append((gain - without_others, document))
                beyond.append((without_others - left, document))
        if gains[True] and gains[False]:
            difference.append((np.mean(gains[True]) - np.mean(gains[False]), document))
    named = {
        "known": known, "gain": quoting, "gain_of_others": others, "difference": difference, "gain_without": after,
        "carried": carried, "carried_other": other, "carried_beyond_other": beyond,
    }  # fmt: skip
    pairs = {name: tuple(zip(*values, strict=True)) for name, values in named.items()}
    of_all = {name: tuple(zip(*values, strict=True)) for name, values in (("gain", every), ("gain_without", without))}
    return {"quoting": {"thoughts": len(quoting), **_means(pairs)}, **_means(of_all)}


def _means(columns: dict[str, tuple]) -> dict[str, Any]:
    """Mean and interval of each column of (values, documents); None where it is empty."""
    result = {}
    for name, column in columns.items():
        result[name], result[f"{name}_ci95"] = clustered(*column) if len(column) else (None, None)
    return result


def _gain(row: Record, ce_H: Sequence[float]) -> float:
    return float(np.mean(row["ce_no_think"]) - np.mean(ce_H))


def _document_means(rows: Sequence[Record], name: str) -> np.ndarray:
    """[documents] means over each one's positions, in order of first appearance."""
    grouped: dict[int, list[float]] = {}
    for row in rows:
        grouped.setdefault(row["document"], []).append(float(np.mean(row[name])))
    return np.array([np.mean(values) for values in grouped.values()])
