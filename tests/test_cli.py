# SPDX-License-Identifier: Apache-2.0
"""The command line: bad input is one line and exit code 2 and writes nothing; good input does what it says."""

import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import byte_tokenizer, hasty_compilation, tiny_config, write_documents

from rlp_jax.checkpoint import Checkpoints, Position, load_run
from rlp_jax.checkpoints_io.load import load
from rlp_jax.cli import main
from rlp_jax.config import to_json
from rlp_jax.optimizer import make_optimizer
from rlp_jax.state import init_state

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Model, documents and the experiment file `tiny.py` that uses them."""
    root = tmp_path_factory.mktemp("cli")
    write_experiment(root / "tiny.py", tiny_config(root))
    with hasty_compilation(root / "cache"):
        yield root


def write_experiment(path, config):
    text = f"from rlp_jax.settings import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r}, '')\n"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def run_dir(root):
    """A run directory with one checkpoint, whose policy differs from its average."""
    config, run_dir = tiny_config(root), root / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(to_json(config))
    state = init_state(load(config.model).params, make_optimizer(config.optimizer, 1))
    state.params["final_norm"]["scale"] *= 2.0
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        checkpoints.save(state, Position({}, {}, {}, ""))
    return run_dir


def refused(capsys, *args):
    """The one line on standard error of a command that is refused."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "", out
    assert err.startswith("rlp: error: ") and err.count("\n") == 1, err
    return err.removeprefix("rlp: error: ").strip()


def test_help_is_fast_and_imports_no_jax():
    code = (
        "import sys\nfrom rlp_jax.cli import parser\nparser().format_help()\n"
        "assert not {'jax', 'numpy', 'rich', 'orbax'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "rlp_jax", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("rlp_jax ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rlp.group_size=1", "rlp.group_size is 1: a group-relative advantage needs at least 2 thoughts"),
        ("rlp.group_size=two", "rlp.group_size is 'two': write a whole number"),
        ("rlp.group_sise=4", "unknown setting 'rlp.group_sise': did you mean rlp.group_size?"),
        ("group_size=4", "unknown setting 'group_size': did you mean rlp.group_size or eval.group_size"),
        ("rlp=4", "rlp is a group of settings: set one of group_size, positions"),
        ("steps.x=4", "unknown setting 'steps.x': steps has no parts"),
        ("steps", "--set steps: write field=value"),
        ("steps=0", "steps is 0: it must be at least 1"),
        ("rlp.temperature=0", "rlp.temperature is 0.0: it must be positive and finite"),
        ("rlp.temperature=nan", "rlp.temperature is nan: it must be positive and finite"),
        ("optimizer.learning_rate=-1e-3", "optimizer.learning_rate is -0.001: it must be positive"),
        ("optimizer.beta2=1", "optimizer.beta2 is 1.0: it must be at least 0 and below 1"),
        ("optimizer.warmup_steps=6", "optimizer.warmup_steps is 6, the run has 6 updates"),
        ("rlp.horizon=32", "rlp.horizon is 32, data.document_tokens 32"),
        ("rlp.position_mode=best", "rlp.position_mode is 'best': choose one of uniform, span, entropy"),
        ("compute_dtype=float16", "compute_dtype is 'float16': choose one of float32, bfloat16"),
        ("remat=maybe", "remat is 'maybe': choose one of none, elementwise, layer"),
        ("rlp.microbatches=3", "batch_documents is 4, not a multiple of rlp.microbatches 3"),
        ("eval.batch_documents=1", "eval.batch_documents is 1: the shuffled control needs the thought of another"),
        ("mesh.fsdp=7", "mesh data=-1 fsdp=7 tensor=1 needs a multiple of 7 devices, there are"),
        ("mesh.data=0", "axes are 1 or more"),
        ("model=nosuchmodel", "model 'nosuchmodel' is neither a preset nor"),
        ("model=", "model is empty"),
        ("data.sources=", "data.sources is empty"),
        ("data.sources=nosuch.jsonl", "nosuch.jsonl"),
        ("data.text={nofield}", "no field 'nofield'"),
        ("data.heldout_fraction=0", "data.heldout_fraction is 0"),
        ("data.min_tokens=100", "data.min_tokens is 100"),
        ("batch_documents=1000", "batch_documents is 1000 but data.sources give"),
        ("data.document_tokens=200", "the model's context holds 64"),
        ("template.open=", "template.open is ''"),
    ],
)
def test_settings_that_cannot_work(root, tmp_path, capsys, setting, message):
    err = refused(capsys, "train", root / "tiny.py", "--run-dir", tmp_path / "run", "--set", setting)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_bad_experiments(tmp_path, capsys):
    assert "unknown experiment 'quickstar': did you mean quickstart or" in refused(capsys, "train", "quickstar")
    assert "does not exist" in refused(capsys, "train", tmp_path / "none.py")
    (tmp_path / "broken.py").write_text("def config(:")
    assert "broken.py cannot be used: SyntaxError" in refused(capsys, "train", tmp_path / "broken.py")
    (tmp_path / "empty.py").write_text("x = 1")
    assert "does not define `config()`" in refused(capsys, "train", tmp_path / "empty.py")


