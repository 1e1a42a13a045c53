# SPDX-License-Identifier: Apache-2.0
"""Every run of the study as data: what it starts from, with which settings, and what decides its learning rate.

A run's name says its table, arm and seed: main--rlp--seed1, post_sft--rlp--seed1, rollouts--4--seed1,
sweep--rlp--3e-05. Runs of other bases than `decoder` begin with the base's name. The order of `runs` is the order in
which they are made: the main table first.

- The arms: RLP, and its rivals for as many input tokens and for as many FLOPs by the paper's rule. A rival is matched
  to the RLP run of its own seed; RPT, which samples too, by what its token-matched run of that seed has sampled.
- Learning rates: each arm's is the best of its own sweep, by `Overall` on validation problems, seed 0. All arms try the
  same rates. In a sweep a rival is matched to the best run of RLP's sweep. Ablations take RLP's rate.
- Post-training: SFT, then RLVR, the same for each arm, each with a sweep of its own that starts from the arm's best
  sweep run.
- Ablations change one setting of RLP each; `main--rlp` is the point in their middle. But for positions a document:
  there all points read longer documents, fewer where each has more positions, so that all generate as much. `rpt`
  changes one of RPT's, to tell what it owes to them; `main--rpt_tokens` is the point beside them.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.paper import configs
from experiments.paper.domains import ANYWHERE_PATTERN, CORPORA, GENERAL, LONG_DOCUMENT_TOKENS, MATH, QA, REASONING
from experiments.paper.pretrain import BASES
from rlp_jax.config import Config, Match

SEEDS = (1, 2, 3)
RATES = (3e-5, 1e-4, 3e-4, 1e-3)  # of every arm
POST_RATES = {"sft": (3e-4, 1e-3, 3e-3, 1e-2), "rlvr": (3e-5, 1e-4, 3e-4, 1e-3)}  # after every arm
ARMS = ("rlp", "cpt_tokens", "rpt_tokens", "cpt_flops", "rpt_flops")  # trained in this order
POST_TRAINED = ("base", *ARMS)
HYBRID_ARMS = ("rlp", "cpt_tokens")  # the paper's Table 2 has the first, beside the base
HYBRID_POST_TRAINED = ("base", "rlp")  # as there
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "rollouts": (2, 4, 8, 32),
    "thought_tokens": (2, 4, 8, 32),
    "positions": (1, 2, 4, 8, 16),
    "kl": (1e-4, 1e-3, 1e-2),
    "tau": (0.99, 0.995, 0.9995),
    "horizon": (2, 4),
    "place": ("anywhere",),
    "advantage": ("normalised",),
    "temperature": (0.8, 1.0),
}
RPT_WITHOUT = {"one round": {"rounds": 1}, "any entropy": {"entropy_threshold": 0.0}}
FIELDS = {
    "rollouts": "group_size",
    "thought_tokens": "thought_tokens",
    "kl": "kl_coefficient",
    "tau": "ema_decay",
    "horizon": "horizon",
    "temperature": "temperature",
}
POSITIONS_A_STEP = 32  # documents times positions, as in every other run
# One corpus, or several in equal parts; all six are the main runs', which are half one kind, half the other.
MIXES = {name: (name,) for name in CORPORA} | {"qa": QA, "general": GENERAL}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    References name a base, a run, or a sweep, which stands for its best run.

    Attributes:
      name: unique.
      arm, base, stage, axis, value: its place in the tables. stage: "", "sft" or "rlvr"; axis: what an ablation
        changed, "" for none, value to what.
      config: its settings but for model and, outside sweeps, learning rate. None: the start is examined as it is.
      start: what its weights start from.
      sweep: the sweep that it is one of; it is examined on validation problems.
      rate_from: the sweep that decides its learning rate.
      match: what decides its steps; match_run: the RLP run that is matched; rival_run: the run that tells how much it
        samples.
    """

    name: str
    arm: str
    base: str
    config: Config | None
    start: str
    stage: str = ""
    axis: str = ""
    value: Any = None
    sweep: str = ""
    rate_from: str = ""
    match: Match | None = None
    match_run: str = ""
    rival_run: str = ""

    @property
    def seed(self) -> int:
        return self.config.seed if self.config else 0

    @property
    def split(self) -> str:
        """Of the problems that it is examined on."""
        return "validation" if self.sweep else "test"

    @property
    def located(self) -> bool:
        """Whether it is asked where in text its thoughts pay (`locate.py`): bases and arms before post-training."""
        return not (self.sweep or self.axis or self.stage)

    @property
    def needs(self) -> tuple[str, ...]:
        """What must have been made before it."""
        named = (self.start, self.rate_from, self.match_run, self.rival_run)
        return tuple(dict.fromkeys(name for name in named if name))


