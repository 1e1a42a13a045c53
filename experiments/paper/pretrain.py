# SPDX-License-Identifier: Apache-2.0
"""Makes the study's bases: `python -m experiments.paper.pretrain decoder decoder_early decoder_late --out DIR`.

`decoder` is the quickstart's decoder on the study's vocabulary, `hybrid` a Nemotron-H of about its size. All decoders
are of one run: its rate is constant after the warm-up, and each base ends with a branch of its own where the rate falls
to zero over the last fifth of the base's steps. Asked for together they share the trunk; each alone comes out the same.

Weights are kept in bfloat16, rounded once, so that what is measured is what is loaded. `--check` prints what the bases
in DIR can do, `--record FILE` keeps that as JSON.
"""

import argparse
import json
import pathlib
import time

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from experiments.paper.abilities import abilities, progress
from experiments.paper.batches import arrays, repeats, training_batch
from experiments.paper.domains import TOKENIZER
from experiments.tiny_base import first_params, make_update, save
from rlp_jax.checkpoints_io.load import load
from rlp_jax.models.mamba2 import HybridConfig
from rlp_jax.models.transformer import LanguageModel, ModelConfig

DECODER = ModelConfig(
    family="llama", vocab_size=TOKENIZER.vocab_size, d_model=128, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=32,
    d_ff=352, rope_theta=10_000.0, tie_embeddings=True, max_positions=256,
)  # fmt: skip
HYBRID = ModelConfig(
    family="nemotron_h", vocab_size=TOKENIZER.vocab_size, d_model=128, n_layers=8, n_heads=4, n_kv_heads=4, head_dim=32,
    d_ff=256, rope_theta=None, tie_embeddings=False,
    hybrid=HybridConfig("M*-M*-M-", heads=8, head_dim=32, state_size=32, groups=2, chunk_size=64),
)  # fmt: skip

REPEATS, REPEATED_DOCUMENTS = 300, 32  # steps on repeated words, before all others, and documents each
STEPS = 1600  # of `decoder` and `hybrid`, after those
# base: its model, and its steps relative to STEPS
BASES = {
    "decoder": (DECODER, 1.0),
    "hybrid": (HYBRID, 1.0),
    "decoder_early": (DECODER, 0.5),
    "decoder_late": (DECODER, 2.0),
}
PLAIN_WEIGHT = 0.2  # of the loss on plain documents, most of which cannot be known
WARM_UP = 100
DECAY = 0.2  # of a base's steps
RATE = 4e-3
DOCUMENTS = 18  # a step, of up to 40 tokens
SEED = 0


def train(
    config: ModelConfig,
    ends: dict[str, int],
    rate: float = RATE,
    documents: int = DOCUMENTS,
    repeated: int = REPEATS,
    seed: int = SEED,
):
    """One run; yields (name, model, params) for each base as its branch ends, the shortest first.

    Args:
      ends: base: its steps, the fall of the rate included.
      repeated: steps on repeated words before them.
    """
    model = LanguageModel(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(_muon)(learning_rate=rate))
    update, start = make_update(model, optimizer, PLAIN_WEIGHT), time.time()
    say = progress(model)

    def advance(state, first, last, end=None):
        params, opt_state = state
        for step in range(first, last):
            opt_state[1].hyperparams["learning_rate"] = jax.numpy.float32(rate * factor(step, end))
            params, opt_state, parts = update(params, opt_state, arrays(training_batch(seed, step, documents)))
            if (step + 1) % 100 == 0:
                plain, thinking = map(float, parts)
                print(
                    f"step {step + 1:5d}  plain {plain:.3f}  thinking {thinking:.3f}  {time.time() - start:4.0f} s  "
                    f"step/answer: {say(params)}",
                    flush=True,
                )
        return params, opt_state

    params = first_params(model, seed)
    opt_state = optimizer.init(params)
    for step in range(repeated):
        opt_state[1].hyperparams["learning_rate"] = jax.numpy.float32(rate * factor(step, None))
        params, opt_state, (loss, _) = update(params, opt_state, repeats(seed, step, REPEATED_DOCUMENTS))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d} of repeated words {loss:.3f}  {time.time() - start:4.0f} s", flush=True)
    trunk, done = (params, opt_state), 0
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        falls = round(end * (1 - DECAY))
        trunk, done = advance(trunk, done, falls), falls
        yield name, model, advance(jax.tree.map(lambda x: x, trunk), falls, end, end)[0]


def _muon(learning_rate) -> optax.GradientTransformation:
    """Muon for the kernels, Adam for embeddings, norms and convolutions; both with the rate of an Adam."""
    return muon(
        learning_rate, weight_decay=0.05, adam_b2=0.98, adam_weight_decay=0.05, muon_weight_dimension_numbers=_axes,
        consistent_rms=0.2,
    )  # fmt: skip


def _axes(params):
    """For each kernel of a stack of layers which axes are its inputs and its outputs; None for what Adam updates."""

    def axes(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        if names[-1] != "kernel" or "conv" in names or leaf.ndim < 3:
            return None
        return MuonDimensionNumbers((1, 2), 3) if names[-2] == "o" else MuonDimensionNumbers(1, (*range(2, leaf.ndim),))

    return jax.tree_util.tree_map_with_path(axes, params)


def factor(step: int, end: int | None) -> float:
    """The rate at a step (from 0), relative to its highest; `end` is the branch's, None on the trunk."""
    rising = min(1.0, (step + 1) / WARM_UP)
    return rising if end is None else min(rising, (end - step) / (DECAY * end))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=BASES, metavar="NAME", help=", ".join(BASES))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a base goes to its subdirectory NAME")
    parser.add_argument("--steps", type=int, default=STEPS, help="of `decoder`; the others follow")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--check", action="store_true", help="train nothing")
    parser.add_argument("--record", type=pathlib.Path, help="keep what is printed as JSON")
    args = parser.parse_args(argv)
    if not args.check:
        for config in (DECODER, HYBRID):
            ends = {name: round(args.steps * BASES[name][1]) for name in args.names if BASES[name][0] == config}
            for name, model, params in train(config, ends, args.rate):
                save(args.out / name, model, params, TOKENIZER, "bfloat16")
                print(f"{args.out / name}: {ends[name]} steps", flush=True)
    record = {}
    for name in args.names:
        model, params, _ = load(args.out / name)
        record[name] = abilities(model, params)
        for corpus, values in record[name].items():
            print(f"\n{name}, {corpus}")
            for what, value in values.items():
                print(f"{what:55s} {value:.3f}")
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
