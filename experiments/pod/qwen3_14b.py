# SPDX-License-Identifier: Apache-2.0
"""The paper's run of Qwen3-14B-Base (RLP, arXiv 2510.01265, section 4), for TPU v5p or v6e.

`rlp compile pod/qwen3_14b --topology v5p:4x8x8` says what it needs. To train, name the
checkpoint's directory and documents: `rlp train pod/qwen3_14b --set model=PATH --set data.sources=FILES`.
"""

import dataclasses

from rlp_jax.config import Config
from rlp_jax.settings import load_experiment


def config() -> Config:
    return dataclasses.replace(load_experiment("pod/qwen3_1_7b"), name="qwen3-14b", model="qwen3-14b")
