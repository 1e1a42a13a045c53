# SPDX-License-Identifier: Apache-2.0
"""The study's settings, one function an algorithm; what runs vary, `study.py` replaces.

Paths are relative to the driver's work directory, where all runs are started: the settings are the same on every
machine. Learning rates are placeholders, replaced by `with_rate`.
"""

import dataclasses

from experiments.paper.domains import CLOSE, CORPORA, DOCUMENT_TOKENS, INSTRUCTION, OPEN, SPAN_PATTERN
from rlp_jax.config import (
    CheckpointConfig,
    Config,
    CPTConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    ReportConfig,
    RLPConfig,
    RLVRConfig,
    RPTConfig,
    SFTConfig,
    Template,
)

DATA = "data"  # folder of the study's files
RATE = 1e-4
FINAL = 0.1  # a cosine's last rate, relative to its first: the paper's for continued pretraining
# Ends a response: its answer is one word and a full stop. No thought holds a full stop.
TEMPLATE = Template(instruction=INSTRUCTION, open=OPEN, close=CLOSE, end=".")
RESPONSE_TOKENS = 18  # a thought of 16 tokens, its closing tag included, an answer and a full stop
ANSWER = {"answer_open": "", "answer_close": " ."}  # what stands between the closing tag and the full stop


def corpora(*names: str, folder: str = "corpora") -> tuple[str, ...]:
    """Files of these corpora, by default all six."""
    return tuple(f"{DATA}/{folder}/{name}.jsonl" for name in names or CORPORA)


def rlp() -> Config:
    """RLP on all six corpora, as the quickstart's."""
    return Config(
        name="rlp",
        steps=40,
        batch_documents=16,
        remat="elementwise",
        template=TEMPLATE,
        rlp=RLPConfig(group_size=16, positions=2, position_mode="span", thought_tokens=16),
        optimizer=OptimizerConfig(learning_rate=RATE),
        data=DataConfig(sources=corpora(), span_pattern=SPAN_PATTERN, document_tokens=DOCUMENT_TOKENS),
        eval=EvalConfig(documents=128, positions=3, group_size=4, batch_documents=32),
        checkpoint=CheckpointConfig(keep=1),
        report=ReportConfig(documents=0),
    )


def cpt() -> Config:
    """Continued pretraining on RLP's documents; its steps follow from what it matches."""
    return dataclasses.replace(
        rlp(),
        name="cpt",
        algorithm="cpt",
        cpt=CPTConfig(sequence_tokens=512),
        optimizer=OptimizerConfig(learning_rate=RATE, final_learning_rate=FINAL * RATE, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=100, keep=1),
    )


def rpt() -> Config:
    """Reinforcement pre-training on RLP's documents; its steps follow from what it matches. Group size and temperature
    are RPT's own."""
    settings = rlp()
    return dataclasses.replace(
        settings,
        name="rpt",
        algorithm="rpt",
        rlp=dataclasses.replace(settings.rlp, group_size=8, temperature=0.8, thought_tokens=RESPONSE_TOKENS),
        rpt=RPTConfig(rounds=2, **ANSWER),
    )


def sft() -> Config:
    """Supervised fine-tuning on worked examples. Its documents hold a thought already, so that information gain means
    nothing on them: as few as there may be are evaluated."""
    settings = rlp()
    return dataclasses.replace(
        settings,
        name="sft",
        algorithm="sft",
        steps=30,
        batch_documents=32,
        sft=SFTConfig(sequence_tokens=1024),
        optimizer=OptimizerConfig(learning_rate=RATE, final_learning_rate=FINAL * RATE, weight_decay=0.1),
        data=DataConfig(
            sources=(f"{DATA}/sft.jsonl",), text="{text}", span="{response}", document_tokens=DOCUMENT_TOKENS
        ),
        eval=EvalConfig(documents=8, group_size=2, batch_documents=8),
    )


def rlvr() -> Config:
    """GRPO on problems of arithmetic whose answers are checked, as the paper's on MATH."""
    settings = rlp()
    return dataclasses.replace(
        settings,
        name="rlvr",
        algorithm="rlvr",
        steps=20,
        batch_documents=32,
        rlp=dataclasses.replace(settings.rlp, group_size=8, positions=1, thought_tokens=RESPONSE_TOKENS),
        rlvr=RLVRConfig(verifier="exact", **ANSWER),
        data=DataConfig(
            sources=(f"{DATA}/problems/arithmetic.jsonl",),
            text="{question} {answer} .",
            span="{answer}",
            answer="{answer}",
            document_tokens=DOCUMENT_TOKENS,
        ),
    )


def with_rate(config: Config, rate: float) -> Config:
    """The settings with another learning rate, a cosine's end along with its beginning."""
    final = None if config.optimizer.final_learning_rate is None else FINAL * rate
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate, final_learning_rate=final)
    return dataclasses.replace(config, optimizer=optimizer)
