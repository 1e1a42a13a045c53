# SPDX-License-Identifier: Apache-2.0
"""The study's files: `python -m experiments.paper.data_files FOLDER`.

    corpora/NAME.jsonl                documents of 24 to 40 tokens: {"text"}
    corpora_long/NAME.jsonl           documents of up to 128 tokens: {"text"}
    problems/NAME.jsonl               {"question", "answer", "thought"}, for RLVR
    problems_validation/NAME.jsonl    for choosing learning rates
    problems_test/NAME.jsonl          for results
    sft.jsonl                         {"corpus", "question", "thought", "answer", "response", "text"}

No question of the validation or test files stands in any other file, and none comes twice in one.
"""

import argparse
import json
import pathlib
import zlib

import numpy as np

from experiments.paper import domains

DOCUMENTS = 4096  # a corpus
LONG_DOCUMENTS = 1280
PROBLEMS = {"problems": ("train", 4096), "problems_validation": ("validation", 256), "problems_test": ("test", 512)}
SFT_EXAMPLES = 2048  # of each of SFT_CORPORA
SFT_CORPORA = ("arithmetic", "compose")
SFT_WRONG = 0.1  # of the thoughts


def write_data(folder: pathlib.Path, seed: int = 0) -> None:
    """Writes all files of this module; the same seed gives the same bytes."""
    for corpus in domains.CORPORA:
        rng = _generator(seed, "corpora", corpus)
        _write(
            folder / "corpora" / f"{corpus}.jsonl",
            ({"text": domains.document_text(corpus, rng)} for _ in range(DOCUMENTS)),
        )
        rng = _generator(seed, "corpora_long", corpus)
        _write(
            folder / "corpora_long" / f"{corpus}.jsonl",
            ({"text": domains.long_document(corpus, rng).text} for _ in range(LONG_DOCUMENTS)),
        )
    for name, (split, count) in PROBLEMS.items():
        for corpus in domains.BENCHMARKS:
            items = distinct_problems(corpus, split, count, _generator(seed, name, corpus))
            _write(
                folder / name / f"{corpus}.jsonl",
                ({"question": item.question, "answer": item.answer, "thought": item.thought} for item in items),
            )
    rng = _generator(seed, "sft", "")
    examples = [
        sft_example(item, rng)
        for corpus in SFT_CORPORA
        for item in distinct_problems(corpus, "train", SFT_EXAMPLES, rng)
    ]
    _write(folder / "sft.jsonl", (examples[k] for k in rng.permutation(len(examples))))


def distinct_problems(corpus: str, split: str, count: int, rng: np.random.Generator) -> list[domains.Problem]:
    items: dict[str, domains.Problem] = {}
    while len(items) < count:
        item = domains.problem(corpus, rng, split)
        items.setdefault(item.question, item)
    return list(items.values())


def sft_example(item: domains.Problem, rng: np.random.Generator) -> dict[str, str]:
    """A worked example; a share of SFT_WRONG of the thoughts follow the wrong procedure, the answer is always true.

    `text` is the instruction, the question and `response`: the thought between its tags, the answer and a full stop.
    """
    chain = item.wrong if rng.random() < SFT_WRONG else item.right
    response = f"{domains.OPEN} {chain.words()} {domains.CLOSE} {item.answer} ."
    return {
        "corpus": item.corpus,
        "question": item.question,
        "thought": chain.words(),
        "answer": item.answer,
        "response": response,
        "text": f"{domains.INSTRUCTION} {item.question} {response}",
    }


def _generator(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng((seed, *(zlib.crc32(name.encode()) for name in names)))


def _write(path: pathlib.Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.folder, args.seed)


if __name__ == "__main__":
    main()
