# SPDX-License-Identifier: Apache-2.0
"""Prints the held-out results of run directories as a Markdown table, from their summary.json.

python -m experiments.results_table experiments/results/quickstart/seed*
"""

import json
import sys
from pathlib import Path


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def row(name: str, when: str, values: dict) -> str:
    low, high = values["gain_ci95"]
    cells = (
        name,
        when,
        f"{signed(values['gain'])} [{signed(low)}, {signed(high)}]",
        signed(values["gain_empty"]),
        signed(values["gain_shuffled"]),
        f"{values['ce_think']:.3f} / {values['ce_no_think']:.3f}",
        f"{values['acc_think']:.1%} / {values['acc_no_think']:.1%}",
        f"{values['thought_len']:.1f}",
        f"{values['stop_rate']:.0%}",
    )
    return f"| {' | '.join(cells)} |"


def table(run_dirs: list[Path]) -> str:
    lines = [
        "| run | | gain | empty thought | shuffled thought | cross-entropy thinking / not | accuracy thinking / not "
        "| tokens a thought | stop by themselves |",
        "|" + "---|" * 9,
    ]
    for run_dir in run_dirs:
        summary = json.loads((run_dir / "summary.json").read_text())
        lines += [row(run_dir.name, "before", summary["before"]), row("", "after", summary["after"])]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("results_table: name at least one run directory")
    print(table([Path(name) for name in sys.argv[1:]]))
