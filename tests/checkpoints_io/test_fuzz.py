# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile model directories: whatever the bytes, either the same numbers or one error of ours in one line.

Each example changes a few bytes, or a value in the JSON, of one file of a valid small checkpoint.
"""

import functools
import json
import shutil
import struct
import tempfile
import tracemalloc
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlp_jax.checkpoints_io import huggingface
from rlp_jax.checkpoints_io.load import read
from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.data.tokenizer import TokenizerError
from rlp_jax.models.transformer import LanguageModel, ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = ModelConfig(
    family="qwen3", vocab_size=260, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=12,
    tie_embeddings=True, qk_norm=True, max_positions=64,
)  # fmt: skip
MEGABYTES = 2**20
ALLOWED_MEMORY = 128 * MEGABYTES  # Python's and numpy's; the checkpoint has 13 kB
CHECK = settings(deadline=60_000, max_examples=60, suppress_health_check=list(HealthCheck))
MORE = settings(CHECK, max_examples=300)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """The same model as one file and as shards, and its parameters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(LanguageModel(CONFIG).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    root = tmp_path_factory.mktemp("fuzz")
    huggingface.write_directory(root / "single", CONFIG, params, tokenizer)
    huggingface.write_directory(root / "shards", CONFIG, params, tokenizer, shard_bytes=3_000)
    return types.SimpleNamespace(root=root, params=Hidden(params))


class Hidden(dict):
    """A tree that does not fill the screen when a test fails."""

    def __repr__(self):
        return "{...}"


def outcome(source: Path, file: str, data: bytes):
    """(config, params) of a copy of a checkpoint with one file replaced, or the error's message."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        shutil.copytree(source, directory, symlinks=True)
        (directory / file).write_bytes(data)
        tracemalloc.start()
        try:
            config, params, _ = read(directory)
        except (CheckpointError, TokenizerError) as error:
            message = str(error)
            assert message.isprintable() and str(directory) in message and len(message) < 1_000, message
            return message
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < ALLOWED_MEMORY, peak
        return config, params


def same(left, right) -> bool:
    left, right = dict(left), dict(right)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def mutated(data: bytes, changes) -> bytes:
    """Bytes replaced, inserted and removed at fractions of the length."""
    for where, kind, value in changes:
        at = int(where * len(data))
        data = {
            "replace": data[:at] + value + data[at + len(value) :],
            "insert": data[:at] + value + data[at:],
            "remove": data[:at] + data[at + len(value) :],
        }[kind]
    return data


WORDS = (b'"', b",", b"{", b"}", b"[", b"]", b":", b"-", b"0", b"9", b"1e9", b"null", b"true", b"NaN", b"\\u0000",
         b"\\ud800", b"\xff", b"\n", b"F32", b"BF16", b"I64", b"../", b"18446744073709551615")  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["replace", "insert", "remove"]),
        st.sampled_from(WORDS) | st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)
# Values that JSON can hold and a field's reader may not expect.
ODD = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e999,
                     float("nan"), "", "1", "F32", "full_attention", "../x", "/etc/passwd", "\n", "\ud800", "x" * 5_000,
                     [], {}, [[]], [None], ["full_attention"] * 9_999, [0, 0], {"rope_type": []}, {"a": {"a": {}}}]),
    st.integers(), st.floats(), st.text(max_size=9), st.lists(st.integers(-2, 2**64), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


def paths_of(value, path=()):
    """The path of every value in a JSON document."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from paths_of(inner, (*path, key))


def with_value(document, path, value):
    """The document with one value replaced."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = with_value(document[path[0]], path[1:], value)
    return copy


@functools.cache
def header_of(path: Path) -> tuple[bytes, bytes]:
    """(JSON, data) of a weights file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


def file_of(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def fuzz(test):
    """The test with a few examples, and marked slow with many."""
    names = ("checkpoints", "data")

    def few(checkpoints, data):
        test(checkpoints, data)

    assert names == few.__code__.co_varnames
    return CHECK(given(data=st.data())(few)), pytest.mark.slow(MORE(given(data=st.data())(few)))


def header_bytes(checkpoints, data):
    root, params = checkpoints.root, checkpoints.params
    header, tensors = header_of(root / "single" / SINGLE)
    changed = mutated(header, data.draw(CHANGES))
    length = data.draw(st.none() | st.sampled_from([0, 1, 2**40, 2**63, 2**64 - 1]) | st.integers(0, 2 * len(header)))
    result = outcome(root / "single", SINGLE, file_of(changed, tensors, length))
    if not isinstance(result, str):
        # What still loads is what was stored: only names that trade places would move a tensor, no few bytes do that.
        assert result[0] == CONFIG and same(result[1], params)


def header_values(checkpoints, data):
    root, params = checkpoints.root, checkpoints.params
    header, tensors = header_of(root / "single" / SINGLE)
    document = json.loads(header)
    path = data.draw(st.sampled_from(sorted(paths_of(document), key=str)))
    value = data.draw(ODD)
    result = outcome(root / "single", SINGLE, file_of(json.dumps(with_value(document, path, value)).encode(), tensors))
    if not isinstance(result, str):
        assert result[0] == CONFIG and same(result[1], params)


def index_bytes(checkpoints, data):
    root, params = checkpoints.root, checkpoints.params
    result = outcome(root / "shards", INDEX, mutated((root / "shards" / INDEX).read_bytes(), data.draw(CHANGES)))
    assert isinstance(result, str) or (result[0] == CONFIG and same(result[1], params))


def index_values(checkpoints, data):
    root, params = checkpoints.root, checkpoints.params
    document = json.loads((root / "shards" / INDEX).read_text())
    path = data.draw(st.sampled_from(sorted(paths_of(document), key=str)))
    changed = json.dumps(with_value(document, path, data.draw(ODD))).encode()
    result = outcome(root / "shards", INDEX, changed)
    assert isinstance(result, str) or (result[0] == CONFIG and same(result[1], params))


def config_bytes(checkpoints, data):
    root, params = checkpoints.root, checkpoints.params
    changed = mutated((root / "single" / "config.json").read_bytes(), data.draw(CHANGES))
    result = outcome(root / "single", "config.json", changed)
    # Another rope_theta is another model of the same numbers.
    assert isinstance(result, str) or same(result[1], params)


EXTRA_FIELDS = {
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
    "rope_parameters": {"rope_theta": 1e4, "full_attention": {"rope_theta": 1.0}, "sliding_attention": {"factor": 2}},
    "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True,
    "max_window_layers": 1, "quantization_config": None, "partial_rotary_factor": 1.0, "query_pre_attn_scalar": 4,
}  # fmt: skip


def config_values(checkpoints, data):
    root, params = checkpoints.root, checkpoints.params
    document = json.loads((root / "single" / "config.json").read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(EXTRA_FIELDS)), unique=True)):
        document[name] = EXTRA_FIELDS[name]
    if data.draw(st.booleans()):
        document["model_type"] = data.draw(st.sampled_from(["llama", "qwen2", "gemma3_text", "nemotron_h", "gemma3"]))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(paths_of(document), key=str)))
        document = with_value(document, path, data.draw(ODD))
        if not isinstance(document, dict):
            break
    result = outcome(root / "single", "config.json", json.dumps(document).encode())
    assert isinstance(result, str) or same(result[1], params)


