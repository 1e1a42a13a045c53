# SPDX-License-Identifier: Apache-2.0
"""RLP on a real model and real text: SmolLM2-135M-Instruct reads grade-school mathematics. `rlp train smollm2`.

The text is not part of the project. By default it is looked for in `data/` of the working directory, or where
RLP_DATA says: `gsm8k_train.jsonl` (fields question, answer), or any .jsonl with a field `text` (see `config`).

On gsm8k positions are the starts of the worked answer's lines, the thought is a plan for the line, and the context
holds one worked example of such plans (`PLANS`), of our own making; the baseline reads the plain document. Eight tokens
are scored, so that one token's accident does not decide a reward.
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
    Template,
)

PLANS = Template(
    instruction="""Question: A box holds 12 pens. Tom buys 3 boxes and gives away 6 pens. How many pens are left?
Answer: (Plan: find how many pens he buys)
Tom buys 12*3=36 pens
(Plan: take away the pens he gives away)
He has 36-6=30 pens left

""",
    open="(Plan:",
    close=")\n",
)
# corpus: file, text, span, span pattern, template
CORPORA = {
    "gsm8k": ("sft/gsm8k_train.jsonl", "Question: {question}\nAnswer: {answer}", "{answer}", "(?m)^", PLANS),
    "textbook_discrete": ("text/math_textbook_discrete.jsonl", "{text}", "", "", Template()),
    "textbook_linear_algebra": ("text/math_textbook_linear_algebra.jsonl", "{text}", "", "", Template()),
    "encyclopedia": ("text/wikitext2_valid.jsonl", "{text}", "", "", Template()),
}


def config(corpus: str = "gsm8k") -> Config:
    if corpus not in CORPORA:
        raise ConfigError(f"corpus is {corpus!r}: choose one of {', '.join(CORPORA)}")
    file, text, span, span_pattern, template = CORPORA[corpus]
    return Config(
        name=f"smollm2-{corpus}",
        model="smollm2-135m-instruct",
        steps=60,
        batch_documents=16,
        remat="elementwise",
        template=template,
        rlp=RLPConfig(
            group_size=8,
            horizon=8,
            thought_tokens=64,
            position_mode="span" if span else "uniform",
            microbatches=8,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        data=DataConfig(
            sources=(str(Path(os.environ.get("RLP_DATA", "data")) / file),),
            text=text,
            span=span,
            span_pattern=span_pattern,
            document_tokens=192,
            min_tokens=32,
            heldout_fraction=0.02,
        ),
        eval=EvalConfig(every=20, documents=64, group_size=2, batch_documents=16),
        checkpoint=CheckpointConfig(every=5),
    )
