# SPDX-License-Identifier: Apache-2.0
"""Our model in lm-eval against lm-eval's own Hugging Face backend: the same log-likelihoods and the same scores."""

import json

import numpy as np
import pytest
from eight_devices import on_eight_devices

from rlp_jax.checkpoints_io.fetch import local_path
from rlp_jax.checkpoints_io.load import load, save_hf
from rlp_jax.models.presets import WEIGHTS

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'rlp_jax[eval]'")
pytest.importorskip("torch", reason="pip install 'rlp_jax[parity]'")
pytestmark = pytest.mark.parity

NAME = "smollm2-135m-instruct"
SUBJECTS = ("The capital of France", "The opposite of hot", "A triangle", "Water", "The number after nine", "The sun")
ENDINGS = (
    (" is Paris.", " is Rome."), (" is cold.", " is warm."), (" has three sides.", " has five sides."),
    (" freezes at 0 degrees Celsius.", " freezes at 50."), (" is ten.", " is seven."), (" is a star.", " is red."),
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, theirs): the same weights, theirs read from the directory that we write."""
    if local_path(WEIGHTS[NAME]) is None:
        pytest.skip(f"the weights of {NAME} are not on this machine: rlp convert {NAME} DIRECTORY brings them")
    from lm_eval.models.huggingface import HFLM

    from rlp_jax.evals.lm_eval_adapter import RlpLM

    directory = tmp_path_factory.mktemp("smollm2")
    save_hf(directory, *load(NAME))
    # torch's log_softmax over 49,152 float32 logits is 5e-6 too high at every token on CPU, 3e-3 over a text of 640.
    theirs = HFLM(
        pretrained=str(directory), dtype="float32", softmax_dtype="float64", device="cpu", batch_size=4, max_length=256
    )  # fmt: skip
    return RlpLM(NAME, batch_size=4, max_length=256), theirs


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihoods(pair):
    """Continuations of a context, of several tokens and of one; after a space; of no context; and past the window."""
    arguments = [(subject, ending) for subject, both in zip(SUBJECTS, ENDINGS, strict=True) for ending in both]
    arguments += [(f"{subject} ", ending.strip()) for subject, (ending, _) in zip(SUBJECTS, ENDINGS, strict=True)]
    arguments += [("Question: 2 + 2 =\nAnswer:", f" {n}") for n in range(1, 7)]
    arguments += [("", f"{subject}{ending}") for subject, (ending, _) in zip(SUBJECTS, ENDINGS, strict=True)]
    arguments += [("The cat sat on the mat. " * 80, " Then it slept."), ("x" * 900, " é ü 漢字")]
    ours, theirs = pair
    found = ours.loglikelihood(requests("loglikelihood", arguments))
    wanted = theirs.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    assert len(arguments) == 32
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert any(greedy for _, greedy in found) and not all(greedy for _, greedy in found)


def test_rolling_loglikelihoods(pair):
    """Whole texts, one of them over several windows."""
    texts = [("A short text.",), (" ".join(f"The number {n} comes before {n + 1}." for n in range(60)),)]
    ours, theirs = pair
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert len(ours.tok_encode(texts[1][0])) > 2 * ours.max_length
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


def test_generations(pair):
    prompts = ["Q: What is 2 + 2?\nA:", "The capital of France is", "Once upon a time"]
    settings = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}
    ours, theirs = pair
    arguments = [(prompt, settings) for prompt in prompts]
    found = ours.generate_until(requests("generate_until", arguments))
    assert found == theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)


def test_a_task_with_local_data(pair, tmp_path):
    """Multiple choice through the whole harness: the same accuracies, normalised by length and not."""
    rows = [
        {"question": subject, "choices": list(both), "answer": 0}
        for subject, both in zip(SUBJECTS, ENDINGS, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    task = {
        "task": "local_choice", "dataset_path": "json", "dataset_kwargs": files,
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    scores = [
        lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]["local_choice"]
        for model in pair
    ]
    names = [name for name in scores[1] if name.startswith("acc") and "stderr" not in name]
    assert len(names) == 2 and {name: scores[0][name] for name in names} == {name: scores[1][name] for name in names}
    assert scores[0][names[0]] > 0.5


def test_eight_devices_score_as_one_does():
    from rlp_jax.evals.lm_eval_adapter import RlpLM

    texts = [("a b c", " d e"), ("b", " a"), ("c c d d", " a b")]
    asked = [(before, {"until": ["."], "max_gen_toks": 5, "do_sample": False}) for before, _ in texts]
    program = """
        import json, sys
        from lm_eval.api.instance import Instance
        from rlp_jax.evals.lm_eval_adapter import RlpLM

        def requests(kind, arguments):
            return [Instance(kind, {}, tuple(args), i) for i, args in enumerate(arguments)]

        texts, asked = map(json.loads, sys.argv[1:])
        for mesh in (None, "data=2,fsdp=2,tensor=2"):
            model = RlpLM("quickstart", batch_size=3, mesh=mesh)
            scored = model.loglikelihood(requests("loglikelihood", texts))
            said = model.generate_until(requests("generate_until", asked))
            print(json.dumps([model.batch_size, [value for value, _ in scored], said]))
    """
    lines = on_eight_devices(program, json.dumps(texts), json.dumps(asked)).splitlines()[-2:]
    alone = RlpLM("quickstart", batch_size=3)
    values = [value for value, _ in alone.loglikelihood(requests("loglikelihood", texts))]
    said = alone.generate_until(requests("generate_until", asked))
    assert any(said)
    for rows, (batch_size, values_there, said_there) in zip((8, 4), map(json.loads, lines), strict=True):
        assert batch_size == rows and said_there == said
        np.testing.assert_allclose(values_there, values, atol=1e-4)
