# SPDX-License-Identifier: Apache-2.0
"""Regenerates the quickstart's base model: `python -m experiments.pretrain_quickstart` (a few minutes on 2 CPU cores).

Half of what it reads are plain documents, half are documents with one thought before an answer, of mixed quality
(`rlp_jax/data/compose.py`). The two kinds never mix: a thinking document opens with the instruction, so a plain
document leaves no doubt that no thought follows. All thinking documents that share their lines are branches of one
prefix here, which is the same as reading each of them alone, only cheaper.

Prints what the base can and cannot do, then writes a Hugging Face directory to rlp_jax/assets/quickstart.
"""

import argparse
import pathlib
import time

import jax
import numpy as np
import optax

from experiments.tiny_base import PAD, branch_logits, first_params, make_update, save, word_tokenizer
from rlp_jax.data import compose
from rlp_jax.models.transformer import LanguageModel, ModelConfig
from rlp_jax.rollout.engine import sample_thoughts

ASSETS = pathlib.Path(__file__).parents[1] / "rlp_jax" / "assets" / "quickstart"
STEPS = (compose.TRAIN_STEPS[0], compose.LONG_STEPS[1])  # operations a line
TAGS = (compose.OPEN, compose.CLOSE)


TOKENIZER = word_tokenizer(TAGS, compose.WORDS)
(OPEN,), (CLOSE,) = map(TOKENIZER.encode, TAGS)
INSTRUCTION = TOKENIZER.encode(compose.INSTRUCTION)

CONFIG = ModelConfig(
    family="llama", vocab_size=TOKENIZER.vocab_size, d_model=128, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=32,
    d_ff=352, rope_theta=10_000.0, tie_embeddings=True, max_positions=256,
)  # fmt: skip


def batch(rng: np.random.Generator, documents: int, steps: tuple[int, int] = STEPS) -> dict[str, np.ndarray]:
    """Plain documents, and for each of their lines a thinking document's branch.

    Returns tokens_BT (plain), context_BT (instruction + plain), prefix_BR (what a branch sees of its context, up to
    its line's "="), branch_BRS (open, thought, close, answer, "."), all padded to fixed shapes; answer_BR; and
    lines and kinds, the facts behind them.
    """
    longest = compose.LINES * (steps[1] + 4)
    shape = (documents, compose.LINES)
    tokens_BT = np.full((documents, longest), PAD, np.int32)
    branch_BRS = np.full((*shape, 2 * steps[1] + 5), PAD, np.int32)
    prefix_BR, answer_BR = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    every_line, every_kind = [], []
    for b in range(documents):
        lines = compose.random_lines(rng, compose.LINES, steps)
        tokens = []
        for r, (line, (kind, thought)) in enumerate(zip(lines, compose.thinking(rng, lines, steps), strict=True)):
            tokens += TOKENIZER.encode(line.question())
            prefix_BR[b, r] = len(INSTRUCTION) + len(tokens)
            tokens += TOKENIZER.encode(f"{line.answer} .")
            branch = TOKENIZER.encode(f"{compose.OPEN} {thought} {compose.CLOSE} {line.answer} .")
            branch_BRS[b, r, : len(branch)] = branch
            answer_BR[b, r] = TOKENIZER.encode(line.answer)[0]
            every_kind.append(kind)
        tokens_BT[b, : len(tokens)] = tokens
        every_line.append(lines)
    context_BT = np.concatenate([np.broadcast_to(np.int32(INSTRUCTION), (documents, len(INSTRUCTION))), tokens_BT], 1)
    return dict(
        tokens_BT=tokens_BT, context_BT=context_BT, prefix_BR=prefix_BR, branch_BRS=branch_BRS, answer_BR=answer_BR,
        lines=every_line, kinds=np.array(every_kind).reshape(shape),
    )  # fmt: skip


def arrays(data: dict) -> dict:
    return {key: value for key, value in data.items() if key not in ("lines", "kinds")}


def train(model: LanguageModel, steps: int, documents: int, learning_rate: float, seed: int):
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 5), steps, 0.02 * learning_rate)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    params = first_params(model, seed)
    opt_state = optimizer.init(params)
    update = make_update(model, optimizer)
    rng, start = np.random.default_rng(seed), time.time()
    for step in range(1, steps + 1):
        params, opt_state, parts = update(params, opt_state, arrays(batch(rng, documents)))
        if step % 100 == 0 or step == 1:
            plain, thinking = map(float, parts)
            print(
                f"step {step:5d}  plain {plain:.3f}  thinking {thinking:.3f}  {time.time() - start:4.0f} s", flush=True
            )
    return params


