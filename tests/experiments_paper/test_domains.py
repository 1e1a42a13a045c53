# SPDX-License-Identifier: Apache-2.0
"""The study's corpora: what their documents promise, and that problems are worked out rightly."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest

from experiments.paper import arithmetic, crawl, data_files, domains, pointers, story
from experiments.paper.chains import Chain
from experiments.paper.domains import BENCHMARKS, CORPORA, GENERAL, QA, TOKENIZER


def rng(*seed) -> np.random.Generator:
    return np.random.default_rng(seed or 0)


def texts(corpus: str, count: int = 100) -> list[str]:
    generator = rng(1)
    return [domains.document_text(corpus, generator) for _ in range(count)]


def test_the_corpora_are_two_groups_and_two_areas():
    assert set(QA) | set(GENERAL) == set(CORPORA) and len(CORPORA) == 6
    assert set(domains.MATH) | set(domains.REASONING) == set(BENCHMARKS) == set(CORPORA) - {"crawl"}
    with pytest.raises(KeyError):
        domains.problem("crawl", rng())


@pytest.mark.parametrize("corpus", CORPORA)
def test_documents_are_deterministic_and_within_their_lengths(corpus):
    assert texts(corpus) == texts(corpus) and len(set(texts(corpus))) == 100
    lengths = [len(TOKENIZER.encode(text)) for text in texts(corpus)]
    assert min(lengths) >= 20 and max(lengths) <= domains.DOCUMENT_TOKENS
    generator = rng(2)
    for _ in range(20):
        count = len(TOKENIZER.encode(domains.long_document(corpus, generator).text))
        assert 80 <= count <= domains.LONG_DOCUMENT_TOKENS


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_word_is_a_token(corpus):
    for text in texts(corpus):
        tokens = TOKENIZER.encode(text)
        assert TOKENIZER.pad_id not in tokens and TOKENIZER.decode(tokens) == " ".join(text.split())


@pytest.mark.parametrize("corpus", CORPORA)
def test_marks_and_spans(corpus):
    for text in texts(corpus):
        spans, anywhere = (re.findall(p, text) for p in (domains.SPAN_PATTERN, domains.ANYWHERE_PATTERN))
        lines = text.splitlines()
        assert text.endswith("\n") and len(anywhere) == len(lines)
        if corpus in QA:
            assert len(lines) == domains.LINES[corpus] and spans == anywhere
            assert all(
                line.count("=") == 1 and line.endswith(f"= {span} .") for line, span in zip(lines, spans, strict=True)
            )
        else:
            assert "=" not in text and anywhere == lines


@pytest.mark.parametrize("corpus", CORPORA)
def test_spans_are_the_answers_of_the_problems_in_a_document(corpus):
    generator = rng(4)
    for _ in range(40):
        for write in (domains.document, domains.long_document):
            written = write(corpus, generator)
            spans = [match.start() for match in re.finditer(domains.SPAN_PATTERN, written.text)]
            assert spans == [offset + 1 for offset, _ in written.problems]


@pytest.mark.parametrize("corpus", BENCHMARKS)
def test_documents_hold_their_problems(corpus):
    generator = rng(3)
    for _ in range(20):
        written = domains.document(corpus, generator)
        assert [problem.line() for _, problem in written.problems] == written.text.splitlines()
        for before, problem in written.problems:
            assert written.text[:before].endswith(problem.question)
            assert written.text[before:].startswith(f" {problem.answer} .")


def test_half_of_the_crawl_holds_a_passage_of_the_textbook():
    generator, held = rng(4), 0
    for _ in range(200):
        written = domains.document("crawl", generator)
        for before, problem in written.problems:
            assert written.text[:before].endswith(problem.question) and problem.corpus == "textbook"
            assert written.text[before:].startswith(f" {problem.answer} .")
        held += bool(written.problems)
    assert 70 <= held <= 130


@pytest.mark.parametrize("corpus", BENCHMARKS)
def test_right_thoughts_lead_to_the_answer_and_wrong_ones_by_chance(corpus):
    generator, hits = rng(5), 0
    for _ in range(500):
        problem = domains.problem(corpus, generator)
        assert problem.right.states[-1] == problem.answer and problem.right != problem.wrong
        assert problem.judge(problem.thought) == "right" and problem.judge(problem.wrong.words()) == "wrong"
        for chain in (problem.right, problem.wrong):
            assert len(TOKENIZER.encode(f"{chain.words()} {domains.CLOSE}")) <= domains.THOUGHT_TOKENS
        assert len(TOKENIZER.encode(problem.answer)) == 1
        hits += problem.wrong.states[-1] == problem.answer
    assert hits / 500 < {"story": 0.4}.get(corpus, 0.25)


def test_arithmetic_by_hand():
    operations = (("+", "4"), ("*", "7"), ("-", "5"))
    assert arithmetic.chain("3", operations).words() == "3 + 4 7 * 7 9 - 5 4"
    assert arithmetic.chain("3", operations[::-1]).words() == "3 - 5 8 * 7 6 + 4 0"
    generator = rng(6)
    for _ in range(200):  # from left to right, no operation before another
        words = domains.problem("arithmetic", generator).question.split()[:-1]
        value = int(words[0])
        for symbol, operand in zip(words[1::2], words[2::2], strict=True):
            value = eval(f"({value} {symbol} {operand}) % 10")
        assert domains.split_of(" ".join([*words, "="])) == "train"


def test_the_textbook_says_what_arithmetic_says():
    generator = rng(7)
    for _ in range(100):
        problem = domains.problem("textbook", generator)
        words = problem.question.split()
        assert arithmetic.so_far(words) == (problem.right, problem.wrong)
        told, _ = arithmetic.so_far(words[:9])  # x is 3 . add 4 . times 7
        assert told == Chain(problem.right.states[:2], problem.right.steps[:1])
    assert arithmetic.so_far(["the", "red", "fox"]) == (Chain((), ()), Chain((), ()))


def test_a_walk_follows_the_table():
    generator = rng(8)
    for _ in range(100):
        problem = domains.problem("pointers", generator)
        words = problem.question.split()
        table = dict(word.split(">") for word in words[:7])
        node = words[8]
        for _ in range(int(words[9])):
            node = table[node]
        assert words[7] == "from" and node == problem.answer
        assert problem.wrong.states[0] == words[0][0] != problem.right.states[0] == words[8]


def test_a_story_says_where_its_people_are():
    generator = rng(9)
    for _ in range(100):
        problem = domains.problem("story", generator)
        *sentences, asked = problem.question.split(" . ")
        where = {}
        for who, how, *rest in map(str.split, sentences):
            where[who] = rest[1] if how == "goes" else where[rest[0]]
        assert where[asked.split()[0]] == problem.answer and len(set(where.values())) >= 2
        assert len(problem.right.steps) - 1 in range(story.DEPTH[0], story.DEPTH[1] + 1)
        assert story.last_mover(problem.question.split()) == problem.wrong


def test_noise_keeps_strays_in_order_and_within_its_limit():
    generator = rng(10)
    for _ in range(50):
        text = crawl.interleave(generator, ["x is 3 .", "add 4 ."], 30)
        assert 20 < len(text.split()) <= 30 and text.endswith(".")
        if "add 4 ." in text:
            assert text.index("x is 3 .") < text.index("add 4 .")


def test_thoughts_are_mixed_as_said():
    generator = rng(11)
    mass = Counter()
    for _ in range(2000):
        corpus = BENCHMARKS[generator.integers(len(BENCHMARKS))]
        problem = domains.problem(corpus, generator)
        for kind, chain, share in domains.mixed_thoughts(generator, problem):
            mass[kind] += share
            assert len(TOKENIZER.encode(chain.words())) < domains.THOUGHT_TOKENS
            if kind in ("right", "wrong", "empty"):
                assert problem.judge(chain.words()) == kind
    for kind, share in domains.THOUGHT_MIX.items():
        assert abs(mass[kind] / 2000 - share) < 0.02


def test_thoughts_at_ordinary_places_work_out_what_is_told():
    generator = rng(12)
    before = "Ann goes to hall . Bob follows Ann . Cid"
    thoughts = [domains.ordinary_thought(generator, "story", before) for _ in range(200)]
    assert {(kind, chain.words()) for kind, chain in thoughts} == {
        ("empty", ""),
        ("told", "Bob follows Ann goes to hall"),
    }
    kinds = Counter(domains.ordinary_thought(generator, "crawl", "the red fox")[0] for _ in range(200))
    assert set(kinds) == {"empty", "irrelevant"} and 60 < kinds["empty"] < 140


def test_splits_are_as_large_as_said():
    generator = rng(13)
    splits = Counter(domains.split_of(pointers.pointers(generator).question) for _ in range(4000))
    assert abs(splits["test"] / 4000 - 1 / 16) < 0.015 and abs(splits["validation"] / 4000 - 1 / 16) < 0.015


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All files, few records each."""
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "DOCUMENTS", 60)
        patch.setattr(data_files, "LONG_DOCUMENTS", 20)
        patch.setattr(data_files, "PROBLEMS", {name: (split, 40) for name, (split, _) in data_files.PROBLEMS.items()})
        patch.setattr(data_files, "SFT_EXAMPLES", 40)
        domains.write_data(path / "first")
        domains.write_data(path / "again")
        domains.write_data(path / "other", seed=1)
    return path


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_depend_on_the_seed_alone(folder):
    def digests(name):
        files = sorted((folder / name).rglob("*.jsonl"))
        return {str(file.relative_to(folder / name)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    first, other = digests("first"), digests("other")
    assert first == digests("again") and len(first) == 2 * 6 + 3 * 5 + 1
    assert first.keys() == other.keys() and not set(first.values()) & set(other.values())


def test_no_examined_question_stands_in_any_other_file(folder):
    first = folder / "first"
    lines = [
        line
        for path in sorted(first.glob("corpora*/*.jsonl"))
        for record in records(path)
        for line in record["text"].splitlines()
    ]
    read = {line.partition("=")[0] + "=" for line in lines if "=" in line}
    general = "\n".join(line for line in lines if "=" not in line)
    sft = {record["question"] for record in records(first / "sft.jsonl")}
    for corpus in BENCHMARKS:
        asked = {
            name: {r["question"] for r in records(first / name / f"{corpus}.jsonl")} for name in data_files.PROBLEMS
        }
        assert all(len(questions) == 40 for questions in asked.values())
        assert not asked["problems_test"] & asked["problems_validation"]
        for name in ("problems_test", "problems_validation"):
            assert not asked[name] & asked["problems"] and not asked[name] & sft
            assert not asked[name] & read and not any(question in general for question in asked[name])


def test_examples_for_sft_parse(folder):
    examples = records(folder / "first" / "sft.jsonl")
    assert Counter(example["corpus"] for example in examples) == {"arithmetic": 40, "compose": 40}
    right = 0
    for example in examples:
        match = re.fullmatch(r"Think first \. (.* =) <think> (.*) </think> (\S+) \.", example["text"])
        assert match.groups() == (example["question"], example["thought"], example["answer"])
        assert example["text"].endswith(example["response"]) and TOKENIZER.pad_id not in TOKENIZER.encode(
            example["text"]
        )
        right += example["thought"].split()[-1] == example["answer"]
    assert right >= 60
