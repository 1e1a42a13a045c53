# SPDX-License-Identifier: Apache-2.0
"""`rlp data`: looks through documents, measures how fast they come, and writes them as a dataset."""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

from rlp_jax.config import Config, ConfigError, DataConfig
from rlp_jax.data.filters import KEPT, REASONS, Filtered

SHOWN = 3  # of each reason
BATCHES = 50  # that are timed


def _settings(args: argparse.Namespace) -> Config:
    from rlp_jax.settings import load_experiment, override

    config = load_experiment(args.experiment, args.arguments) if args.experiment else Config()
    config = override(config, args.overrides)
    if args.sources:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=tuple(args.sources)))
    return config if args.model is None else dataclasses.replace(config, model=args.model)


class Bytes:
    """Stands in for a tokenizer where none is named: a token a byte."""

    pad_id = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        pairs = [(byte, (i, i + 1)) for i, character in enumerate(text) for byte in character.encode()]
        return [byte for byte, _ in pairs], [place for _, place in pairs]


def _tokenizer(config: Config):
    if not config.model:
        return Bytes()
    from rlp_jax.checkpoints_io.load import open_model

    return open_model(config.model, config.compute_dtype)[1]


def _load(config: Config, data: DataConfig):
    from rlp_jax.data.pipeline import load_documents

    examples = config.sft if config.algorithm == "sft" else None
    questions = config.algorithm == "rlvr"
    mode = config.rlp.position_mode
    return load_documents(data, _tokenizer(config), config.seed, mode, examples=examples, questions=questions)


def check(args: argparse.Namespace) -> int:
    config = _settings(args)
    data = dataclasses.replace(config.data, malformed="skip")
    if not config.model:
        data = dataclasses.replace(data, document_tokens=2**31 - 1, min_tokens=1)
    splits = _load(config, data)
    if args.out is not None:
        splits.filtered.save(args.out)
    counts = {name: count for name, count in splits.report.items() if config.model or not name.endswith("_tokens")}
    print("\n".join(f"{count:12,d} {name}" for name, count in counts.items()))
    print(describe(splits.filtered))
    if not config.model:
        print("lengths in tokens were not looked at: name --model or --experiment")
    if args.out is not None:
        print(f"list: {args.out}")
    if args.json:
        print(json.dumps({"report": counts, "filtered": dict(splits.filtered.counts)}))
    return 1 if splits.filtered.counts["malformed"] + splits.filtered.counts["encoding"] else 0


def describe(filtered: Filtered) -> str:
    """Counts by reason with a few entries of each, for a reader."""
    shown: dict[str, list[dict]] = {}
    for entry in filtered:
        if len(shown.setdefault(entry["reason"], [])) < SHOWN:
            shown[entry["reason"]].append(entry)
    lines = []
    for reason, meaning in REASONS.items():
        if reason not in shown:
            continue
        lines.append(f"\n{filtered.counts[reason]:,d} {meaning}")
        for entry in shown[reason]:
            parts = [entry["place"], entry["detail"], repr(entry["text"]) if entry["text"] else ""]
            lines.append("    " + ": ".join(part for part in parts if part))
        if filtered.counts[reason] > SHOWN:
            lines.append(f"    and {filtered.counts[reason] - SHOWN:,d} more")
    dropped = sum(count for reason, count in filtered.counts.items() if reason not in KEPT)
    return "\n".join([*lines, f"\n{dropped:,d} left out" if dropped else "\nnothing left out"])


def bench(args: argparse.Namespace) -> int:
    from rlp_jax.data.pipeline import mixture, train_batches

    config = _settings(args)
    batch = args.batch or config.batch_documents
    began = time.perf_counter()
    splits = _load(config, config.data)
    read_s = time.perf_counter() - began
    documents, tokens = splits.report["documents"], splits.report["train_tokens"] + splits.report["heldout_tokens"]
    result = {"documents": documents, "read_documents_per_s": documents / read_s, "read_tokens_per_s": tokens / read_s}
    batches = train_batches(
        splits.train, batch, config.data.document_tokens, 0, config.seed,
        mixture=mixture(config.data, splits.parts), prefetch=config.data.prefetch,
    )  # fmt: skip
    next(batches)
    began = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    result["loader_documents_per_s"] = BATCHES * batch / (time.perf_counter() - began)
    counted = "tokens" if config.model else "bytes"
    print(
        f"reading, once before the first step: {documents:,d} documents in {read_s:.1f} s, {documents / read_s:,.0f} "
        f"documents/s, {tokens / read_s:,.0f} {counted}/s with data.workers={config.data.workers}"
    )
    print(f"loading, every step: {result['loader_documents_per_s']:,.0f} documents/s in batches of {batch}")
    if args.run_dir is not None:
        result["step_documents_per_s"] = appetite(args.run_dir)
        times = result["loader_documents_per_s"] / result["step_documents_per_s"]
        print(
            f"the steps of {args.run_dir} take {result['step_documents_per_s']:,.1f} documents/s (median): the loader "
            f"gives {times:,.1f} times that"
        )
    if args.json:
        print(json.dumps(result))
    return 0


def appetite(run_dir: Path) -> float:
    """Documents a second that the steps of a run take, the median over them.

    Raises:
      ConfigError: the run has logged no step.
    """
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rates = [row["step_documents_per_s"] for row in map(json.loads, lines) if row.get("step_documents_per_s")]
    if not rates:
        raise ConfigError(f"{file} holds no step with step_documents_per_s: train a few steps first")
    return statistics.median(rates)


def build(args: argparse.Namespace) -> int:
    from rlp_jax.data.rlp_documents import build

    config = _settings(args)
    directory, count, filtered = build(args.name, config.data, args.data_dir, config.seed)
    if filtered.counts:
        print(describe(filtered))
    print(f"{count:,d} documents in {directory}: TFDS_DATA_DIR={args.data_dir} and "
          f"data.sources=tfds:rlp_documents/{args.name}:train read them")  # fmt: skip
    if args.json:
        print(json.dumps({"directory": str(directory), "documents": count, "filtered": dict(filtered.counts)}))
    return 0
