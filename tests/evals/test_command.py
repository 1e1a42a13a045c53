# SPDX-License-Identifier: Apache-2.0
"""`rlp eval`: what it prints, what it writes, and that bad input is one line and exit code 2."""

import dataclasses
import json
import re
import shutil

import pytest
from eight_devices import on_eight_devices
from tiny_run import LLAMA, hasty_compilation, tiny_config, write_documents, write_model

from rlp_jax.checkpoint import Checkpoints, Position
from rlp_jax.checkpoints_io.load import load
from rlp_jax.cli import main
from rlp_jax.config import Config, ConfigError, MeshConfig, SuiteConfig, to_json
from rlp_jax.evals.command import resolved
from rlp_jax.evals.devices import mesh_for
from rlp_jax.optimizer import make_optimizer
from rlp_jax.settings import from_json
from rlp_jax.state import init_state

pytestmark = pytest.mark.slow

ROWS = [{"question": f"What is {n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(3)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    write_model(root / "model", dataclasses.replace(LLAMA, max_positions=1024))
    (root / "mmlu_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = tiny_config(root)  # its model is the one above
    (root / "run").mkdir()
    (root / "run" / "config.json").write_text(to_json(config))
    state = init_state(load(config.model).params, make_optimizer(config.optimizer, 1))
    state.params["final_norm"]["scale"] *= 2.0
    (root / "documents.jsonl").write_text("".join(json.dumps({"text": f"{n} abcd cdab {n}"}) + "\n" for n in range(5)))
    with Checkpoints(root / "run", config.checkpoint) as checkpoints:
        checkpoints.save(state, Position({}, {}, {}, ""))
    with hasty_compilation(root / "cache"):
        yield root


def evaluated(capsys, *args):
    assert main(["eval", *map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), out, err


def test_a_benchmark(root, tmp_path, capsys):
    arguments = (root / "model", "--tasks", "mmlu", "--data", root, "--shots", 0, "--max-tokens", 4, "--out", tmp_path)
    result, out, err = evaluated(capsys, *arguments, "--limit", 2)
    assert result["tasks"]["mmlu"]["problems"] == 2 and result["tasks"]["mmlu"]["pass@1"] is None
    assert result["science_avg"] is None and result["out"] == str(tmp_path)
    assert out.startswith("mmlu: 2 problems, greedy ") and "mmlu: 2 of 2" in err
    more, _, err = evaluated(capsys, *arguments)
    assert more["tasks"]["mmlu"]["problems"] == 3 and err == "mmlu: 3 of 3\n"
    again, _, err = evaluated(capsys, *arguments)
    assert again == more and err == ""


def test_a_run_and_its_average(root, capsys, monkeypatch):
    arguments = (root / "run", "--tasks", "perplexity", "--data", root / "documents.jsonl", "--positions", 2)
    of_policy, out, _ = evaluated(capsys, *arguments)
    of_average, _, _ = evaluated(capsys, *arguments, "--ema")
    assert of_policy["out"] == str(root / "run" / "evals" / "0") and of_average["out"] == of_policy["out"] + "-ema"
    policy, average = of_policy["tasks"]["perplexity"], of_average["tasks"]["perplexity"]
    assert policy["documents"] == 5 and policy["thought_len"] <= 5  # the run's own cap
    assert policy["ppl_no_think"] == average["ppl_no_think"] == average["ppl_no_think_policy"]
    assert policy["ppl_no_think_policy"] != policy["ppl_no_think"] and "perplexity of 5 documents" in out
    assert "math_avg" not in of_policy


def test_where_a_run_gains(root, tmp_path, capsys):
    run = shutil.copytree(root / "run", tmp_path / "run")  # on other documents, some of them held out
    config = from_json((run / "config.json").read_text(), "")
    data = dataclasses.replace(config.data, sources=(str(write_documents(tmp_path / "text.jsonl")),))
    (run / "config.json").write_text(to_json(dataclasses.replace(config, data=data)))
    arguments = (run, "--tasks", "gain", "--positions", 2, "--position-mode", "uniform", "--samples", 2)
    rows = [{"step": n, "thought_len": 4.0 if n < 7 else 0.5, "stop_rate": 0.5} for n in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out, out, err = evaluated(capsys, *arguments)
    gain = held_out["tasks"]["gain"]
    assert gain["documents"] == 4 and gain["positions"] == 8 and gain["scored_tokens"] == 16  # eval.documents
    assert gain["gain"] == pytest.approx(gain["format"] + gain["generic"] + gain["content"], abs=1e-12)
    assert [(spell["kind"], spell["first"]) for spell in gain["warnings"]] == [("thought_length", 7)]
    assert "alarm of the run, steps 7 to 8: thoughts have shrunk" in out and "batch 1 of 1" in err
    records = (run / "evals" / "0" / "gain.jsonl").read_text().splitlines()
    assert len(records) == 9 and json.loads(records[0])["settings"]["rlp"]["position_mode"] == "uniform"
    assert evaluated(capsys, *arguments)[0] == held_out
    # A file, and classes of one's own.
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"letters": "[abcd]+"}))
    of_file, _, _ = evaluated(
        capsys, *arguments, "--data", root / "documents.jsonl", "--classes", classes, "--out", tmp_path, "--limit", 3
    )
    gain = of_file["tasks"]["gain"]
    assert gain["documents"] == 3
    assert "letters" in {row["label"] for row in gain["where"]["class"]} <= {"letters", "number", "space"}


def test_thinking_takes_the_runs_template(root, tmp_path, capsys):
    arguments = ("--tasks", "mmlu", "--data", root, "--shots", 0, "--max-tokens", 4, "--think", "--limit", 1)
    evaluated(capsys, root / "run", *arguments, "--out", tmp_path)
    head, record = (json.loads(line) for line in (tmp_path / "mmlu.jsonl").read_text().splitlines())
    assert head["settings"]["thought_tokens"] == 5 and record["greedy"]["thought_tokens"] <= 5


def test_eight_devices_say_what_one_does(root, tmp_path, capsys):
    """Weights and documents over a mesh: the same responses, and figures that differ by rounding."""
    on_files = ["--tasks", "perplexity", "--data", str(root / "documents.jsonl"), "--positions", "2"]
    on_problems = ["--tasks", "mmlu", "--data", str(root), "--shots", "1", "--max-tokens", "4", "--samples", "2"]
    wanted = {task: evaluated(capsys, root / "run", *arguments, "--out", tmp_path / "one")[0]["tasks"][task]
              for task, arguments in (("perplexity", on_files), ("mmlu", on_problems))}  # fmt: skip
    program = """
        import json, sys
        import jax
        from rlp_jax.cli import main
        from rlp_jax.evals import command

        mesh, *runs = sys.argv[1:]
        plain = command.fingerprint

        def fingerprint(params):
            print({leaf.sharding.num_devices for leaf in jax.tree.leaves(params)})
            return plain(params)

        command.fingerprint = fingerprint
        for arguments in map(json.loads, runs):
            main(["eval", *arguments, "--json", "--mesh", mesh])
    """
    out = tmp_path / "eight"
    runs = [json.dumps([str(root / "run"), *arguments, "--out", str(out)]) for arguments in (on_files, on_problems)]
    lines = on_eight_devices(program, "data=2,fsdp=2,tensor=2,rollout=gathered", *runs).splitlines()
    assert lines.count("{8}") == 3  # of the weights that answer, twice, and of both that are compared
    results = [json.loads(line)["tasks"] for line in lines if line.startswith('{"')]
    found = {task: row for result in results for task, row in result.items()}
    for task, row in wanted.items():
        for name, value in row.items():
            assert found[task][name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-4)), name
    one, eight = ((place / "mmlu.jsonl").read_text().splitlines()[1:] for place in (tmp_path / "one", out))
    assert sorted(one) == sorted(eight)


def test_over_which_devices():
    run = Config(mesh=MeshConfig(data=2, tensor=4))
    assert mesh_for(None, None, 8) == MeshConfig(data=1, fsdp=-1)
    assert mesh_for(None, run, 8) == run.mesh and mesh_for(None, run, 4) == MeshConfig(data=1, fsdp=-1)
    assert mesh_for("tensor=4, rollout=gathered", run, 8) == MeshConfig(tensor=4, rollout="gathered")
    wide = Config(mesh=MeshConfig(data=1, fsdp=-1, tensor=4, rollout_tensor=16))
    assert mesh_for(None, wide, 16) == wide.mesh and mesh_for(None, wide, 8) == MeshConfig(data=1, fsdp=-1)
    for given, message in (
        ("tensor=3", "tensor=3 needs a multiple of 3 devices, there are 8"),
        ("model=3", "unknown setting 'mesh.model'"),
        ("tensor=x", "mesh.tensor is 'x': write a whole number"),
        ("4", "--mesh 4: write axes and devices, for instance data=2,tensor=4"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            mesh_for(given, run, 8)


def test_what_the_run_decides():
    assert resolved(SuiteConfig(), None) == SuiteConfig(temperature=0.7, thought_tokens=256)
    config = Config()
    config = dataclasses.replace(config, rlp=dataclasses.replace(config.rlp, temperature=0.5, thought_tokens=9))
    assert resolved(SuiteConfig(), config) == SuiteConfig(temperature=0.5, thought_tokens=9)
    given = SuiteConfig(temperature=1.0, thought_tokens=3)
    assert resolved(given, config) == given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm9k"], "--tasks: unknown task 'gsm9k': did you mean gsm8k?"),
        (["--tasks", "mmlu,mmlu"], "--tasks: mmlu is there twice"),
        (["--tasks", ","], "--tasks is empty"),
        (["--tasks", "mmlu", "--limit", "0"], "--limit is 0: it must be at least 1"),
        (["--tasks", "mmlu", "--samples", "-1"], "--samples is -1: it must be at least 0"),
        (["--tasks", "mmlu", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--tasks", "mmlu", "--temperature", "0"], "--temperature is 0.0: it must be positive"),
        (["--tasks", "mmlu", "--temperature", "nan"], "--temperature is nan"),
        (["--tasks", "mmlu", "--shots", "6"], "--shots is 6: mmlu has 0 to 5 worked examples"),
        (["--tasks", "mmlu", "--ema"], "--ema: "),
        (["--tasks", "mmlu,gpqa_diamond"], "is a file, for 2 tasks: give a directory"),
        (["--tasks", "mmlu", "--max-tokens", "400"], "mmlu: problem 0 needs prompt"),
        (["--tasks", "mmlu", "--experiment", "nosuch"], "unknown experiment 'nosuch'"),
        (["--tasks", "mmlu", "--data", "no.jsonl"], "--data: no file or directory no.jsonl"),
        (["--tasks", "perplexity", "--data", "no"], "--tasks perplexity needs --data"),
        (["--tasks", "perplexity", "--text", "{text"], "data.text is '{text'"),
        (["--tasks", "perplexity"], "no field 'text', the fields are 'question'"),
        (["--tasks", "gain", "--data", "no"], "--tasks gain: no file or directory no for --data"),
        (["--tasks", "gain", "--classes", "no.json"], "--classes no.json: "),
        (["--tasks", "mmlu", "--classes", "no.json"], "--classes is of --tasks gain alone"),
    ],
)
def test_bad_input(root, tmp_path, capsys, arguments, message):
    data = [] if "--data" in arguments else ["--data", str(root / "mmlu_test.jsonl")]
    shots = [] if "--shots" in arguments or "400" in arguments else ["--shots", "0"]
    code = main(["eval", str(root / "model"), *arguments, *data, *shots, "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("rlp: error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_missing_tasks(root, capsys):
    assert main(["eval", "nosuch", "--tasks", "mmlu", "--data", str(root)]) == 2
    assert "neither a preset nor" in capsys.readouterr().err
    assert main(["eval", str(root / "model"), "--tasks", "gain"]) == 2
    assert "--tasks gain needs --data: " in capsys.readouterr().err
    assert main(["eval", str(root / "run"), "--tasks", "gain", "--text", "{text}"]) == 2
    assert "--text is of the records of --data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["eval", "quickstart"])
    assert error.value.code == 2 and "--tasks" in capsys.readouterr().err