test_header_bytes, test_header_bytes_at_length = fuzz(header_bytes)
test_header_values, test_header_values_at_length = fuzz(header_values)
test_index_bytes, test_index_bytes_at_length = fuzz(index_bytes)
test_index_values, test_index_values_at_length = fuzz(index_values)
test_config_bytes, test_config_bytes_at_length = fuzz(config_bytes)
test_config_values, test_config_values_at_length = fuzz(config_values)


def test_an_unchanged_checkpoint_loads(checkpoints):
    root, params = checkpoints.root, checkpoints.params
    for name, file in (("single", SINGLE), ("shards", INDEX), ("single", "config.json")):
        config, read_params = outcome(root / name, file, (root / name / file).read_bytes())
        assert config == CONFIG and same(read_params, params)


def test_giant_and_deep_json_is_refused_within_bounds(checkpoints):
    root = checkpoints.root
    tensors, limit = header_of(root / "single" / SINGLE)[1], huggingface.MAX_JSON
    dense = b'{"a": [' + b"[]," * (limit // 3 - 8) + b"1]}"
    for text in (b"[" * 10**6, b'{"a":' * 10**5, b'{"a": "' + b"x" * limit + b'"}'):
        assert isinstance(outcome(root / "shards", INDEX, text), str)
    assert "config.json: not valid JSON (nested too deeply)" in outcome(root / "single", "config.json", b"[" * 10**6)
    assert "is not described by an object" in outcome(root / "single", SINGLE, file_of(dense, tensors))
    many = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}).encode()
    assert "missing from the weights" in outcome(root / "single", SINGLE, file_of(many, b""))
