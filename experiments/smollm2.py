"""RLP on a real model and real text: SmolLM2-135M-Instruct reads grade-school mathematics. `rlp train smollm2`.

The text is not part of the project. By default it is looked for in `data/` of the working directory, or where
RLP_DATA says: `gsm8k_train.jsonl` (fields question, answer), or any .jsonl with a field `text` (see `config`).

Positions are drawn from the worked answer; 8 tokens are scored, so that one token's accident does not decide a reward.
"""

import os
from pathlib import Path

from rlp_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RLPConfig,
)

CORPORA = {
    "gsm8k": ("sft/gsm8k_train.jsonl", "Question: {question}\nAnswer: {answer}", "{answer}"),
    "textbook_discrete": ("text/math_textbook_discrete.jsonl", "{text}", ""),
    "textbook_linear_algebra": ("text/math_textbook_linear_algebra.jsonl", "{text}", ""),
    "encyclopedia": ("text/wikitext2_valid.jsonl", "{text}", ""),
}


def config(corpus: str = "gsm8k") -> Config:
    if corpus not in CORPORA:
        raise ConfigError(f"corpus is {corpus!r}: choose one of {', '.join(CORPORA)}")
    file, text, span = CORPORA[corpus]
    return Config(
        name=f"smollm2-{corpus}",
        model="smollm2-135m-instruct",
        steps=60,
        batch_documents=16,
        remat=False,
        rlp=RLPConfig(
            group_size=8,
            horizon=8,
            thought_tokens=64,
            position_mode="span" if span else "uniform",
            microbatches=8,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        data=DataConfig(
            sources=(str(Path(os.environ.get("RLP_DATA", "data")) / file),),
            text=text,
            span=span,
            document_tokens=192,
            min_tokens=32,
            heldout_fraction=0.02,
        ),
        eval=EvalConfig(every=20, documents=64, group_size=2, batch_documents=16),
        checkpoint=CheckpointConfig(every=5),
    )