def test_a_failure_of_the_runtime_is_no_bad_input(root, tmp_path, monkeypatch):
    """JAX raises ValueError where a program fails as it is called."""

    def fails(*_, **__):
        raise ValueError("INTERNAL: planted")

    monkeypatch.setattr(import_module("rlp_jax.train"), "train", fails)  # `rlp_jax.train` alone is the function
    with pytest.raises(ValueError, match="INTERNAL: planted"):
        main(["train", str(root / "tiny.py"), "--run-dir", str(tmp_path / "run")])


def test_bad_arguments(capsys):
    assert "invalid choice: 'trian': did you mean train?" in refused(capsys, "trian")
    assert "arguments --text --file --interactive is required" in refused(capsys, "sample", "quickstart")
    assert "choice: 'cp': did you mean cpt?" in refused(capsys, "train", "quickstart", "--as", "cp")
    err = refused(capsys, "train", "quickstart", "--run-dirs", "x")
    assert err.startswith("unrecognized arguments: --run-dirs x: did you mean --run-dir?")
    assert "unknown task 'gsm9k': did you mean gsm8k" in refused(capsys, "eval", "quickstart", "--tasks", "gsm9k")
    assert "--steps" in refused(capsys, "train", "quickstart", "--steps", "many")


def test_bad_models_and_data(root, tmp_path, capsys):
    def train(*settings):
        overrides = [part for setting in settings for part in ("--set", setting)]
        return refused(capsys, "train", root / "tiny.py", "--run-dir", tmp_path / "run", *overrides)

    corrupt = tmp_path / "corrupt"
    corrupt.mkdir()
    for path in (root / "model").iterdir():
        (corrupt / path.name).write_bytes(path.read_bytes())
    (corrupt / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors" in train(f"model={corrupt}")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in train(f"data.sources={tmp_path / 'empty.jsonl'}")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n\xff\xfe\n')
    assert "bad.jsonl" in train(f"data.sources={tmp_path / 'bad.jsonl'}")
    (tmp_path / "not.jsonl").write_text('{"text": "good"}\n{"text"\n')
    assert "not.jsonl:2" in train(f"data.sources={tmp_path / 'not.jsonl'}")
    assert not (tmp_path / "run").exists()


def test_seed_steps_and_lists_override(root):
    from rlp_jax.settings import load_experiment, override

    config = load_experiment(str(root / "tiny.py"))
    changed = override(
        config,
        ["data.sources=a.txt, b.jsonl", "optimizer.final_learning_rate=1e-7", "rlp.group_size=8", "remat=none"],
    )
    assert changed.data.sources == ("a.txt", "b.jsonl")
    assert changed.optimizer.final_learning_rate == 1e-7
    assert changed.rlp.group_size == 8 and changed.remat == "none"
    assert override(changed, ["optimizer.final_learning_rate=none"]).optimizer.final_learning_rate is None
    assert changed.rlp.thought_tokens == config.rlp.thought_tokens


def test_a_run_directory_in_the_way(root, tmp_path, capsys):
    file = write_documents(tmp_path / "file", 1)
    err = refused(capsys, "train", root / "tiny.py", "--run-dir", file)
    assert "is a file: choose another --run-dir" in err
    err = refused(capsys, "train", root / "tiny.py", "--run-dir", tmp_path)
    assert "holds other files and no config.json" in err
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"nam')
    err = refused(capsys, "train", root / "tiny.py", "--run-dir", tmp_path / "damaged")
    assert "damaged/config.json is not a run's config.json" in err


def test_sample_shows_thoughts_and_the_gain_of_each(root, run_dir, capsys):
    for model in (root / "model", run_dir):
        args = ["sample", model, "--text", "4 abcdabcd", "--position", 4, "--horizon", 3, "--thoughts", 3]
        args += ["--tokens", 6, "--experiment", root / "tiny.py"]
        assert main([str(arg) for arg in args]) == 0
        out = capsys.readouterr().out
        assert "before token 4 of 10: ...'4 ab'" in out and "the text goes on with 'cda': -" in out
        assert [f"[{g}] gain" in out for g in (1, 2, 3, 4)] == [True, True, True, False]
        assert main([str(arg) for arg in args]) == 0
        assert capsys.readouterr().out == out


def test_sample_at_the_end_of_a_file_has_no_gain(run_dir, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("4 abcd")
    assert main(["sample", str(run_dir), "--file", str(tmp_path / "text.txt"), "--thoughts", "1"]) == 0
    out = capsys.readouterr().out
    assert "before token 6 of 6" in out and "[1] " in out and "gain" not in out


def test_sample_refuses(root, run_dir, tmp_path, capsys):
    sample = ("sample", run_dir, "--text", "4 abcd")
    assert "position is 7: this text has positions 1 to 6" in refused(capsys, *sample, "--position", 7)
    assert "the model's context holds 64" in refused(capsys, *sample, "--tokens", 100)
    assert "--tokens is 0: it must be positive" in refused(capsys, *sample, "--tokens", 0)
    assert "none.txt: No such file" in refused(capsys, "sample", run_dir, "--file", tmp_path / "none.txt")
    assert "neither a preset nor" in refused(capsys, "sample", "nosuch", "--text", "a")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(to_json(tiny_config(root)))
    assert "has saved no checkpoint yet" in refused(capsys, "sample", bare, "--text", "a")
    assert list(bare.iterdir()) == [bare / "config.json"]


def test_convert_a_run_and_its_average(root, run_dir, tmp_path, capsys):
    run = load_run(run_dir)
    for flags, expected in (([], run.params), (["--ema"], run.ema_params)):
        destination = tmp_path / f"out{len(flags)}"
        assert main(["convert", str(run_dir), str(destination), *flags]) == 0
        model, params, tokenizer = load(destination)
        np.testing.assert_array_equal(params["final_norm"]["scale"], expected["final_norm"]["scale"])
        assert tokenizer.encode("4 abcd") == byte_tokenizer().encode("4 abcd")
        assert model.config.d_model == run.model.config.d_model
    assert not np.array_equal(run.params["final_norm"]["scale"], run.ema_params["final_norm"]["scale"])
    rounded = tmp_path / "rounded"
    assert main(["convert", str(run_dir), str(rounded), "--ema", "--dtype", "bfloat16"]) == 0
    for a, b in zip(jax.tree.leaves(load(rounded).params), jax.tree.leaves(run.ema_params), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(np.float32))
    capsys.readouterr()
    assert "invalid choice: 'int8'" in refused(capsys, "convert", run_dir, tmp_path / "other", "--dtype", "int8")
    assert "not an empty directory" in refused(capsys, "convert", run_dir, destination)
    assert "is not a run directory" in refused(capsys, "convert", root / "model", tmp_path / "other", "--ema")
    assert "neither a preset nor" in refused(capsys, "convert", "nosuch", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_trained_model_is_used_without_its_first_weights(root, run_dir, tmp_path):
    """Shapes are all that a run directory needs of the model it started from; a tree not asked for is not read."""
    config = tiny_config(root, model=str(tmp_path / "model"))
    shutil.copytree(root / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    with pytest.raises(ValueError, match="not finite"):
        load(tmp_path / "model")
    run, average = load_run(tmp_path / "run"), load_run(tmp_path / "run", ("ema_params",))
    jax.tree.map(np.testing.assert_array_equal, run.ema_params, average.ema_params)
    assert average.params is None and run.params is not None


@pytest.mark.parity
@pytest.mark.parametrize("flags", [[], ["--ema"], ["--dtype", "bfloat16"]])
def test_transformers_writes_the_same_text_from_what_was_converted(run_dir, tmp_path, flags):
    """Greedy, token by token, float32 arithmetic on both sides."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert main(["convert", str(run_dir), str(tmp_path / "out"), *flags]) == 0
    model, params, tokenizer = load(tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = tokenizer.encode("17 abcdabcd")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("17 abcdabcd") == prompt
    given = torch.tensor([prompt])
    theirs = peer.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False)[0].tolist()
    ours, apply = list(prompt), jax.jit(model.apply)
    while len(ours) < len(theirs):
        padded = np.zeros((1, len(theirs)), np.int32)
        padded[0, : len(ours)] = ours
        ours.append(int(apply(params, padded)[0][0, len(ours) - 1].argmax()))
    assert len(ours) > len(prompt) and ours == theirs


def test_report(run_dir, tmp_path, capsys):
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").is_file()
    assert str(tmp_path) in refused(capsys, "report", tmp_path)
    for arguments, message in (
        (["--documents", "0"], "--documents is 0: it must be at least 1"),
        (["--positions", "2"], "--positions without --documents"),
        (["--documents", "2", "--thoughts", "1"], "--thoughts is 1: it must be at least 2"),
        (["--out", tmp_path / "page.html"], "--out is of several runs"),
        ([run_dir, "--out", tmp_path / "page.html"], "is there twice"),
    ):
        assert message in refused(capsys, "report", run_dir, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_report_of_several_runs(run_dir, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run_dir / "config.json", other)
    assert main(["report", str(run_dir), str(other), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "2 runs compared" in (tmp_path / "page.html").read_text(encoding="utf-8")
