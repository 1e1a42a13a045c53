# SPDX-License-Identifier: Apache-2.0
"""The paper's rival of Qwen3-1.7B-Base (RLP, arXiv 2510.01265, section 4), continued pretraining, for the same TPU pod.

AdamW with betas 0.9 and 0.95, weight decay 0.1, a cosine from 1e-6 to 1e-7; batches of 6M tokens; sequences of 8,192.
The steps read the paper's 170M input tokens; give more for those of its FLOP-matched run, 6B.
`rlp train pod/qwen3_1_7b_cpt --set model=PATH --set data.sources=FILES`
"""

import dataclasses

from rlp_jax.config import Config, CPTConfig, OptimizerConfig
from rlp_jax.settings import load_experiment


def config() -> Config:
    return dataclasses.replace(
        load_experiment("pod/qwen3_1_7b"),
        name="qwen3-1.7b-cpt",
        algorithm="cpt",
        steps=27,
        batch_documents=3_072,  # of 2,048 tokens; a multiple of the pod's chips
        cpt=CPTConfig(sequence_tokens=8_192),
        optimizer=OptimizerConfig(learning_rate=1e-6, final_learning_rate=1e-7, weight_decay=0.1),
    )