@dataclasses.dataclass(frozen=True)
class Study:
    """runs: in order. bases: their names. problems: of each benchmark, that a run is examined on."""

    runs: tuple[Run, ...]
    bases: tuple[str, ...] = tuple(BASES)
    problems: int = 256  # enough for a standard error of 1 to 3 points on each

    def sweeps(self) -> dict[str, tuple[Run, ...]]:
        names = dict.fromkeys(run.sweep for run in self.runs if run.sweep)
        return {name: tuple(run for run in self.runs if run.sweep == name) for name in names}


def study() -> Study:
    early_and_late = [run for base in ("decoder_early", "decoder_late") for run in other_base(base)]
    decoder = (*everything("decoder"), *mixes(), *ablations(), *rpt_ablations())
    return Study((*decoder, *early_and_late, *everything("hybrid", HYBRID_ARMS, HYBRID_POST_TRAINED)))


def everything(base: str, arms: tuple[str, ...] = ARMS, post_trained: tuple[str, ...] = POST_TRAINED) -> Iterable[Run]:
    """The main table of a base: sweeps, arms, post-training."""
    yield base_run(base)
    for arm in arms:
        yield from sweep_of(base, arm)
        yield from (main_run(base, arm, seed) for seed in SEEDS)
    for arm in post_trained:
        yield from post_training(base, arm)


def base_run(base: str) -> Run:
    return Run(named(base, "main", "base"), "base", base, None, base)


def arm_config(arm: str) -> tuple[Config, Match | None]:
    algorithm, _, match = arm.partition("_")
    return getattr(configs, algorithm)(), match or None


def sweep_of(base: str, arm: str) -> Iterable[Run]:
    config, match = arm_config(arm)
    sweep, rlp, measured = (named(base, "sweep", one) for one in (arm, "rlp", "rpt_tokens"))
    for rate in RATES:
        yield Run(
            f"{sweep}--{rate:g}", arm, base, seeded(configs.with_rate(config, rate), 0), base, sweep=sweep,
            match=match, match_run=rlp if match else "", rival_run=measured if arm == "rpt_flops" else "",
        )  # fmt: skip


def main_run(base: str, arm: str, seed: int) -> Run:
    config, match = arm_config(arm)
    name, rlp, measured = (named(base, "main", one, f"seed{seed}") for one in (arm, "rlp", "rpt_tokens"))
    return Run(
        name, arm, base, seeded(config, seed), base, rate_from=named(base, "sweep", arm), match=match,
        match_run=rlp if match else "", rival_run=measured if arm == "rpt_flops" else "",
    )  # fmt: skip


def post_training(base: str, arm: str) -> Iterable[Run]:
    """SFT and RLVR after an arm, of its best sweep run for the sweeps, and of each seed."""
    before = base if arm == "base" else named(base, "sweep", arm)
    starts = {seed: base if arm == "base" else named(base, "main", arm, f"seed{seed}") for seed in SEEDS}
    for stage, config in (("sft", configs.sft()), ("rlvr", configs.rlvr())):
        sweep = named(base, f"sweep_{stage}", arm)
        for rate in POST_RATES[stage]:
            own = seeded(configs.with_rate(config, rate), 0)
            yield Run(f"{sweep}--{rate:g}", arm, base, own, before, stage, sweep=sweep)
        for seed in SEEDS:
            name = named(base, f"post_{stage}", arm, f"seed{seed}")
            yield Run(name, arm, base, seeded(config, seed), starts[seed], stage, rate_from=sweep)
            starts[seed] = name
        before = sweep


