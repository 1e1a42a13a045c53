# SPDX-License-Identifier: Apache-2.0
"""What a step needs, against its own programs counted from their jaxprs, as a TPU would run them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlp_jax import rlp
from rlp_jax.aot.jaxpr_cost import count_flops
from rlp_jax.aot.workload import PHASES, loop_turns, needed_flops
from rlp_jax.config import Config, DataConfig, RLPConfig
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.backend import compiling_for, platform
from rlp_jax.models.mamba2 import HybridConfig
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.optimizer import make_optimizer
from rlp_jax.rollout.engine import ring_sizes
from rlp_jax.state import init_state

DENSE = dataclasses.replace(CONFIGS["qwen3-1.7b"], n_layers=3)  # shapes alone: size costs nothing
HYBRID = dataclasses.replace(
    CONFIGS["nemotron-nano-12b-v2"], n_layers=4, hybrid=HybridConfig("M-*-", 128, 80, state_size=128, groups=8)
)
TEMPLATE = TemplateTokens((), (1,) * 16, (2,), (3,))
CONFIG = Config(
    model="-",
    batch_documents=4,
    compute_dtype="bfloat16",
    rlp=RLPConfig(microbatches=2),
    data=DataConfig(("-",)),
)


def counted(model, config, tokens=None):
    """Operations by phase over those needed."""
    tokens = tokens or config.rlp.thought_tokens
    model = LanguageModel(dataclasses.replace(model, compute_dtype=config.compute_dtype, remat=config.remat))
    optimizer = make_optimizer(config.optimizer, 1)
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), optimizer))
    B, T = config.batch_documents, config.data.document_tokens
    batch = {
        "tokens_BT": jax.ShapeDtypeStruct((B, T), jnp.int32), "length_B": jax.ShapeDtypeStruct((B,), jnp.int32),
        "span_BT": jax.ShapeDtypeStruct((B, T), bool), "document_B": jax.ShapeDtypeStruct((B,), jnp.int32),
        "weight_B": jax.ShapeDtypeStruct((B,), jnp.float32),
    }  # fmt: skip
    turns = loop_turns(model, TEMPLATE, config, 1, tokens)
    with compiling_for("tpu"):
        step = rlp.make_step(model, optimizer, TEMPLATE, config)
        sample = step.sample.trace(state.params, state.ema_params, batch, jax.random.key(0))
        samples = jax.eval_shape(step.sample, state.params, state.ema_params, batch, jax.random.key(0))
        learn = jax.jit(step.learn).trace(state, batch, samples)
    flops = count_flops(sample.jaxpr, turns, PHASES) + count_flops(learn.jaxpr, turns, PHASES)
    needed = needed_flops(model.config, state.params, TEMPLATE, config, tokens)
    assert set(needed) <= {*flops}
    return {name: flops[name] / needed[name] for name in needed}


@pytest.mark.parametrize("remat", ["layer", "elementwise", "none"])
def test_a_decoder_computes_what_it_needs(remat):
    """More only where attention computes whole blocks, its backward pass the scores twice, and a decoding step looks at
    its whole ring. A remat policy taken for another would be off by a quarter or a third."""
    shares = counted(DENSE, dataclasses.replace(CONFIG, remat=remat))
    assert shares.keys() == {"baseline", "prefill", "rollout", "gradient"}
    assert all(0.98 < share < 1.15 for share in shares.values()), shares


def test_scoring_before_several_updates_reads_the_whole_batch():
    """One pass over all documents, where the gradient's loop runs once a minibatch."""
    shares = counted(DENSE, dataclasses.replace(CONFIG, rlp=RLPConfig(minibatches=2)))
    assert 0.98 < shares["scoring"] < 1.15 and 0.98 < shares["gradient"] < 1.15, shares


def test_short_thoughts_fill_fewer_bins():
    """Thoughts of less than half the cap: the documents of two bins go into one, which they all but fill."""
    turns = loop_turns(LanguageModel(DENSE), TEMPLATE, CONFIG, 1, 950)
    assert turns.loops["bins"] == 1
    assert 0.98 < counted(DENSE, CONFIG, tokens=950)["gradient"] < 1.15


def test_a_hybrid_computes_what_it_needs():
    """Its branches attend through masks, so pairs that nobody sees are computed too."""
    shares = counted(HYBRID, CONFIG)
    assert all(0.95 < share < 1.3 for share in shares.values()), shares


@pytest.mark.parametrize("slots", [0, 1, 3, 8])
@pytest.mark.parametrize("tokens", [10, 64, 100, 2048])
def test_decoding_turns_are_all_tokens(slots, tokens):
    config = dataclasses.replace(CONFIG, rlp=RLPConfig(group_size=8, thought_tokens=2048, slots=slots, microbatches=2))
    loops = loop_turns(LanguageModel(DENSE), TEMPLATE, config, 1, tokens).loops
    rounds = -(-8 // slots) if slots else 1
    assert sum(loops[f"refills_{n}"] * loops[f"ring_{n}"] for n in ring_sizes(2048)) == pytest.approx(rounds * tokens)


def test_the_platform_is_told_while_compiling():
    here = platform()
    with compiling_for("tpu"):
        assert platform() == "tpu"
    assert platform() == here
