# SPDX-License-Identifier: Apache-2.0
"""Writes the report on real models, experiments/real/RESULTS.md, from the committed results alone.

    python -m experiments.real.table            # write it
    python -m experiments.real.table --check    # exit 1 where it is not current; nothing is written

discussion.md is included as it stands.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.paper.cells import MISSING, bounds, figure
from experiments.paper.cells import table as markdown
from experiments.paper.intervals import paired
from experiments.real.drive import RESULTS, complete, read, result_path
from experiments.real.study import ARMS, CORPORA, MODELS, RATES, Run, runs

NAMES = dict(zip(ARMS, ("base", "RLP", "CPT, same tokens", "CPT, same FLOPs"), strict=True))
RUN = ("model", "text", "arm")
COMPARED = (
    *RUN, "rate", "tokens read", "sampled", "TFLOP", "held-out, nats", "after a thought", "other text",
    "after a thought", "GSM8K, %",
)  # fmt: skip
REPORT = Path(__file__).with_name("RESULTS.md")
PARTS = ("gain", "format", "drift", "generic", "content")
SPLIT = (
    *RUN, "gain", "format", "of it drift", "generic", "content", "tokens a thought", "quoting the target", "alarms",
)  # fmt: skip
AGAINST = (*RUN, "against", "without a thought", "after a thought")
ENTROPY = (*RUN, *(f"fifth {n}" for n in range(1, 6)))
COMPARED_NOTE = (
    "Cross-entropy of the policy, nats a token, on held-out pieces of the text that was trained on, and on the other "
    "text. TFLOP: of training, counted from the traced programs; FLOPs are the same by the paper's rule. GSM8K greedy "
    "without a thought, with its Wilson interval. One seed: no interval covers training again."
)
SPLIT_NOTE = (
    "Gain in nats a scored token, intervals over held-out pieces. Format: an empty thought of the policy against "
    "none of the baseline, which still is the base nearly; drift: the policy without a thought against the baseline, "
    "which is all that CPT trains. Generic: another piece's thought against the empty one; content: the own thought "
    "against that. Quoting: share of thoughts that hold the first scored token, and of another piece's that do."
)
AGAINST_NOTE = (
    "RLP's cross-entropy, without a thought and after one, against the other's without one: nats a token that RLP is "
    "ahead, paired by piece."
)
SWEEP_NOTE = "CPT at equal tokens by rate: loss of the second half of the steps, nats a token. The lowest is taken."
ENTROPY_NOTE = "Gain of scored tokens by the entropy of the plain prediction, lowest fifth first."


def interval(mean: float, ends: list[float] | None) -> str:
    """mean [low, high], as an evaluation gives them."""
    text = figure(mean, 3, sign=True)
    return text if ends is None else f"{text} [{', '.join(figure(end, 3, sign=True) for end in ends)}]"


def wilson(right: float, problems: int) -> tuple[float, float]:
    """95% interval of a share, which near 0 a normal one is not."""
    z2 = 1.96**2
    middle = (right + z2 / (2 * problems)) / (1 + z2 / problems)
    half = 1.96 / (1 + z2 / problems) * math.sqrt(right * (1 - right) / problems + z2 / (4 * problems**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)  # at the ends rounding could put them outside


def shown(folder: Path) -> Iterator[dict[str, Any]]:
    """Every result that is whole, by model, text and arm: all but those of the rates that were not the best."""

    def place(run: Run) -> tuple[int, ...]:
        return list(MODELS).index(run.model), CORPORA.index(run.corpus), ARMS.index(run.arm)

    for run in sorted(runs(), key=place):
        result = read(result_path(folder, run))
        if complete(run, result):
            yield result


def name_of(result: dict[str, Any]) -> list[str]:
    model, corpus, arm, *rate = result["name"].split("--")
    return [model, corpus, NAMES[arm] + (f" at {rate[0]}" if rate and arm == "rlp" else "")]


def operations(result: dict[str, Any], rivals: list[dict[str, Any]]) -> float | None:
    """TFLOP that a run's training took, as the budgets of its rivals count them; None where there is no such rival."""
    if "budget" in result:
        return result["budget"]["flops"] / 1e12
    of_run = [rival["budget"]["rlp_flops"] for rival in rivals if rival["budget"]["run"] == result["name"]]
    return of_run[0] / 1e12 if of_run else None


