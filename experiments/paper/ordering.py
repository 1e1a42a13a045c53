# SPDX-License-Identifier: Apache-2.0
"""Where our ordering differs from the paper's: every comparison the paper makes, its sign and ours, paired by seed.

A verdict is computed, never written: "agrees" where the whole 95% interval of our differences lies on the paper's side
of zero, "reversed" where it lies on the other, "undecided" where it holds zero. Where the paper finds a plateau instead
of a difference, it agrees where the whole interval lies within half of the step before it.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.paper.cells import MAIN, MISSING, NAMES, Section, at, bounds, by_seed, figure, points, table
from experiments.paper.intervals import Interval, mean
from experiments.paper.reported import FIGURE_2A, FIGURE_2B, FIGURE_2C, TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_S6
from experiments.paper.results import Record, select
from experiments.paper.table4 import corpora

AGREES, UNDECIDED, REVERSED = "agrees", "undecided: the interval holds 0", "reversed"
EQUAL, ONE_SEED, NO_RUNS = "no difference in any seed", "undecided: one seed", "no runs yet"


class Comparison(NamedTuple):
    """claim; paper: its difference as text; ours: by seed, percentage points; sign: +1 or −1, what the paper finds;
    margin: of a plateau, whose sign is 0."""

    claim: str
    paper: str
    ours: dict[int, float]
    sign: int = 1
    margin: float | None = None


def verdict(ours: Interval | None, sign: int = 1, margin: float | None = None) -> str:
    """See above. margin: of a plateau (sign 0), None where it is not known."""
    if ours is None:
        return NO_RUNS
    if ours.half is None:
        return ONE_SEED
    if ours.mean == ours.half == 0:
        return AGREES if sign == 0 else EQUAL
    if sign == 0:
        if margin is None or margin <= 0:
            return "undecided: no step before the plateau"
        if max(abs(ours.low), abs(ours.high)) <= margin:
            return f"agrees: within ±{figure(margin)}"
        outside = ours.low > margin or ours.high < -margin
        return f"differs: beyond ±{figure(margin)}" if outside else f"undecided: not within ±{figure(margin)}"
    if ours.low <= 0 <= ours.high:
        return UNDECIDED
    return AGREES if (ours.mean > 0) == (sign > 0) else REVERSED


def comparisons(records: list[Record]) -> list[Comparison]:
    parts = (_arms, _rollouts, _lengths, _kl, _tau, _corpora, _hybrid)
    return [item for part in parts for item in part(records)]


def _arms(records: list[Record]) -> list[Comparison]:
    t1, t3, t4 = TABLE_1, TABLE_3, TABLE_4
    pairs = (
        ("cpt_tokens", "base", t1["cpt_tokens"][0] - t1["base"][0], t1["cpt_tokens"][1] - t1["base"][1]),
        ("cpt_flops", "base", t4["cpt_flops"] - t4["base"], None),
        ("rlp", "base", t1["rlp"][0] - t1["base"][0], t1["rlp"][1] - t1["base"][1]),
        ("rlp", "cpt_tokens", t1["rlp"][0] - t1["cpt_tokens"][0], t1["rlp"][1] - t1["cpt_tokens"][1]),
        ("rlp", "cpt_flops", t4["rlp"][0] - t4["cpt_flops"], None),
        ("rlp", "rpt_tokens", t3["tokens"][1] - t3["tokens"][0], None),
        ("rlp", "rpt_flops", t3["flops"][1] - t3["flops"][0], None),
    )
    found = []
    for stage, title in (("", ""), ("rlvr", ", after SFT + RLVR")):
        for left, right, now, later in pairs:
            ours = difference(records, left, right, stage)
            paper = _points(later if stage else now)
            if (left, right, stage) == ("rlp", "cpt_flops", ""):
                paper += " or more"  # than the lowest of six corpora
            found.append(Comparison(f"{NAMES[left]} > {NAMES[right]}{title}", paper, ours))
    return found


def difference(
    records: list[Record], left: str, right: str, stage: str = "", base: str = "decoder"
) -> dict[int, float]:
    """{seed: Overall of one arm less another's}, percentage points. A base has one score for all seeds."""
    ours, theirs = (by_seed(select(records, arm, base, stage)) for arm in (left, right))
    if right == "base" and not stage and theirs:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    return _less(ours, theirs)


def _rollouts(records: list[Record]) -> list[Comparison]:
    return [
        Comparison(
            f"G {MAIN['rollouts']} > G {other}",
            _points(FIGURE_2A[16] - FIGURE_2A[other] if other in FIGURE_2A else None),
            _axis(records, "rollouts", 16, other),
        )
        for other in (2, 4, 8, 32)
    ]


def _lengths(records: list[Record]) -> list[Comparison]:
    """The paper's caps are other ones: its last step before the plateau stands beside ours, its longest beside ours."""
    values = points(records, "thought_tokens") or [2, 4, 8, 16, 32]
    steps = [value for value in values if value <= MAIN["thought_tokens"]]
    rise = f"{_points(FIGURE_2B[2048] - FIGURE_2B[64])} (64 to 2048)"
    found = [
        Comparison(f"cap L {longer} > {shorter}", rise, _axis(records, "thought_tokens", longer, shorter))
        for shorter, longer in itertools.pairwise(steps)
    ]
    last = mean(list(found[-1].ours.values())) if found else None
    for longer in values[len(steps) :][:1]:
        plateau = f"{_points(FIGURE_2B[4096] - FIGURE_2B[2048])} (2048 to 4096)"
        ours = _axis(records, "thought_tokens", longer, steps[-1])
        found.append(Comparison(f"plateau: cap L {longer} ≈ {steps[-1]}", plateau, ours, 0, last and last.mean / 2))
    return found


def _kl(records: list[Record]) -> list[Comparison]:
    others = [value for value in points(records, "kl") if value] or [1e-4, 1e-3]
    return [
        Comparison(
            f"β 0 > β {other:g}",
            _points(FIGURE_2C[0.0] - FIGURE_2C[other] if other in FIGURE_2C else None),
            _axis(records, "kl", 0.0, other),
        )
        for other in others
    ]


def _tau(records: list[Record]) -> list[Comparison]:
    return [
        Comparison(f"τ 0.999 > τ {other:g}", _points(TABLE_S6[0.999] - score), _axis(records, "tau", 0.999, other))
        for other, score in TABLE_S6.items()
        if other != 0.999
    ]


def _corpora(records: list[Record]) -> list[Comparison]:
    """RLP on each corpus against continued pretraining on the same, or on the mix where there is no such run."""
    found = []
    low, high = TABLE_4["rlp"]
    for arm in ("cpt_tokens", "cpt_flops"):
        paper = f"{_points(low - TABLE_4[arm])} to {_points(high - TABLE_4[arm])}"
        for corpus in corpora(records):
            if corpus == "mix":
                continue  # stands among the arms
            own = select(records, arm, axis="corpus", value=corpus)
            rivals, where = (own, corpus) if own else (select(records, arm), "mix")
            ours = _less(by_seed(at(records, "corpus", corpus)), by_seed(rivals))
            found.append(Comparison(f"RLP on {corpus} > {NAMES[arm]}, on {where}", paper, ours))
    return found


def _hybrid(records: list[Record]) -> list[Comparison]:
    now, later = (TABLE_2["rlp"][at] - TABLE_2["base"][at] for at in (0, 1))
    on_hybrid = functools.partial(difference, records, "rlp", base="hybrid")
    more = _less(on_hybrid("base"), difference(records, "rlp", "base"))
    return [
        Comparison("hybrid: RLP > base", _points(now), on_hybrid("base")),
        Comparison("hybrid: RLP > CPT, same tokens", _points(None), on_hybrid("cpt_tokens")),
        Comparison("hybrid: RLP > base, after SFT + RLVR", _points(later), on_hybrid("base", "rlvr")),
        Comparison("RLP over base: hybrid > decoder", _points(now - (TABLE_1["rlp"][0] - TABLE_1["base"][0])), more),
    ]


def _axis(records: list[Record], axis: str, left: Any, right: Any) -> dict[int, float]:
    return _less(by_seed(at(records, axis, left)), by_seed(at(records, axis, right)))


def _less(left: Mapping[int, float], right: Mapping[int, float]) -> dict[int, float]:
    return {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}


def _points(value: float | None) -> str:
    return "not quoted" if value is None else figure(value, 2, sign=True)


def text(records: list[Record]) -> str | None:
    rows, counts = [], {}
    for item in comparisons(records):
        ours = mean(list(item.ours.values()))
        found = verdict(ours, item.sign, item.margin)
        counts[found.split(":")[0]] = counts.get(found.split(":")[0], 0) + 1
        by = ", ".join(f"{seed}: {figure(value, sign=True)}" for seed, value in item.ours.items()) or MISSING
        rows.append([item.claim, item.paper, bounds(ours), by, found])
    if all(row[2] == MISSING for row in rows):
        return None
    head = ["the paper's claim, Overall", "the paper's difference", "ours, 95% interval", "by seed", "verdict"]
    total = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return (
        f"{table(head, rows)}\n\nOf {len(rows)} comparisons: {total}. Each interval is of 95%, "
        "with no correction for how many there are."
    )


ORDERING = Section("Where our ordering differs from the paper's", "*", text)