def capabilities(model: LanguageModel, params, documents: int = 128, seed: int = 1, temperature: float = 0.7) -> dict:
    """What a model does on fresh lines: see the printed names. Accuracies and shares are fractions, CE is in nats."""
    data = batch(np.random.default_rng((seed, 2**31)), documents)
    logits = np.asarray(jax.jit(lambda p, d: branch_logits(model, p, d))(params, arrays(data)))
    plain = np.asarray(jax.jit(lambda p, d: model.apply(p, d["tokens_BT"])[0])(params, arrays(data)))
    steps_BR = np.array([[len(line.operations) for line in lines] for lines in data["lines"]])
    rows = np.arange(documents)[:, None]
    answer = data["answer_BR"]

    # In a thought of n operations the branch is open, start, op, state, op, state, ..., close, answer.
    s = np.arange(logits.shape[2])
    inside = (s % 2 == 0) & (s > 0) & (s <= 2 * steps_BR[..., None])
    good = (logits.argmax(-1) == data["branch_BRS"][..., 1:]) & inside
    followed = np.isin(data["kinds"], ("right", "backwards"))[..., None]
    out = {"one step, accuracy": (good & followed).sum() / (inside & followed).sum()}

    def score(name, logits_RV, where):
        logprob = np.asarray(jax.nn.log_softmax(logits_RV[where]))
        out[f"{name}, accuracy"] = (logprob.argmax(-1) == answer[where]).mean()
        out[f"{name}, CE"] = -np.take_along_axis(logprob, answer[where][:, None], -1).mean()

    no_thought = plain[rows, data["prefix_BR"] - len(INSTRUCTION) - 1]
    for n in range(STEPS[0], STEPS[1] + 1):
        score(f"answer without a thought, {n} operations", no_thought, steps_BR == n)
    score("answer without a thought", no_thought, steps_BR > 0)
    close = (data["branch_BRS"] == CLOSE).argmax(-1)
    after = np.take_along_axis(logits, close[..., None, None], 2)[:, :, 0]
    for kind in compose.THOUGHT_MIX:
        score(f"answer after a thought: {kind}", after, data["kinds"] == kind)
    out["mass on the opening tag in plain text"] = float(np.asarray(jax.nn.softmax(no_thought))[..., OPEN].mean())
    for label, heat in (("greedy", 1e-4), (f"temperature {temperature}", temperature), ("temperature 1", 1.0)):
        rollout = sample(model, params, data, jax.random.key(seed), heat)
        verdicts = [
            compose.judge(TOKENIZER.decode(thought[: length - stopped]), line)
            for thought, length, stopped, line in zip(
                np.asarray(rollout.thought_BRL).reshape(-1, rollout.thought_BRL.shape[-1]),
                np.asarray(rollout.length_BR).ravel(),
                np.asarray(rollout.stopped_BR).ravel().astype(int),
                (line for lines in data["lines"] for line in lines),
                strict=True,
            )
        ]
        for kind in ("right", "backwards", "empty", "other"):
            out[f"thoughts, {label}: {kind}"] = verdicts.count(kind) / len(verdicts)
        out[f"thoughts, {label}: end by themselves"] = float(np.mean(rollout.stopped_BR))
    return {name: float(value) for name, value in out.items()}


def sample(model: LanguageModel, params, data: dict, key: jax.Array, temperature: float, cap: int = 20):
    @jax.jit
    def run(params, context_BT, prefix_BR, key_BR):
        _, cache = model.hidden(params, context_BT)
        return sample_thoughts(model, params, cache, prefix_BR, (OPEN,), (CLOSE,), key_BR, cap, temperature)

    keys = jax.random.split(key, data["prefix_BR"].shape)
    return run(params, data["context_BT"], data["prefix_BR"], keys)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=32, help="a step, plain and thinking each")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS)
    parser.add_argument("--check", action="store_true", help="only print what the model in --out can do")
    args = parser.parse_args()
    if args.check:
        from rlp_jax.checkpoints_io.load import load

        model, params, _ = load(args.out)
    else:
        model = LanguageModel(CONFIG)
        params = train(model, args.steps, args.documents, args.learning_rate, args.seed)
        save(args.out, model, params, TOKENIZER)
    for name, value in capabilities(model, params).items():
        print(f"{name:55s} {value:.3f}")


if __name__ == "__main__":
    main()
