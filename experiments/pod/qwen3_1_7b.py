# SPDX-License-Identifier: Apache-2.0
"""The paper's run of Qwen3-1.7B-Base (RLP, arXiv 2510.01265, section 4), for one TPU v5e pod of 256 chips.

`rlp compile pod/qwen3_1_7b --topology v5e:16x16` says what it needs. To train, name the
checkpoint's directory and documents: `rlp train pod/qwen3_1_7b --set model=PATH --set data.sources=FILES`.
"""

from rlp_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, RLPConfig


def config() -> Config:
    return Config(
        name="qwen3-1.7b",
        model="qwen3-1.7b",
        batch_documents=512,
        compute_dtype="bfloat16",
        remat="layer",
        rlp=RLPConfig(group_size=16, thought_tokens=2048, temperature=0.7, ema_decay=0.999, microbatches=2),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        data=DataConfig(sources=("documents.jsonl",), document_tokens=2048),
        mesh=MeshConfig(data=1, fsdp=-1, rollout="gathered", rollout_tensor=8),
    )
