# SPDX-License-Identifier: Apache-2.0
"""A model sits the study's five benchmarks: `python -m experiments.paper.examine MODEL --data FOLDER`.

A response to a problem is a thought and an answer, asked for as in training: the instruction, the question up to its
answer, the opening tag, then what the model says to its first full stop. It is right if the answer stands between the
closing tag and the full stop. Beside it the answer without a thought: the likeliest word after the plain question.

    greedy   the likeliest response to each problem
    pass1    mean over `SAMPLES` responses at `TEMPERATURE`
    plain    without a thought

Each with its standard error over problems (`greedy_se`, ...), of pass1 that of the problems' means.
"""

import argparse
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paper.configs import RESPONSE_TOKENS, TEMPLATE
from experiments.paper.configs import rlvr as rlvr_config
from experiments.paper.domains import BENCHMARKS
from rlp_jax.baselines import rlvr
from rlp_jax.checkpoint import LoadedRun, load_run
from rlp_jax.checkpoints_io.load import Loaded, load, save_hf
from rlp_jax.config import ConfigError
from rlp_jax.data.documents import stable_hash
from rlp_jax.data.sources import read_records
from rlp_jax.data.template import template_tokens
from rlp_jax.evals.generation import GREEDY, Decoder, decode, padded
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.settings import is_run

SPLITS = ("validation", "test")
SAMPLES = 4
TEMPERATURE = 0.7
PROBLEMS = 256  # of each benchmark, if not said otherwise
ROWS = 64  # problems decoded together
SEED = 0


def examine(
    source: str | Path | Loaded | LoadedRun,
    folder: Path,
    split: str,
    limit: int = PROBLEMS,
    benchmarks: Sequence[str] = BENCHMARKS,
) -> dict[str, dict[str, float]]:
    """Scores by benchmark, shares between 0 and 1.

    Args:
      source: a Hugging Face directory, a run directory, or a model read from either.
      folder: of the study's data.
      split: of SPLITS.
      limit: the first so many problems of each benchmark.
      benchmarks: of `domains.BENCHMARKS`.

    Returns:
      {benchmark: {"pass1", "pass1_se", "greedy", "greedy_se", "plain", "plain_se"}}.

    Raises:
      ConfigError: no such problems, or an answer of several tokens.
    """
    loaded = read_model(source) if isinstance(source, str | Path) else source
    model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
    tokens = template_tokens(TEMPLATE, tokenizer)
    settings, scores = rlvr_config().rlvr, {}
    for benchmark in benchmarks:
        problems = read_problems(folder, benchmark, split)[:limit]
        questions = [tokenizer.encode(question) for question, _ in problems]
        answers = [tokenizer.encode(answer) for _, answer in problems]
        if any(len(answer) != 1 for answer in answers):
            raise ConfigError(f"{benchmark}: an answer is not one token, and cannot be told without a thought")
        prompts = [[*tokens.context, *question, *tokens.open] for question in questions]
        ids = [stable_hash("problem", question) >> 33 for question, _ in problems]

        def right(temperature, samples, prompts=prompts, ids=ids, problems=problems):
            decoder = Decoder(model, params, RESPONSE_TOKENS, temperature, None, tokens.end, ROWS)
            responses = decode(decoder, prompts, ids, samples, jax.random.key(SEED))
            return [
                np.mean([rlvr.exact(tokenizer.decode(sampled.tokens), answer, settings) for sampled in of_problem])
                for of_problem, (_, answer) in zip(responses, problems, strict=True)
            ]

        guesses = without_thought(model, params, [[*tokens.plain, *question] for question in questions])
        shares = {
            "pass1": right(TEMPERATURE, SAMPLES),
            "greedy": right(GREEDY, 1),
            "plain": [float(guess == answer) for guess, (answer,) in zip(guesses, answers, strict=True)],
        }
        scores[benchmark] = {}
        for name, share in shares.items():
            scores[benchmark] |= {name: float(np.mean(share)), f"{name}_se": standard_error(share)}
    return scores


def read_model(path: str | Path) -> Loaded | LoadedRun:
    """Of a Hugging Face directory or a run directory."""
    return load_run(Path(path), ("params",)) if is_run(Path(path)) else load(path)


def read_problems(folder: Path, benchmark: str, split: str) -> list[tuple[str, str]]:
    """(question, answer) of each problem.

    Raises:
      ConfigError: no such file, or it is none of problems.
    """
    path = Path(folder) / f"problems_{split}" / f"{benchmark}.jsonl"
    if not path.is_file():
        raise ConfigError(f"no file {path}: the study's driver writes the data")
    problems = []
    for record, place in read_records(path):
        if not {"question", "answer"} <= set(record):
            raise ConfigError(f"{place}: no question and answer")
        problems.append((record["question"], record["answer"]))
    return problems


def without_thought(model: LanguageModel, params: Params, prompts: list[list[int]]) -> list[int]:
    """The likeliest token after each of these plain beginnings."""
    guesses = []
    for start in range(0, len(prompts), ROWS):
        batch = prompts[start : start + ROWS]
        tokens_BT = np.zeros((ROWS, padded(max(map(len, batch)))), np.int32)
        for row, prompt in enumerate(batch):
            tokens_BT[row, : len(prompt)] = prompt
        last_B = np.array([len(prompt) - 1 for prompt in batch] + [0] * (ROWS - len(batch)), np.int32)
        guesses += np.asarray(_likeliest(model, params, tokens_BT, last_B))[: len(batch)].tolist()
    return guesses


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(model: LanguageModel, params: Params, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
    hidden_BTD, _ = model.hidden(params, tokens_BT)
    return jnp.argmax(model.unembed(params, hidden_BTD[jnp.arange(len(last_B)), last_B]), -1)


def standard_error(share: list[float]) -> float:
    """Of the mean over problems; 0 of a single one."""
    return float(np.std(share, ddof=1) / len(share) ** 0.5) if len(share) > 1 else 0.0


def save_weights(loaded: Loaded | LoadedRun, directory: Path) -> None:
    """Writes a Hugging Face directory in place of what is there: all of it or nothing."""
    partial = directory.with_name(f"{directory.name}.part")
    for path in (partial, directory):
        shutil.rmtree(path, ignore_errors=True)
    save_hf(partial, loaded.model, loaded.params, loaded.tokenizer)
    os.replace(partial, directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory or run directory")
    parser.add_argument("--data", type=Path, required=True, help="folder of the study's data")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of each benchmark")
    parser.add_argument("--weights", type=Path, help="keep the model's weights as this Hugging Face directory")
    parser.add_argument("--out", type=Path, help="write the scores to this JSON file, all of it or nothing")
    args = parser.parse_args()
    try:
        loaded = read_model(args.model)
        if args.weights:
            save_weights(loaded, args.weights)
        scores = examine(loaded, args.data, args.split, args.problems)
    except (ValueError, OSError) as error:
        parser.exit(2, f"examine: {' '.join(str(error).split())}\n")
    if args.out:
        partial = args.out.with_name(f"{args.out.name}.part")
        partial.write_text(json.dumps(scores) + "\n")
        os.replace(partial, args.out)
    for benchmark, values in scores.items():
        figures = "  ".join(
            f"{name} {values[name]:.3f} ± {values[f'{name}_se']:.3f}" for name in values if "_" not in name
        )
        print(f"{benchmark:12s} {figures}")


if __name__ == "__main__":
    main()
