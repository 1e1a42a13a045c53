# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: loss on responses alone, and which examples are left out."""

import io
import json

import jax
import numpy as np
import pytest
from reference import RICH, next_token_loss, relative_error, rough_params
from rich.console import Console
from slow_step import batch_of, recorder, small
from tiny_run import byte_tokenizer, hasty_compilation, tiny_config

from rlp_jax.baselines import cpt, sft
from rlp_jax.config import Config, ConfigError, CPTConfig, DataConfig, SFTConfig
from rlp_jax.data.pipeline import load_documents
from rlp_jax.settings import validate
from rlp_jax.state import init_state
from rlp_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_compiles")


def gradient(algorithm, batch):
    """Of a step: the loss, how many tokens it was the mean of, and the gradient."""
    model, optimizer = small(), recorder(0.1)
    config = Config(cpt=CPTConfig(24), sft=SFTConfig(24))
    step = algorithm.make_step(model, optimizer, RICH, config)
    state, metrics, _ = step.learn(init_state(rough_params(model), optimizer), batch, None)
    return float(metrics["loss"]), float(metrics["tokens"]), state.opt_state


def test_the_loss_is_that_of_responses_alone():
    """By hand: two documents with responses of 2 and 3 tokens, the mean of five."""
    batch = batch_of(16, (6, 7), T=8)
    batch["span_BT"] = np.zeros((2, 8), bool)
    batch["span_BT"][0, 4:6] = batch["span_BT"][1, 2:5] = True
    loss, tokens, grads = gradient(sft, batch)
    wanted, wanted_gradient, count = next_token_loss(small(), rough_params(small()), RICH, batch, batch["span_BT"])
    assert tokens == count == 5
    assert loss == pytest.approx(wanted, rel=1e-5) and relative_error(grads, wanted_gradient) < 1e-5
    assert loss != pytest.approx(gradient(cpt, batch)[0], rel=1e-2)

    changed = dict(batch, tokens_BT=batch["tokens_BT"].copy())
    changed["tokens_BT"][0, 5], changed["tokens_BT"][1, 5:] = 9, 9  # a response's last token; what follows a response
    same = dict(batch, tokens_BT=batch["tokens_BT"].copy())
    same["tokens_BT"][1, 5:] = 9
    assert gradient(sft, same)[0] == pytest.approx(loss, rel=1e-6)
    assert gradient(sft, changed)[0] != pytest.approx(loss, rel=1e-4)


def test_a_document_without_a_response_teaches_nothing():
    batch = batch_of(16, (6, 7), T=8)
    batch["span_BT"] = np.zeros((2, 8), bool)
    loss, tokens, grads = gradient(sft, batch)
    assert loss == tokens == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))


EXAMPLES = (
    ("What is 1+1?", "Two. #### 2"),
    ("What is 2+2? #### 9", "It is four."),  # the prompt's is no answer
    ("What is 3+3?", "Six, as everybody knows who has learnt to count. #### 6"),  # too long
    ("What is 4+4?", "####8"),
    ("And 5+5?", ""),
    ("What is 6+6?", "Twelve. #### 12"),
)


def documents(path, **changes):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in EXAMPLES))
    defaults = {"text": "{question}\n{answer}", "span": "{answer}", "document_tokens": 32, "min_tokens": 4}
    return DataConfig((str(path),), heldout_fraction=0.0, **(defaults | changes))


def test_examples_without_an_answer_are_dropped_and_counted(tmp_path):
    data = documents(tmp_path / "examples.jsonl")
    given = SFTConfig(answer_pattern=r"####\s*\d+$")
    splits = load_documents(data, byte_tokenizer(), 0, examples=given)
    texts = [byte_tokenizer().decode(piece.tokens_T) for piece in splits.train]
    assert texts == ["\n".join(EXAMPLES[i]) for i in (0, 3, 5)]
    assert [byte_tokenizer().decode(piece.tokens_T[piece.span_T]) for piece in splits.train] == [
        EXAMPLES[i][1] for i in (0, 3, 5)
    ]
    counted = ("documents", "without_answer", "too_long", "without_span", "train")
    assert [splits.report[name] for name in counted] == [6, 2, 1, 0, 3]

    anything = load_documents(data, byte_tokenizer(), 0, examples=SFTConfig()).report
    assert [anything[name] for name in counted] == [6, 0, 1, 1, 4]
    assert "without_answer" not in load_documents(data, byte_tokenizer(), 0).report


def test_examples_that_cannot_be_used(tmp_path):
    path = tmp_path / "examples.jsonl"
    with pytest.raises(ConfigError, match=r"examples\.jsonl:1: all of the document is response: say which part is"):
        load_documents(documents(path, span=""), byte_tokenizer(), 0, examples=SFTConfig())
    with pytest.raises(ConfigError, match=r"none of 6 documents is left as a training example: 6 without an answer"):
        load_documents(documents(path), byte_tokenizer(), 0, examples=SFTConfig(answer_pattern=r"\\boxed"))
    with pytest.raises(ConfigError, match=r"sft\.answer_pattern is '\(', no regular expression"):
        validate(tiny_config(tmp_path, algorithm="sft", sft=SFTConfig(answer_pattern="(")))


def test_a_run_says_what_it_dropped(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"{i}+{i}?", "a": f"#{2 * i}" if i % 3 else "many"}) + "\n" for i in range(60))
    )
    data = DataConfig((str(path),), text="{q} {a}", span="{a}", document_tokens=32, min_tokens=4, heldout_fraction=0.2)
    config = tiny_config(tmp_path, algorithm="sft", data=data, steps=3, sft=SFTConfig(64, r"#\d"))
    out = io.StringIO()
    with hasty_compilation(tmp_path / "cache"):
        train(config, tmp_path / "run", Console(file=out))
    assert "without_answer 20" in out.getvalue()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3] and all(0 < row["tokens"] < row["input_tokens"] for row in steps)
