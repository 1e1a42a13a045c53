# SPDX-License-Identifier: Apache-2.0
"""Where in text thoughts pay, what they quote, and when they collapsed: `rlp eval --tasks gain` of bases and arms.

All are asked at positions drawn from every token of the same held-out documents, so that most are none that RLP and RPT
were trained at. Figures are means over seeds; a base is one model and has no interval here.
"""

from collections.abc import Callable, Iterable
from typing import Any

from experiments.paper.cells import MISSING, NAMES, Section, figure, interval, mean_of, seeds, table
from experiments.paper.results import ARMS, BASES, Record, select

GROUPS = {
    "span": "where it was trained to think",
    "class": "token class",
    "entropy": "entropy of the plain prediction",
    "place": "place in the document",
}
LABELS = {"in data.span": "answers and revealing words", "outside": "all other tokens"}
FIFTHS = ("lowest fifth", "second", "third", "fourth", "highest fifth")
QUOTING = {
    "carried": "what the quote carries",
    "carried_other": "what as many other tokens carry",
    "carried_beyond_other": "the quote beyond that",
}


def located(records: Iterable[Record]) -> list[tuple[str, str, list[Record]]]:
    """(base, arm, its runs that were asked), in order of the tables."""
    found = [(base, arm, select(records, arm, base)) for base in BASES for arm in ARMS]
    kept = [(base, arm, [run for run in runs if run.where]) for base, arm, runs in found]
    return [entry for entry in kept if entry[2]]


def rows_of(run: Record, group: str) -> dict[str, dict[str, Any]]:
    """A run's rows of one group by their name here; bins by their rank, as their ends are each run's own."""
    rows = run.where["where"][group]
    if group in ("entropy", "place"):
        names = FIFTHS if len(rows) == len(FIFTHS) else [f"{i + 1} of {len(rows)}" for i in range(len(rows))]
        return dict(zip(names, rows, strict=True))
    return {LABELS.get(row["label"], row["label"]): row for row in rows}


def places_text(records: list[Record]) -> str | None:
    """One row a kind of token, one column an arm: the gain, and its content in parentheses."""
    parts = []
    for base in BASES:
        arms = [(arm, runs) for of, arm, runs in located(records) if of == base]
        if not arms:
            continue
        rows = []
        for group, title in GROUPS.items():
            names = dict.fromkeys(name for _, runs in arms for run in runs for name in rows_of(run, group))
            for name in names:
                cells = [_gain_and_content(runs, group, name) for _, runs in arms]
                rows.append([title, name, *cells])
        head = ["by", "tokens", *(f"{NAMES[arm]} ({len(runs)})" for arm, runs in arms)]
        title = f"{base}, gain in nats a token (of which content), and the number of seeds:"
        parts.append(f"{title}\n\n{table(head, rows)}")
    return "\n\n".join([*parts, NOTE]) if parts else None


NOTE = (
    "Gain: against the prediction without a thought, of a run by its moving average. Content: against another "
    "document's thought. Fifths hold equally many scored tokens, by each run's own prediction; the place of a token is "
    "the number of tokens before it."
)


def _gain_and_content(runs: list[Record], group: str, name: str) -> str:
    def of(key: str) -> Callable[[Record], float | None]:
        return lambda run: rows_of(run, group).get(name, {}).get(key)

    gain, content = (mean_of(runs, of(key), 1) for key in ("gain", "content"))
    if gain is None:
        return MISSING
    return f"{interval(gain, 2, sign=True)} ({figure(content.mean, 2, sign=True)})"


def quotes_text(records: list[Record]) -> str | None:
    rows = []
    for base, arm, runs in located(records):

        def rate(run: Record, column: str) -> float | None:
            quotes = run.where["probes"]["quotes"]["target"]
            return quotes and quotes[column]

        shares = [
            interval(mean_of(runs, lambda run, column=column: rate(run, column)), sign=column == "excess")
            for column in ("own", "shuffled", "excess")
        ]
        worth = [
            interval(mean_of(runs, lambda run, name=name: run.where["probes"]["quoting"][name], 1), 3, sign=True)
            for name in QUOTING
        ]
        without = mean_of(runs, lambda run: run.where["probes"]["gain_without"], 1)
        gain = mean_of(runs, lambda run: run.where["probes"]["gain"], 1)
        cells = [interval(gain, 3, sign=True), interval(without, 3, sign=True)]
        rows.append([base, NAMES[arm], seeds(runs), *shares, *worth, *cells])
    head = ["base", "arm", "seeds", "own thoughts that quote, %", "another document's, %", "excess", *QUOTING.values()]
    text = table([*head, "gain of all", "quotes taken out"], rows)
    return f"{text}\n\n{QUOTES_NOTE}" if rows else None


QUOTES_NOTE = (
    "A thought quotes where it holds the token that it is scored by. A right chain of reasoning ends with its answer "
    "too, so these are figures to read and no verdicts; what a quote carries beyond as many other tokens of the same "
    "thought tells copying from working out. Gains in nats a token."
)


def alarms_text(records: list[Record]) -> str | None:
    kept = [run for run in records if run.alarms is not None]
    if not kept:
        return None
    rows = []
    for run in sorted(kept, key=lambda run: run.name):
        for kind in sorted({spell["kind"] for spell in run.alarms}):
            spells = [spell for spell in run.alarms if spell["kind"] == kind]
            first, last = min(spell["first"] for spell in spells), max(spell["last"] for spell in spells)
            rows.append([run.name, kind, f"{first} to {last}", str(sum(spell["steps"] for spell in spells))])
    at_end = [
        [run.name, kind, "at its end", MISSING]
        for run in sorted(records, key=lambda run: run.name)
        for kind in run.where.get("alarms", {})
    ]
    quiet = len(kept) - len({name for name, *_ in rows})
    text = f"Of {len(kept)} runs whose warnings were kept, {quiet} raised none while they trained."
    shown = table(["run", "alarm", "steps", "of them with it"], rows + at_end)
    return f"{text}\n\n{shown}" if rows + at_end else text


PLACES = Section("Where in text thinking pays", "main", places_text)
QUOTES = Section("What thoughts quote of what they are scored by", "main", quotes_text)
ALARMS = Section("Collapse alarms", "*", alarms_text)
