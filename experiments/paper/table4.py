# SPDX-License-Identifier: Apache-2.0
"""Table 4: RLP on each corpus alone and on mixes, beside continued pretraining."""

from experiments.paper import reported
from experiments.paper.cells import MISSING, NAMES, Section, evaluated, figure, interval, mean_of, seeds, table
from experiments.paper.domains import BENCHMARKS, MATH, REASONING
from experiments.paper.results import Record, average, select

ORDER = ("arithmetic", "compose", "pointers", "textbook", "story", "crawl", "qa", "general", "mix")


def corpora(records: list[Record]) -> list[str]:
    """The corpora with RLP runs, single ones first; the mix of all, which the main runs read, last."""
    found = {r.value for r in records if r.axis == "corpus" and not r.sweep and not r.stage}
    return sorted(found | {"mix"}, key=lambda name: (ORDER.index(name) if name in ORDER else -1, name))


def text(records: list[Record]) -> str | None:
    if not any(r.axis == "corpus" for r in records):
        return None
    low, high = reported.TABLE_4["rlp"]
    rows = [_row("base", MISSING, select(records, "base"), figure(reported.TABLE_4["base"], 2))]
    for corpus in corpora(records):
        for arm in ("cpt_tokens", "cpt_flops", "rlp"):
            runs = select(records, arm) if corpus == "mix" else select(records, arm, axis="corpus", value=corpus)
            if runs or arm == "rlp" or corpus == "mix":
                paper = figure(reported.TABLE_4[arm], 2) if arm != "rlp" else f"{low:.2f} to {high:.2f}"
                rows.append(_row(NAMES[arm], corpus, runs, paper if corpus == "mix" or arm == "rlp" else MISSING))
    head = ["arm", "corpus", "seeds", *BENCHMARKS, "Math Avg", "Reasoning Avg", "Overall", "gain, nats"]
    head += ["the paper's Overall"]
    return table(head, rows) + "\n\nThe paper gives RLP's range over its six corpora, and CPT's on one."


def _row(name: str, corpus: str, runs: list[Record], paper: str) -> list[str]:
    groups = [(benchmark,) for benchmark in BENCHMARKS] + [MATH, REASONING]
    averages = [mean_of(runs, lambda run, names=names: average(run, names)) for names in groups]
    gain = interval(mean_of(runs, evaluated("gain"), 1), 3, sign=True)
    return [name, corpus, seeds(runs), *map(interval, [*averages, mean_of(runs)]), gain, paper]


TABLE_4 = Section("Table 4: corpora and mixes", "corpus", text)
