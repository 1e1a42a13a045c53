# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on the quickstart's lines, loss on their answers alone: `rlp train quickstart_sft`."""

import dataclasses

from rlp_jax.config import Config, SFTConfig
from rlp_jax.settings import load_experiment


def config() -> Config:
    return dataclasses.replace(
        load_experiment("quickstart"),
        name="quickstart_sft",
        algorithm="sft",
        sft=SFTConfig(sequence_tokens=512, answer_pattern="^[a-h]$"),
    )
