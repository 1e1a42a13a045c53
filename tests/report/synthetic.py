# SPDX-License-Identifier: Apache-2.0
"""A run directory made up: curves, thoughts and recorded documents of the shapes that a real run writes."""

import dataclasses
import json
import math

import numpy as np

from rlp_jax.config import Config, to_json

WORDS = (" the", " river", " ran", " north", ",", " past", " mills", ".", " Nobody", " counted", " them", "\n")
HOSTILE = (
    "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
    "<svg onload=window.broken=3>{{ 7*7 }}{% raw %}&amp;\"'`${window.broken = 4}\u2028\u2029\u202eabc\u2066"
    "\ud800\x00]]>-->"
)


def metrics_row(step, steps, rng):
    done = step / steps
    return {
        "step": step, "loss": 0.0, "reward_mean": -0.5 + 2 * done + 0.2 * rng.normal(), "reward_std": 1.2 - 0.6 * done,
        "thought_len": 20 - 6 * done + rng.normal(), "stop_rate": 0.6 + 0.35 * done, "entropy": 1.2 * math.exp(-done),
        "clip_fraction": 0.0, "logprob_gap": 1e-6 * (1 + rng.random()), "grad_norm": 2 * math.exp(-done) + rng.random(),
        "kl": 0.0, "finite": 1.0, "sampled_tokens_per_s": 900 + 50 * rng.random(),
        "learner_tokens_per_s": 2500 + 90 * rng.random(), "seconds": 4.0, "seconds_data": 0.1, "seconds_sample": 2.5,
        "seconds_learn": 1.4, "learning_rate": 1e-5, "skipped": 0, "warnings": [],
    }  # fmt: skip


def eval_row(done):
    gain = -0.55 + 2.4 * done
    row = {
        "gain": gain, "gain_empty": -0.4 + 0.2 * done, "gain_shuffled": -1.1 + 0.3 * done,
        "ce_think": 2.2 - 1.9 * done, "ce_no_think": 1.65 + 0.5 * done, "ce_empty": 2.05 + 0.2 * done,
        "ce_shuffled": 2.7 + 0.2 * done, "ce_no_think_policy": 1.65 + 0.6 * done,
        "acc_think": 0.43 + 0.5 * done, "acc_no_think": 0.14,
        "thought_len": 20 - 6 * done, "stop_rate": 0.6 + 0.35 * done, "documents": 64,
    }  # fmt: skip
    row |= {"gain_over_empty": gain - row["gain_empty"], "gain_over_shuffled": gain - row["gain_shuffled"]}
    return row | {f"{key}_ci95": [row[key] - 0.12, row[key] + 0.12] for key in [k for k in row if k.startswith("gain")]}


def thoughts_row(step, document, rng, text="the states on the way: c, a, f"):
    reward_G = rng.normal(size=4) + step / 30
    return {
        "step": step, "document": document, "target": " red",
        "prefix": f"Document {document}. " + "It was a long story. " * 40 + "so it is",
        "s_ema": -2.1,
        "thoughts": [
            {"text": f"{text} ({i})", "reward": float(r), "advantage": float(r - reward_G.mean()), "length": 12 + i,
             "stopped": i != 2} for i, r in enumerate(reward_G)
        ],
    }  # fmt: skip


def thought(rng, tokens, **changes):
    count = len(tokens)
    columns = {name: np.round(rng.normal(size=count), 4).tolist() for name in ("logprob", "ratio_ema", "ratio_sampler")}
    reward = round(float(rng.normal()), 4)
    return {
        "tokens": tokens, "rest": "", "length": count, "stopped": True, "close": 1, "reward": reward,
        "advantage": reward / 2, **columns, **changes,
    }  # fmt: skip


def documents_row(step, document, rng, tokens=20, every=1, group=2):
    """A document of words, a position at every so many of its tokens from the first on that has one before it."""
    text = [WORDS[int(i)] for i in rng.integers(len(WORDS), size=tokens)]
    position = list(range(1, tokens, every))
    gain = np.round(rng.normal(size=len(position)) + step / 40, 4).tolist()
    words = [f" word{document}", " because", "</think>"]
    return {
        "step": step, "document": document, "horizon": 1, "tokens": text, "position": position,
        "trained": [True] * len(position), "s_ema": [-2.0] * len(position), "gain": gain,
        "gain_empty": [0.25] * len(position),
        "thoughts": [[thought(rng, [*words[:-1], f" {t}.{g}", words[-1]]) for g in range(group)] for t in position],
    }  # fmt: skip


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(directory, name="quickstart", steps=60, seed=0, documents=0, **shape):
    """A finished run. documents: so many, recorded before and after."""
    rng = np.random.default_rng(seed)
    directory.mkdir()
    config = dataclasses.replace(Config(), name=name, model="compose-0.6m", steps=steps, batch_documents=32, seed=seed)
    (directory / "config.json").write_text(to_json(config))
    write_rows(directory / "metrics.jsonl", [metrics_row(step, steps, rng) for step in range(1, steps + 1)])
    write_rows(directory / "eval.jsonl", [{"step": step} | eval_row(step / steps) for step in range(0, steps + 1, 10)])
    places = [(step, document) for step in (1, 30, 60) for document in ((7, 8) if step != 60 else (9, 8, 7))]
    write_rows(directory / "thoughts.jsonl", [thoughts_row(step, document, rng) for step, document in places])
    (directory / "summary.json").write_text(json.dumps({"before": eval_row(0), "after": eval_row(1)}))
    if documents:
        before = [documents_row(0, number, rng, **shape) for number in range(documents)]
        after = [documents_row(steps, number, rng, **shape) | {"tokens": row["tokens"]}
                 for number, row in enumerate(before)]  # fmt: skip
        write_rows(directory / "documents.jsonl", [*before, *after])
    return directory
