# SPDX-License-Identifier: Apache-2.0
"""A step of rlp_jax: `rlp.make_step`'s two halves, as `rlp train` runs them (float32, layers keep their products)."""

import dataclasses

import jax
import numpy as np
from protocol import serve

import rlp_jax
from rlp_jax import rlp
from rlp_jax.config import Config, OptimizerConfig, RLPConfig
from rlp_jax.data.template import TemplateTokens
from rlp_jax.optimizer import make_optimizer
from rlp_jax.rollout import scoring
from rlp_jax.state import init_state, run_key


def prepare(job):
    model, params, _ = rlp_jax.load(job["directory"])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat="elementwise"))
    tokens_BT = np.asarray(job["documents"], np.int32)
    B, T = tokens_BT.shape
    config = Config(
        batch_documents=B,
        rlp=RLPConfig(
            group_size=job["group"],
            thought_tokens=job["new"],
            temperature=job["temperature"],
            position_mode="span",
            microbatches=job["microbatches"],
        ),
        optimizer=OptimizerConfig(learning_rate=job["learning_rate"]),
    )
    template = TemplateTokens(plain=(), context=(), open=tuple(job["open"]), close=tuple(job["close"]))
    optimizer = make_optimizer(config.optimizer, updates=1_000)
    step = rlp.make_step(model, optimizer, template, config)
    at_last_BT = np.arange(T) == np.full((B, 1), T - 1)
    batch = {
        "tokens_BT": tokens_BT,
        "length_B": np.full(B, T, np.int32),
        "span_BT": at_last_BT,
        "document_B": np.arange(B),
        "weight_B": np.ones(B, np.float32),
    }
    state, n = init_state(jax.tree.map(jax.numpy.asarray, params), optimizer, consume=True), 0

    def run():
        nonlocal state, n
        samples = step.sample(state.params, state.ema_params, batch, run_key(0, n))
        state, metrics, _ = step.learn(state, batch, samples)
        assert metrics["finite"] == 1 and metrics["thought_len"] == job["new"]
        n += 1
        return int(metrics["thought_tokens"])

    @jax.jit
    def baseline(params):
        plain = scoring.read_plain(model, params, tokens_BT, template)
        position_BK = np.full((B, 1), T - 1)
        return scoring.baseline_logprob(model, params, plain, position_BK, tokens_BT[:, None, -1:])[0]

    return run, {"baseline": baseline(state.ema_params).ravel().tolist(), "jax": jax.__version__}


if __name__ == "__main__":
    serve(prepare)
