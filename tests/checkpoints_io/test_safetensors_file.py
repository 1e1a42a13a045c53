# SPDX-License-Identifier: Apache-2.0
"""The header check refuses every lie with one line; what is written equals the safetensors package byte by byte."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlp_jax.checkpoints_io import safetensors_file
from rlp_jax.checkpoints_io.safetensors_file import MAX_JSON, read_header, write_file
from rlp_jax.checkpoints_io.tables import CheckpointError


def raw_file(path, header, data=b""):
    """A file with this header (an object, or bytes as they are) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def error_of(function, *args) -> str:
    with pytest.raises(CheckpointError) as error:
        function(*args)
    message = str(error.value)
    assert message.isprintable() and len(message) < 600, message
    return message


HUGE = 2**63
LIES = {
    "huge offset": ({"a": tensor(0, 2**62)}, "ends at byte 4611686018427387904"),
    "offset beyond 64 bits": ({"a": tensor(0, 2**70)}, "expected two positions"),
    "negative offset": ({"a": tensor(-8, 0)}, "tensor a has data_offsets [-8, 0], expected two positions"),
    "backwards": ({"a": tensor(8, 0)}, "tensor a has data_offsets [8, 0], which run backwards"),
    "fraction": ({"a": tensor(0.0, 8)}, "tensor a has data_offsets [0.0, 8]"),
    "true": ({"a": tensor(False, 8)}, "tensor a has data_offsets [False, 8]"),
    "one offset": ({"a": {**tensor(), "data_offsets": [0]}}, "tensor a has data_offsets [0]"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "tensor a has data_offsets None"),
    "wrapping product": ({"a": tensor(0, 8, shape=(2**62, 4, 2))}, "needs 147573952589676412928"),
    "too large for its range": ({"a": tensor(0, 8, shape=(3,))}, "tensor a has 8 bytes of data, F32 [3] needs 12"),
    "negative size": ({"a": tensor(0, 8, shape=(-2,))}, "tensor a has shape [-2]"),
    "size 2**63": ({"a": tensor(0, 0, shape=(HUGE, 0))}, f"tensor a has shape [{HUGE}, 0]"),
    "fractional size": ({"a": tensor(0, 8, shape=(2.0,))}, "tensor a has shape [2.0]"),
    "boolean size": ({"a": tensor(0, 4, shape=(True,))}, "tensor a has shape [True]"),
    "text size": ({"a": tensor(0, 8, shape=("2",))}, "tensor a has shape ['2']"),
    "no list": ({"a": tensor(0, 8, shape=2)}, "tensor a has shape 2"),
    "thousands of axes": ({"a": tensor(0, 4, shape=(1,) * 5_000)}, "tensor a has shape [1, 1, "),
    "unknown dtype": ({"a": tensor(dtype="F31")}, "tensor a has dtype F31; known: BOOL"),
    "dtype a number": ({"a": tensor(dtype=32)}, "tensor a has dtype 32"),
    "dtype a list": ({"a": tensor(dtype=["F32"])}, "tensor a has dtype ['F32']"),
    "overlap": ({"a": tensor(), "b": tensor(4, 8, shape=(1,))}, "the data of tensors a and b overlap"),
    "the same range": ({"a": tensor(), "b": tensor()}, "the data of tensors a and b overlap"),
    "gap": ({"a": tensor(0, 4, shape=(1,)), "b": tensor(6, 8, "F16", (1,))}, "2 bytes before tensor b belong to none"),
    "gap at the start": ({"a": tensor(4, 8, shape=(1,))}, "4 bytes before tensor a belong to none"),
    "trailing bytes": ({"a": tensor(0, 4, shape=(1,))}, "4 bytes at the end belong to no tensor"),
    "nothing": ({}, "8 bytes at the end belong to no tensor"),
    "not an object": ([], "header: expected a JSON object"),
    "tensor not an object": ({"a": [0, 8]}, "tensor a is not described by an object"),
    "metadata": ({"__metadata__": {"n": 1}, "a": tensor()}, "__metadata__ is not an object of strings"),
    "metadata a list": ({"__metadata__": [], "a": tensor()}, "__metadata__ is not an object of strings"),
    "name of two lines": ({"a\nb": tensor(0, 4)}, r"tensor 'a\nb' has 4 bytes"),
    "name without end": ({"a" * 10_000: tensor(0, 4)}, "aaa... has 4 bytes"),
    "twice": (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "key a twice"),
    "twice within": (b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', "key shape twice"),
    "not UTF-8": (b'{"\xff": {}}', "header: not valid JSON ('utf-8' codec"),
    "not JSON": (b"{'a': 1}", "header: not valid JSON (Expecting property name"),
    "nested": (b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}", "nested too deeply"),
    "nested objects": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
    "a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON (Exceeds the limit"),
    "not a number": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "has shape [nan]"),
    "empty": (b"", "header: not valid JSON (Expecting value"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path, lie):
    header, words = LIES[lie]
    message = error_of(read_header, raw_file(tmp_path / "x.safetensors", header, bytes(8)))
    assert message.startswith(f"{tmp_path / 'x.safetensors'}: ") and words in message


