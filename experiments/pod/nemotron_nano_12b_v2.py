# SPDX-License-Identifier: Apache-2.0
"""The paper's run of Nemotron-Nano-12B-v2 (RLP, arXiv 2510.01265, section 4), for TPU v5p or v6e.

`rlp compile pod/nemotron_nano_12b_v2 --topology v5p:4x8x8` says what it needs. To train, name the
checkpoint's directory and documents: `rlp train pod/nemotron_nano_12b_v2 --set model=PATH --set data.sources=FILES`.
"""

import dataclasses

from rlp_jax.config import Config
from rlp_jax.settings import load_experiment


def config() -> Config:
    paper = load_experiment("pod/qwen3_1_7b")
    mesh = dataclasses.replace(paper.mesh, rollout_tensor=0)  # untested for hybrids on a pod
    return dataclasses.replace(paper, name="nemotron-nano-12b-v2", model="nemotron-nano-12b-v2", mesh=mesh)