def compared(result: dict[str, Any], tflop: float | None) -> list[str]:
    gain, other = result["gain"], result.get("perplexity", {})
    return [
        *name_of(result),
        f"{result['learning_rate']:g}" if "learning_rate" in result else MISSING,
        *(figure(result.get(name), 0) for name in ("input_tokens", "sampled_tokens")),
        figure(tflop, 1),
        *(figure(row.get(name), 3) for row in (gain, other) for name in ("ce_no_think_policy", "ce_think")),
        answered(result["gsm8k"]) if "gsm8k" in result else MISSING,
    ]


def answered(gsm8k: dict[str, Any]) -> str:
    low, high = wilson(gsm8k["greedy"] / 100, gsm8k["problems"])
    return f"{gsm8k['greedy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def split(result: dict[str, Any]) -> list[str]:
    gain = result["gain"]
    target = gain["probes"]["quotes"]["target"]
    alarms = {**gain["alarms"], **{spell["kind"]: spell for spell in gain.get("warnings", ())}}
    return [
        *name_of(result),
        *(interval(gain[name], gain[f"{name}_ci95"]) for name in PARTS),
        figure(gain["thought_len"], 1),
        f"{target['own']:.0%} / {target['shuffled']:.0%}",
        ", ".join(sorted(alarms)) or "none",
    ]


def against(rlp: dict[str, Any], rival: dict[str, Any]) -> list[str]:
    def of(result: dict[str, Any], name: str) -> dict[int, float]:
        return dict(zip(result["held_out"]["document"], result["held_out"][name], strict=True))

    cells = (bounds(paired(of(rival, "no_think"), of(rlp, name)), 3) for name in ("no_think", "think"))
    return [*name_of(rlp), name_of(rival)[2], *cells]


def entropy(result: dict[str, Any]) -> list[str]:
    bins = result["gain"]["where"]["entropy"]
    cells = [interval(row["gain"], row["gain_ci95"]) for row in bins]
    return [*name_of(result), *cells, *[MISSING] * (5 - len(cells))]


def sweep(folder: Path, model: str, corpus: str) -> list[str]:
    """What each rate of continued pretraining came to."""
    results = [read(result_path(folder, Run(model, corpus, "cpt_tokens", rate))) for rate in RATES]
    return [model, corpus, *(figure(result and result["late_loss"], 3) for result in results)]


def report(folder: Path, discussion: str) -> str:
    """RESULTS.md, from a folder of results."""
    results = list(shown(folder))
    rivals = [result for result in results if result["arm"] != "rlp"]
    pairs = [
        (rlp, rival)
        for rlp in results
        for rival in rivals
        if rlp["arm"] == "rlp" and (rlp["model"], rlp["corpus"]) == (rival["model"], rival["corpus"])
    ]
    budgeted = [result for result in results if "budget" in result]
    swept = [
        sweep(folder, model, corpus)
        for model in MODELS
        for corpus in CORPORA
        if result_path(folder, Run(model, corpus, "cpt_tokens", RATES[0])).is_file()
    ]
    sections = {
        "The arms": (
            COMPARED_NOTE,
            markdown(COMPARED, [compared(result, operations(result, budgeted)) for result in results]),
        ),
        "RLP against the others": (AGAINST_NOTE, markdown(AGAINST, [against(*pair) for pair in pairs])),
        "What a gain is made of": (SPLIT_NOTE, markdown(SPLIT, [split(result) for result in results])),
        "Where thinking pays": (ENTROPY_NOTE, markdown(ENTROPY, [entropy(result) for result in results])),
        "Learning rates": (SWEEP_NOTE, markdown(("model", "text", *(f"{rate:g}" for rate in RATES)), swept)),
    }
    parts = ["# Real models, real text", discussion.strip()]
    for title, section in sections.items():
        parts += [f"## {title}", *section]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the report is not current")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=REPORT, help="the report")
    args = parser.parse_args(arguments)
    found = [run for run in runs() if result_path(args.results, run).is_file()]
    if not found:
        print(f"table: no results in {args.results}: python -m experiments.real.drive makes them", file=sys.stderr)
        return 2
    text = report(args.results, REPORT.with_name("discussion.md").read_text(encoding="utf-8"))
    if not args.check:
        args.out.write_text(text, encoding="utf-8")
        print(f"{args.out}: {len(found)} of {len(runs())} runs")
    elif not args.out.is_file() or args.out.read_text(encoding="utf-8") != text:
        print(f"{args.out} is not current: run python -m experiments.real.table", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
