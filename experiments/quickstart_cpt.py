# SPDX-License-Identifier: Apache-2.0
"""The quickstart's rival: continued pretraining on the same lines, `rlp train quickstart_cpt`.

As many input tokens as the quickstart's RLP run; `rlp train quickstart --as cpt --match flops` gives it as much
compute. AdamW is the paper's for its CPT baseline: betas 0.9 and 0.95, weight decay 0.1, a cosine to a tenth of the
rate.
"""

import dataclasses

from rlp_jax.config import Config, CPTConfig, OptimizerConfig
from rlp_jax.settings import load_experiment


def config() -> Config:
    quickstart = load_experiment("quickstart")
    return dataclasses.replace(
        quickstart,
        name="quickstart_cpt",
        algorithm="cpt",
        cpt=CPTConfig(sequence_tokens=512),
        optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-5, weight_decay=0.1),
    )
