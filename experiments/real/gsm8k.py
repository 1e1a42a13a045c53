# SPDX-License-Identifier: Apache-2.0
"""What a base is asked with on grade-school mathematics: the settings of its RLP run."""

from experiments.real import study
from rlp_jax.config import Config


def config() -> Config:
    return study.config(corpus="gsm8k")
