# SPDX-License-Identifier: Apache-2.0
"""Directories that lie: links, indexes, tensors in two places. One line each, before any weight is read."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlp_jax.checkpoints_io.huggingface import open_directory, read_directory, write_directory
from rlp_jax.checkpoints_io.names import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path, model, params, tokenizer):
    write_directory(tmp_path / "model", model.config, params, tokenizer, shard_bytes=20_000)
    return tmp_path / "model"


def error_of(directory) -> str:
    with pytest.raises(CheckpointError) as error:
        open_directory(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_text(json.dumps(change(index)))


def move_and_link(file, target, link=None):
    """The file goes to `target`, and a link to it takes its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    file.symlink_to(link or target)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-", "tokenizer.json", "generation_config.json"])
def test_links_out_of_the_directory_are_refused(directory, tmp_path, name, relative):
    file = next(path for path in sorted(directory.iterdir()) if path.name.startswith(name))
    target = tmp_path / "elsewhere" / file.name
    move_and_link(file, target, os.path.relpath(target, directory) if relative else target)
    assert f"{file}: a symbolic link out of the model directory" in error_of(directory)


def test_links_within_the_directory_and_to_it_are_followed(directory, tmp_path, params, same_tree):
    for file in sorted(directory.iterdir())[:4]:
        move_and_link(file, directory / "real" / file.name)
    (tmp_path / "link").symlink_to(directory)
    same_tree(read_directory(tmp_path / "link")[1], params)


def hub_cache(directory, root, name="models--org--tiny"):
    """The directory as a snapshot in huggingface_hub's cache."""
    snapshot = root / name / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    for n, file in enumerate(sorted(snapshot.iterdir())):
        move_and_link(file, root / name / "blobs" / f"{n:064x}", f"../../blobs/{n:064x}")
    return snapshot


def test_the_hub_cache_is_read(directory, tmp_path, params, same_tree):
    snapshot = hub_cache(directory, tmp_path / "hub")
    same_tree(read_directory(snapshot)[1], params)
    (tmp_path / "here").symlink_to(snapshot)
    same_tree(read_directory(tmp_path / "here")[1], params)


def test_the_hub_cache_leads_to_its_own_blobs_alone(directory, tmp_path):
    snapshot = hub_cache(directory, tmp_path / "hub")
    config = snapshot / "config.json"
    inside = config.resolve()
    for elsewhere in ("models--org--other/blobs/x", "models--org--tiny/refs/x", "models--org--tiny/snapshots/y/x", "x"):
        target = tmp_path / "hub" / elsewhere
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(inside.read_bytes())
        config.unlink()
        config.symlink_to(target)
        assert "config.json: a symbolic link out of the model directory" in error_of(snapshot)
    config.unlink()
    inside.unlink()
    inside.symlink_to(target)  # a blob that is itself a link
    config.symlink_to(inside)
    assert "a symbolic link out of the model directory" in error_of(snapshot)


def test_what_only_looks_like_the_hub_cache(directory, tmp_path):
    snapshot = hub_cache(directory, tmp_path / "hub", name="tiny")
    assert "a symbolic link out of the model directory" in error_of(snapshot)


def test_dangling_links_loops_and_devices(directory):
    file = sorted(directory.glob("*.safetensors"))[0]
    file.unlink()
    file.symlink_to(directory / "absent")
    assert f"{file}: no such weights file" in error_of(directory)
    file.unlink()
    file.symlink_to(file.name)
    assert str(file) in error_of(directory)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "a symbolic link out of the model directory" in error_of(directory)
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: no such weights file" in error_of(directory)  # and does not wait for a writer


@pytest.mark.parametrize(
    "target",
    ["../model-00001.safetensors", "/etc/passwd", "..", "a\\b", "C:x", 3, "", None, [], {}, True, "a\0.safetensors",
     "a\n.safetensors", "pytorch_model.bin", "x" * 300 + ".safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_names_plain_files_alone(directory, target):
    edit_index(directory, lambda index: index | {"weight_map": index["weight_map"] | {"model.norm.weight": target}})
    assert "tensor model.norm.weight points to" in error_of(directory)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, "x", 3, None])
def test_an_index_of_another_form(directory, index):
    edit_index(directory, lambda _: index)
    message = error_of(directory)
    assert f"{directory / INDEX}: " in message and ("weight_map is missing" in message or "JSON object" in message)


def test_an_index_that_says_two_things(directory):
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(text.replace('"weight_map"', '"weight_map": {"a": "b.safetensors"}, "weight_map"'))
    assert "key weight_map twice" in error_of(directory)


def test_a_tensor_in_two_shards(directory):
    first, second, *_ = sorted(directory.glob("*.safetensors"))
    name, array = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: array}, second)
    assert f"{second}: tensor {name} is in {first.name} too" in error_of(directory)


def test_every_header_is_checked_before_any_weight_is_read(directory):
    """The last file's header and the first file's values are both wrong: the header is what is reported."""
    first, *_, last = sorted(directory.glob("*.safetensors"))
    save_file({name: np.full_like(array, np.nan) for name, array in load_file(first).items()}, first)
    with pytest.raises(CheckpointError, match="not finite"):
        read_directory(directory)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_directory(directory)


def test_types_and_shapes_are_checked_before_any_weight_is_read(directory, model):
    name = "model.norm.weight"
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    for array, words in [
        (np.ones(model.config.d_model, np.int32), f"{file}: tensor {name} is stored as I32; supported: F32, BF16"),
        (np.ones((2, 12), np.float32), f"tensor {name} has shape [2, 12], the configuration needs [24]"),
        (np.ones((), np.float32), f"tensor {name} has shape [], the configuration needs [24]"),
    ]:
        save_file(tensors | {name: array}, file)
        assert words in error_of(directory)
    save_file(tensors | {"evil\nname": np.ones(1, np.float32)}, file)
    assert r"tensor 'evil\nname' found" in error_of(directory)