def test_lengths_that_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    for start, words in [
        (b"", "truncated or not a safetensors file (0 bytes)"),
        (b"1234567", "truncated or not a safetensors file (7 bytes)"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "a header of 18446744073709551615 bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes in a file of 10"),
    ]:
        path.write_bytes(start)
        assert words in error_of(read_header, path)
    with open(path, "wb") as file:  # sparse: nothing of it is read
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)
    assert f"the header has {2**40} bytes, at most {MAX_JSON} are read" in error_of(read_header, path)
    assert "no such weights file" in error_of(read_header, tmp_path)


def test_empty_tensors_and_unknown_fields_are_no_lies(tmp_path):
    header = {
        "b": tensor(),
        "none": tensor(8, 8, shape=(0, 3)),
        "zero": tensor(0, 0, shape=(0,)),
        "scalar": tensor(8, 12, shape=()) | {"comment": "x"},
    }
    entries = read_header(raw_file(tmp_path / "x.safetensors", header, np.float32([1, 2, 3]).tobytes()))
    assert list(entries) == ["zero", "b", "none", "scalar"]
    assert entries["b"].read().tolist() == [1, 2] and entries["scalar"].read() == 3
    assert entries["none"].read().shape == (0, 3)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_arrays_and_rows_equal_those_of_the_package(tmp_path, dtype):
    numpy_type = safetensors_file.FLOATS[dtype]
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(numpy_type) for name, shape in
              {"b.2": (7, 5), "b.10": (3,), "a": (4, 2, 3)}.items()}  # fmt: skip
    save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_file(
        tmp_path / "ours.safetensors", [(name, array.shape, lambda a=array: a) for name, array in arrays.items()], dtype
    )
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    for name, entry in read_header(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(entry.read(), arrays[name], strict=True)
        np.testing.assert_array_equal(entry.read(1, 3), arrays[name][1:3], strict=True)
    assert set(load_file(tmp_path / "ours.safetensors")) == set(arrays)


def test_a_file_cut_after_its_header_was_read(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {"a": tensor()}, bytes(8))
    entry = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    assert "truncated while it was read" in error_of(entry.read)


def test_what_a_type_cannot_hold_is_not_written(tmp_path):
    def write(value, dtype):
        array = np.float32([1, value])
        return error_of(write_file, tmp_path / "x", [("a", (2,), lambda: array)], dtype)

    assert "tensor a holds values that are not finite as F32" in write(np.nan, "F32")
    assert "tensor a holds values that are not finite as F16" in write(1e6, "F16")
    assert "tensor a holds values that are not finite as BF16" in write(np.finfo(np.float32).max, "BF16")


def test_rounding_to_bfloat16_is_to_nearest_even(tmp_path):
    exact = np.arange(2**16, dtype=np.uint32) << 16
    exact = exact[np.isfinite(exact.view(np.float32))]
    between = (exact + 0x8000).view(np.float32)  # half way: to the neighbour that is even
    between = between[np.isfinite(between.astype(ml_dtypes.bfloat16).astype(np.float32))]
    write_file(tmp_path / "x", [("a", between.shape, lambda: between)], "BF16")
    bits = between.view(np.uint32)
    expected = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    np.testing.assert_array_equal(read_header(tmp_path / "x")["a"].read().view(np.uint16), expected)
