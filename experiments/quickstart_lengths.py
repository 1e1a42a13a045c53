# SPDX-License-Identifier: Apache-2.0
"""What a quickstart run learned, by length of chain: `python -m experiments.quickstart_lengths RUN_DIRECTORY`.

RLP trained on chains of 3 to 5 operations. The base model has seen chains of 6 and 7 in its pretraining, where most
thoughts about them went backwards as well, and neither it nor RLP any of 8. A table on fresh documents, before and
after: information gain of a thought over the base model's plain prediction, both controls, accuracy with and without a
thought, and the share of sampled and of greedy thoughts that follow the right procedure and the backwards one.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import jax
import numpy as np

from rlp_jax.checkpoint import load_run
from rlp_jax.checkpoints_io.load import load
from rlp_jax.data import compose
from rlp_jax.data.documents import cut
from rlp_jax.data.pipeline import heldout_batches
from rlp_jax.data.template import template_tokens
from rlp_jax.evals.likelihood import evaluate
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.rollout import scoring
from rlp_jax.rollout.engine import sample_thoughts

LENGTHS = range(3, 9)
SEED = 12345  # of the documents: no run's
GREEDY = 1e-4  # temperature


def procedures(model: LanguageModel, params, documents, batch, tokens, tokenizer, temperature: float, cap: int) -> dict:
    """Share of thoughts by procedure, one thought for every line of a batch of unpadded documents."""
    span_BT = batch["span_BT"]
    position_BK = np.nonzero(span_BT)[1].reshape(len(span_BT), -1)

    @jax.jit
    def sample(params, tokens_BT, position_BK):
        _, cache = model.hidden(params, scoring.with_context(tokens_BT, tokens.context))
        keys = jax.random.split(jax.random.key(SEED), position_BK.shape)
        prefix_BR = position_BK + len(tokens.context)
        return sample_thoughts(model, params, cache, prefix_BR, tokens.open, tokens.close, keys, cap, temperature)

    rollout = jax.device_get(sample(params, batch["tokens_BT"], position_BK))
    verdicts = []
    for b, document in enumerate(documents):
        for r, line in enumerate(compose.read(document.text)):
            length = rollout.length_BR[b, r] - rollout.stopped_BR[b, r] * len(tokens.close)
            verdicts.append(compose.judge(tokenizer.decode(rollout.thought_BRL[b, r, :length]), line))
    return {kind: verdicts.count(kind) / len(verdicts) for kind in ("right", "backwards", "empty", "other")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--documents", type=int, default=64, help="of three lines, for each length")
    args = parser.parse_args()
    run = load_run(args.run)
    config, model, tokenizer = run.config, run.model, run.tokenizer
    base = load(config.model).params
    tokens = template_tokens(config.template, tokenizer)
    # All lengths have the same shapes, so that each thing is compiled once.
    compiled = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", compiled.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    cap = 2 * LENGTHS[-1] + 6
    print("ops  model    gain   empty  shuffled  accuracy  (plain)  sampled: right backwards  greedy: right backwards")
    for length in LENGTHS:
        source = compose.ComposeSource(SEED, args.documents, (length, length))
        documents = list(source)
        pieces = [piece for document in documents for piece in cut(document, tokenizer, 256)]
        batch = heldout_batches(pieces, len(pieces), len(pieces), 256, tokenizer.pad_id)[0]
        settings = dataclasses.replace(
            config,
            rlp=dataclasses.replace(config.rlp, thought_tokens=cap),
            eval=dataclasses.replace(config.eval, positions=compose.LINES),
        )
        for name, params in (("before", base), ("after", run.params)):
            result = evaluate(model, params, base, [batch], tokens, settings, jax.random.key(SEED))
            shares = [
                procedures(model, params, documents, batch, tokens, tokenizer, temperature, cap)
                for temperature in (config.rlp.temperature, GREEDY)
            ]
            figures = [result[key] for key in ("gain", "gain_empty", "gain_shuffled", "acc_think", "acc_no_think")]
            figures += [share[kind] for share in shares for kind in ("right", "backwards")]
            columns = "{:3d}  {:6s} {:6.2f}  {:6.2f}  {:8.2f}  {:8.2f}  {:7.2f}  {:14.2f} {:9.2f}  {:13.2f} {:9.2f}"
            print(columns.format(length, name, *figures), flush=True)


if __name__ == "__main__":
    main()
