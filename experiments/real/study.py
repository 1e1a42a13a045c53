# SPDX-License-Identifier: Apache-2.0
"""RLP against continued pretraining on real models and real text: every run as data, and the settings they share.

`rlp train experiments/real/study.py --with model=gemma3 --with corpus=encyclopedia` is one of them; `drive.py` makes
all, `table.py` shows them. Text is looked for as in `experiments/smollm2.py`, whose format these runs take.

Steps, batch and length are what an hour or two of two processor cores allow a model. Continued pretraining tries RATES
for as many input tokens, and takes the best of them for as many operations: by its loss over the second half of its
steps, on documents that it had not read until then. RLP's rate is that of smollm2.py; at FURTHER rates it trains as
well, and is asked about held-out pieces alone.
"""

import dataclasses
from typing import NamedTuple

from experiments import smollm2
from rlp_jax.config import Config, ConfigError, CPTConfig, ReportConfig

MODELS = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma3-270m"}
STEPS = {"smollm2": 20, "gemma3": 12}
CORPORA = ("gsm8k", "encyclopedia")
RATES = (1e-5, 3e-5, 1e-4)  # of continued pretraining, for as many tokens
FURTHER = {"smollm2": (3e-6, 3e-5), "gemma3": (3e-6,)}  # of RLP
ARMS = ("base", "rlp", "cpt_tokens", "cpt_flops")


class Run(NamedTuple):
    """model, corpus: of MODELS and CORPORA. arm: of ARMS. rate: of a cpt_tokens run, which is one of a sweep, or of
    RLP's further runs; None: the experiment's own, or the best of the sweep."""

    model: str
    corpus: str
    arm: str
    rate: float | None = None

    @property
    def name(self) -> str:
        return "--".join((self.model, self.corpus, self.arm) + ((f"{self.rate:g}",) if self.rate else ()))

    @property
    def swept(self) -> bool:
        """Whether it is one of a sweep, of which only the best is evaluated."""
        return self.arm == "cpt_tokens"

    @property
    def match(self) -> str:
        return self.arm.partition("_")[2]

    @property
    def rlp(self) -> str:
        """The name of the run that it is matched to."""
        return Run(self.model, self.corpus, "rlp").name


def runs() -> list[Run]:
    """In the order in which they are made."""
    found = []
    for model in MODELS:
        for corpus in CORPORA:
            found += [Run(model, corpus, "base"), Run(model, corpus, "rlp")]
            found += [Run(model, corpus, "cpt_tokens", rate) for rate in RATES]
            found.append(Run(model, corpus, "cpt_flops"))
            found += [Run(model, corpus, "rlp", rate) for rate in FURTHER[model]]
    return found


def config(model: str = "smollm2", corpus: str = "gsm8k") -> Config:
    """The RLP run's; `--as cpt --match ...` makes the rivals of it."""
    if model not in MODELS:
        raise ConfigError(f"model is {model!r}: choose one of {', '.join(MODELS)}")
    base = smollm2.config(corpus)
    return dataclasses.replace(
        base,
        name=f"{model}--{corpus}",
        model=MODELS[model],
        steps=STEPS[model],
        batch_documents=8,
        rlp=dataclasses.replace(base.rlp, thought_tokens=48, microbatches=4),
        cpt=CPTConfig(sequence_tokens=2048),
        data=dataclasses.replace(base.data, heldout_fraction=0.1),  # the encyclopedia is short
        # For a look at the run: arms are compared by what `rlp eval` says of them (drive.py).
        eval=dataclasses.replace(base.eval, every=0, documents=16),
        checkpoint=dataclasses.replace(base.checkpoint, every=4, keep=1),
        report=ReportConfig(documents=0),  # none: thoughts at every token take minutes here
    )
