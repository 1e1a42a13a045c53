# SPDX-License-Identifier: Apache-2.0
"""RLP from an earlier and a later checkpoint of the same pretraining, and from the hybrid."""

from experiments.paper.cells import Section, bounds, evaluated, interval, mean_of, seeds, table
from experiments.paper.intervals import mean
from experiments.paper.ordering import difference
from experiments.paper.results import Record, select

NAMES = {"decoder_early": "decoder, early", "decoder": "decoder", "decoder_late": "decoder, late", "hybrid": "hybrid"}


def text(records: list[Record]) -> str | None:
    rows = []
    for base, name in NAMES.items():
        before, after = select(records, "base", base), select(records, "rlp", base)
        change = bounds(mean(list(difference(records, "rlp", "base", base=base).values())))
        row = [name, interval(mean_of(before)), seeds(after), interval(mean_of(after)), change]
        row += [interval(mean_of(after, evaluated("gain", when), 1), 3, sign=True) for when in ("before", "after")]
        rows.append(row)
    head = ["base", "Overall", "seeds", "Overall after RLP", "difference", "gain before, nats", "gain after, nats"]
    return table(head, rows) if any(r.base in ("decoder_early", "decoder_late") for r in records) else None


BASES_SECTION = Section("Early and late bases", "decoder_*", text)
