# SPDX-License-Identifier: Apache-2.0
"""Prints the results of real models as Markdown: `python -m experiments.real.table [FOLDER]`."""

import math
import sys
from pathlib import Path
from typing import Any

from experiments.real.drive import RESULTS, best_rate, read, result_path
from experiments.real.study import CORPORA, MODELS, RATES, Run, runs

MISSING = "–"
NAMES = {"base": "base", "rlp": "RLP", "cpt_tokens": "CPT, same tokens", "cpt_flops": "CPT, same FLOPs"}
HEAD = (
    "model", "text", "arm", "rate", "tokens read", "sampled", "gain, nats", "empty", "shuffled", "held-out, no thought",
    "with thought", "general text, no thought", "GSM8K, %",
)  # fmt: skip
NOTE = (
    "Gain and its controls, and cross-entropy in nats, on held-out pieces of the text that was trained on, intervals "
    "over documents. Perplexity of the general text, of the policy. GSM8K greedy without a thought first, with its "
    "Wilson interval. One seed: the intervals say nothing about training again."
)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return MISSING if value is None else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def wilson(right: float, problems: int) -> tuple[float, float]:
    """95% interval of a share, which near 0 a normal one is not."""
    z2 = 1.96**2
    middle = (right + z2 / (2 * problems)) / (1 + z2 / problems)
    half = 1.96 / (1 + z2 / problems) * math.sqrt(right * (1 - right) / problems + z2 / (4 * problems**2))
    return middle - half, middle + half


def row(result: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """One run's. training: the evaluation on held-out documents that belongs to it."""
    low, high = training["gain_ci95"]
    tokens = [result.get(name) for name in ("input_tokens", "sampled_tokens")]
    cells = [result["model"], result["corpus"], NAMES[result["arm"]]]
    cells.append(f"{result['learning_rate']:g}" if "learning_rate" in result else MISSING)
    cells += [number(count, 0) for count in tokens]
    gain = f"{number(training['gain'], sign=True)} [{number(low, sign=True)}, {number(high, sign=True)}]"
    cells += [gain, *(number(training[f"gain_{name}"], sign=True) for name in ("empty", "shuffled"))]
    cells += [number(training[f"ce_{name}"]) for name in ("no_think_policy", "think")]
    cells.append(number(result["perplexity"]["ppl_no_think_policy"], 2))
    gsm8k = result["gsm8k"]
    bounds = wilson(gsm8k["greedy"] / 100, gsm8k["problems"])
    cells.append(f"{gsm8k['greedy']:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]")
    return cells


def table(folder: Path) -> str:
    """Every model, text and arm that has a result; of the rates that were tried, the best."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for model in MODELS:
        for corpus in CORPORA:
            rlp = read(result_path(folder, Run(model, corpus, "rlp")))
            for arm in NAMES:
                run = Run(
                    model, corpus, arm, best_rate(Run(model, corpus, arm), folder) if arm == "cpt_tokens" else None
                )
                result = read(result_path(folder, run))
                if result is None or "gsm8k" not in result or rlp is None:
                    continue
                training = rlp["training"]["before"] if arm == "base" else result["training"]["after"]
                lines.append(row(result, training))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{NOTE}"


def sweeps(folder: Path) -> str:
    """What each rate of continued pretraining came to."""
    lines = [["model", "text", *(f"{rate:g}" for rate in RATES)]]
    lines.append(["---"] * len(lines[0]))
    for model in MODELS:
        for corpus in CORPORA:
            results = [read(result_path(folder, Run(model, corpus, "cpt_tokens", rate))) for rate in RATES]
            if any(results):
                losses = [result and result["training"]["after"]["ce_no_think_policy"] for result in results]
                lines.append([model, corpus, *map(number, losses)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    if not any(result_path(folder, run).is_file() for run in runs()):
        print(f"table: no results in {folder}: python -m experiments.real.drive makes them", file=sys.stderr)
        return 2
    print(f"{table(folder)}\n\nRates of CPT, same tokens: held-out cross-entropy without a thought, nats\n")
    print(sweeps(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
