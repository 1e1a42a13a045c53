"""The paper's run of Qwen3-14B-Base (RLP, arXiv 2510.01265, section 4), for TPU v5p or v6e.

`rlp compile pod/qwen3_14b --topology v5p:4x8x8` says what it needs. To train, name the
checkpoint's directory and documents: `rlp train pod/qwen3_14b --set model=PATH --set data.sources=FILES`.
"""

from rlp_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, RLPConfig


def config() -> Config:
    return Config(
        name="qwen3-14b",
        model="qwen3-14b",
        batch_documents=512,
        compute_dtype="bfloat16",
        remat="layer",
        rlp=RLPConfig(group_size=16, thought_tokens=2048, temperature=0.7, ema_decay=0.999, microbatches=2),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        data=DataConfig(sources=("documents.jsonl",), document_tokens=2048),
        mesh=MeshConfig(data=1, fsdp=-1, rollout="gathered"),
    )