def ablation(axis: str, value: Any, config: Config, seed: int, base: str = "decoder") -> Run:
    shown = value if isinstance(value, str) else f"{value:g}"
    return Run(
        named(base, axis, shown, f"seed{seed}"), "rlp", base, seeded(config, seed), base, axis=axis, value=value,
        rate_from=named(base, "sweep", "rlp"),
    )  # fmt: skip


def mixes() -> Iterable[Run]:
    """RLP on each corpus alone, and on all of a kind."""
    for mix, names in MIXES.items():
        data = dataclasses.replace(configs.rlp().data, sources=configs.corpora(*names))
        config = dataclasses.replace(configs.rlp(), data=data)
        yield from (ablation("corpus", mix, config, seed) for seed in SEEDS)


def ablations() -> Iterable[Run]:
    for axis, values in ABLATIONS.items():
        for value in values:
            config = with_value(axis, value)
            yield from (ablation(axis, value, config, seed) for seed in SEEDS)


def rpt_ablations() -> Iterable[Run]:
    """RPT on RLP's documents, with one of its own settings changed."""
    settings = configs.rpt()
    for value, changes in RPT_WITHOUT.items():
        config = dataclasses.replace(settings, rpt=dataclasses.replace(settings.rpt, **changes))
        for seed in SEEDS:
            name = named("decoder", "rpt", value.replace(" ", "_"), f"seed{seed}")
            changed = {"name": name, "config": seeded(config, seed), "axis": "rpt", "value": value}
            yield dataclasses.replace(main_run("decoder", "rpt_tokens", seed), **changed)


def with_value(axis: str, value: Any) -> Config:
    """RLP at one point of an ablation."""
    if axis == "positions":
        return with_positions(value)
    if axis == "advantage":
        return with_setting("normalise", value == "normalised")
    if axis == "place":
        settings = configs.rlp()
        return dataclasses.replace(settings, data=dataclasses.replace(settings.data, span_pattern=ANYWHERE_PATTERN))
    return with_setting(FIELDS[axis], value)


def with_setting(field: str, value: float) -> Config:
    """RLP with another value of one of its own settings."""
    settings = configs.rlp()
    return dataclasses.replace(settings, rlp=dataclasses.replace(settings.rlp, **{field: value}))


def with_positions(positions: int) -> Config:
    """RLP on long documents with so many positions in each, and accordingly fewer documents a step."""
    settings = with_setting("positions", positions)
    data = dataclasses.replace(
        settings.data, sources=configs.corpora(folder="corpora_long"), document_tokens=LONG_DOCUMENT_TOKENS
    )
    return dataclasses.replace(settings, batch_documents=POSITIONS_A_STEP // positions, data=data)


def other_base(base: str) -> Iterable[Run]:
    """RLP from another checkpoint of the decoder's pretraining, at the decoder's rate."""
    yield base_run(base)
    for seed in SEEDS:
        yield dataclasses.replace(main_run(base, "rlp", seed), rate_from=named("decoder", "sweep", "rlp"))


def named(base: str, *parts: str) -> str:
    return "--".join(parts if base == "decoder" else (base, *parts))


def seeded(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, seed=seed)


def resolved(run: Run, start: Path, rate: float | None) -> Config:
    """The settings as they are trained with: model and rate filled in."""
    config = dataclasses.replace(run.config, model=start.as_posix(), name=run.name)
    return config if rate is None else configs.with_rate(config, rate)


def overall(scores: dict[str, dict[str, float]]) -> float:
    """Mean of the mathematics and the reasoning average, Pass@1."""
    averages = [math.fsum(scores[name]["pass1"] for name in names) / len(names) for names in (MATH, REASONING)]
    return sum(averages) / 2


def best(scores: dict[str, dict], runs: Iterable[Run]) -> Run:
    """The run of a sweep with the highest validation `overall`; of equals the one with the lowest rate.

    Args:
      scores: examination scores of each run, by name.
    """
    by_rate = sorted(runs, key=lambda run: run.config.optimizer.learning_rate)
    return max(by_rate, key=lambda run: overall(scores[run.name]))
