# SPDX-License-Identifier: Apache-2.0
"""Prints the results of real models as Markdown: `python -m experiments.real.table [FOLDER]`."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.paper.intervals import paired
from experiments.real.drive import RESULTS, best_rate, complete, read, result_path
from experiments.real.study import CORPORA, MODELS, RATES, Run, runs

MISSING = "–"
NAMES = {"base": "base", "rlp": "RLP", "cpt_tokens": "CPT, same tokens", "cpt_flops": "CPT, same FLOPs"}
RUN = ("model", "text", "arm")
COMPARED = (
    *RUN, "rate", "tokens read", "sampled", "held-out, nats", "after a thought", "other text", "after a thought",
    "GSM8K, %",
)  # fmt: skip
PARTS = ("gain", "format", "drift", "generic", "content")
SPLIT = (
    *RUN, "gain", "format", "of it drift", "generic", "content", "tokens a thought", "quoting the target", "alarms",
)  # fmt: skip
AGAINST = ("model", "text", "RLP against", "RLP without a thought", "RLP after a thought")
ENTROPY = (*RUN, *(f"fifth {n}" for n in range(1, 6)))
COMPARED_NOTE = (
    "Cross-entropy of the policy, nats a token, on held-out pieces of the text that was trained on, and on the other "
    "text. GSM8K greedy without a thought, with its Wilson interval. One seed: no interval covers training again."
)
SPLIT_NOTE = (
    "Gain in nats a scored token, intervals over held-out pieces. Format: an empty thought of the policy against "
    "none of the baseline, which still is the base nearly; drift: the policy without a thought against the baseline, "
    "which is all that CPT trains. Generic: another piece's thought against the empty one; content: the own thought "
    "against that. Quoting: share of thoughts that hold the first scored token, and of another piece's that do."
)
AGAINST_NOTE = "Nats a token that RLP is ahead of the other's cross-entropy without a thought, paired by piece."
SWEEP_NOTE = "CPT at equal tokens by rate: loss of the second half of the steps, nats a token. The lowest is taken."
ENTROPY_NOTE = "Gain of scored tokens by the entropy of the plain prediction, lowest fifth first."


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return MISSING if value is None else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def interval(mean: float, ends: tuple[float, float] | list[float] | None) -> str:
    if ends is None:
        return number(mean, sign=True)
    return f"{number(mean, sign=True)} [{', '.join(number(end, sign=True) for end in ends)}]"


def wilson(right: float, problems: int) -> tuple[float, float]:
    """95% interval of a share, which near 0 a normal one is not."""
    z2 = 1.96**2
    middle = (right + z2 / (2 * problems)) / (1 + z2 / problems)
    half = 1.96 / (1 + z2 / problems) * math.sqrt(right * (1 - right) / problems + z2 / (4 * problems**2))
    return middle - half, middle + half


def shown(folder: Path) -> Iterator[dict[str, Any]]:
    """Every model, text and arm whose result is whole; of the rates that were tried, the best."""
    for model in MODELS:
        for corpus in CORPORA:
            for arm in NAMES:
                run = Run(model, corpus, arm)
                rate = best_rate(run, folder) if arm == "cpt_tokens" else None
                result = read(result_path(folder, run._replace(rate=rate)))
                if complete(result):
                    yield result


def name_of(result: dict[str, Any]) -> list[str]:
    return [result["model"], result["corpus"], NAMES[result["arm"]]]


def compared(result: dict[str, Any]) -> list[str]:
    gain, other, gsm8k = (result[task] for task in ("gain", "perplexity", "gsm8k"))
    bounds = wilson(gsm8k["greedy"] / 100, gsm8k["problems"])
    return [
        *name_of(result),
        f"{result['learning_rate']:g}" if "learning_rate" in result else MISSING,
        *(number(result.get(name), 0) for name in ("input_tokens", "sampled_tokens")),
        *(number(row[name]) for row in (gain, other) for name in ("ce_no_think_policy", "ce_think")),
        f"{gsm8k['greedy']:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]",
    ]


def split(result: dict[str, Any]) -> list[str]:
    gain = result["gain"]
    target = gain["probes"]["quotes"]["target"]
    alarms = {**gain["alarms"], **{spell["kind"]: spell for spell in gain.get("warnings", ())}}
    return [
        *name_of(result),
        *(interval(gain[name], gain[f"{name}_ci95"]) for name in PARTS),
        number(gain["thought_len"], 1),
        f"{target['own']:.0%} / {target['shuffled']:.0%}",
        ", ".join(sorted(alarms)) or "none",
    ]


def against(rlp: dict[str, Any], rival: dict[str, Any]) -> list[str]:
    def of(result: dict[str, Any], name: str) -> dict[int, float]:
        return dict(zip(result["held_out"]["document"], result["held_out"][name], strict=True))

    cells = []
    for name in ("no_think", "think"):
        ahead = paired(of(rival, "no_think"), of(rlp, name))
        cells.append(interval(ahead.mean, (ahead.low, ahead.high)))
    return [rlp["model"], rlp["corpus"], NAMES[rival["arm"]], *cells]


def entropy(result: dict[str, Any]) -> list[str]:
    bins = result["gain"]["where"]["entropy"]
    cells = [interval(row["gain"], row["gain_ci95"]) for row in bins]
    return [*name_of(result), *cells, *[MISSING] * (5 - len(cells))]


def sweep(folder: Path, model: str, corpus: str) -> list[str]:
    """What each rate of continued pretraining came to."""
    results = [read(result_path(folder, Run(model, corpus, "cpt_tokens", rate))) for rate in RATES]
    return [model, corpus, *(number(result and result["late_loss"]) for result in results)]


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def tables(folder: Path) -> str:
    results = list(shown(folder))
    rlp = {(result["model"], result["corpus"]): result for result in results if result["arm"] == "rlp"}
    rivals = [result for result in results if result["arm"] != "rlp"]
    pairs = [(rlp[text], result) for result in rivals if (text := (result["model"], result["corpus"])) in rlp]
    swept = [
        sweep(folder, model, corpus)
        for model in MODELS
        for corpus in CORPORA
        if result_path(folder, Run(model, corpus, "cpt_tokens", RATES[0])).is_file()
    ]
    parts = [
        (markdown(COMPARED, [compared(result) for result in results]), COMPARED_NOTE),
        (markdown(AGAINST, [against(*pair) for pair in pairs]), AGAINST_NOTE),
        (markdown(SPLIT, [split(result) for result in results]), SPLIT_NOTE),
        (markdown(ENTROPY, [entropy(result) for result in results]), ENTROPY_NOTE),
        (markdown(("model", "text", *(f"{rate:g}" for rate in RATES)), swept), SWEEP_NOTE),
    ]
    return "\n\n".join(f"{table}\n\n{note}" for table, note in parts)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    if not any(result_path(folder, run).is_file() for run in runs()):
        print(f"table: no results in {folder}: python -m experiments.real.drive makes them", file=sys.stderr)
        return 2
    print(tables(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
