# SPDX-License-Identifier: Apache-2.0
"""What a base is asked with on general text: the settings of its RLP run."""

from experiments.real import study
from rlp_jax.config import Config


def config() -> Config:
    return study.config(corpus="encyclopedia")
