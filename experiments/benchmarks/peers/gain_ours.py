# SPDX-License-Identifier: Apache-2.0
"""Training with rlp_jax for `gain.py`: `rlp.make_step`'s two halves, as `rlp train` runs them."""

import dataclasses
import pathlib

import jax
import numpy as np
from protocol import Conversation

import rlp_jax
from experiments.quickstart import config as quickstart
from rlp_jax import rlp
from rlp_jax.checkpoints_io.load import save_hf
from rlp_jax.config import OptimizerConfig
from rlp_jax.data.template import TemplateTokens
from rlp_jax.optimizer import make_optimizer
from rlp_jax.state import init_state, run_key

DTYPES = {"tokens_BT": np.int32, "length_B": np.int32, "span_BT": bool, "document_B": np.int64, "weight_B": np.float32}


def main():
    conversation = Conversation()
    job = conversation.job
    model, params, tokenizer = rlp_jax.load(job["directory"])
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat="elementwise"))
    template = TemplateTokens(*map(tuple, (job["template"][name] for name in TemplateTokens._fields)))
    base = quickstart()
    config = dataclasses.replace(
        base,
        steps=len(job["batches"]),
        optimizer=OptimizerConfig(learning_rate=job["learning_rate"]),
        rlp=dataclasses.replace(base.rlp, microbatches=job["microbatches"]),
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = rlp.make_step(model, optimizer, template, config)
    state = init_state(jax.tree.map(jax.numpy.asarray, params), optimizer, consume=True)
    batches = [{name: np.asarray(value, DTYPES[name]) for name, value in batch.items()} for batch in job["batches"]]
    conversation.ready({"jax": jax.__version__})
    for n, batch in enumerate(batches):
        if n % job["turn"] == 0:
            conversation.begin()
            made = 0
        samples = step.sample(state.params, state.ema_params, batch, run_key(config.seed, n))
        state, metrics, _ = step.learn(state, batch, samples)
        made += int(metrics["thought_tokens"])
        if (n + 1) % job["turn"] == 0:
            conversation.end(made)
            save_hf(pathlib.Path(job["out"]) / str(n + 1), model, jax.device_get(state.params), tokenizer)


if __name__ == "__main__":
    main()
