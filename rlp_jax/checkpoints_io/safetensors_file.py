# SPDX-License-Identifier: Apache-2.0
"""safetensors files, in and out, trusting nothing: headers are checked in full before a byte of data is read.

The `safetensors` package maps a file into memory whole and writes one from a dict of all its arrays. Here a tensor is
read by itself, or only some of its rows, and written by itself, so that memory never holds a file; the format (8 bytes
of length, a JSON header, the data) is as the package documents it, and tests compare the two byte by byte.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from rlp_jax.checkpoints_io.tables import CheckpointError

FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}
# Bytes of one value of the types whose values are whole bytes.
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}  # fmt: skip
MAX_JSON = 4 * 2**20  # bytes; a header or index of 30,000 tensors takes less, parsing the worst some 100 MB
MAX_RANK = 16


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file. `begin` and `end` count from the file's first byte."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(rows.start, rows.stop)

    def read(self, first: int | None = None, last: int | None = None) -> np.ndarray:
        """The array in its stored type, or its rows [first, last).

        Raises:
          CheckpointError: the file has become shorter since its header was read.
        """
        dtype = np.dtype(FLOATS[self.dtype])
        rows = slice(first, last).indices(self.shape[0]) if self.shape else (0, 1, 1)
        row = dtype.itemsize * math.prod(self.shape[1:])
        data = np.empty((rows[1] - rows[0]) * row, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.begin + rows[0] * row)
            view = memoryview(data)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path}: truncated while it was read")
                view = view[count:]
        return data.view(dtype).reshape(rows[1] - rows[0], *self.shape[1:]) if self.shape else data.view(dtype)[0]


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object from bytes that may be hostile.

    Raises:
      CheckpointError: not UTF-8, not JSON, not an object, a key twice in one object, or nested beyond reason.
    """
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{source}: {len(data)} bytes of JSON, at most {MAX_JSON} are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise CheckpointError(f"{source}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # undecodable, malformed, numbers of thousands of digits, our own
        raise CheckpointError(f"{source}: not valid JSON ({shown(str(error), 200)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object")
    return value


def shown(value: Any, limit: int = 80) -> str:
    """A name or value out of a file for a message of one line: as it is if that is plain, else quoted, cut if long."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"key {shown(name)} twice")
            names.add(name)
    return result


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
    """The tensors of a file, in the order of their data, every claim of the header checked against the file's size.

    Raises:
      CheckpointError: absent, truncated or too long; a header that is not what the format allows; ranges that leave
        the file, overlap, leave gaps or do not match type and shape.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        length = struct.unpack("<Q", start)[0]
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not a safetensors file (a header of {length} bytes in a file of {size})"
            )
        if length > MAX_JSON:
            raise CheckpointError(f"{path}: the header has {length} bytes, at most {MAX_JSON} are read")
        header = parse_json(file.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    data_bytes = size - 8 - length
    entries = {name: _entry(path, name, fields, 8 + length, data_bytes) for name, fields in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end, before = 8 + length, None
    for name, entry in entries.items():
        if entry.begin < end:
            raise CheckpointError(f"{path}: the data of tensors {shown(before)} and {shown(name)} overlap")
        if entry.begin > end:
            raise CheckpointError(f"{path}: {entry.begin - end} bytes before tensor {shown(name)} belong to none")
        end, before = entry.end, name
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes at the end belong to no tensor")
    return entries


def _entry(path: pathlib.Path, name: str, fields: Any, data_start: int, data_bytes: int) -> Entry:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {shown(name)} {reason}")

    if not isinstance(fields, dict):
        raise refuse("is not described by an object")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise refuse(f"has dtype {shown(dtype)}; known: {', '.join(BYTES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise refuse(f"has shape {shown(shape)}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise refuse(f"has data_offsets {shown(offsets)}, expected two positions")
    begin, end = offsets
    if begin > end:
        raise refuse(f"has data_offsets {shown(offsets)}, which run backwards")
    if end > data_bytes:
        raise CheckpointError(
            f"{path}: truncated: the data of tensor {shown(name)} ends at byte {end}, there are {data_bytes}"
        )
    needed = BYTES[dtype] * math.prod(shape)
    if end - begin != needed:
        raise refuse(f"has {end - begin} bytes of data, {dtype} {shown(shape)} needs {needed}")
    return Entry(path, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def write_file(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: str = "F32",
) -> None:
    """Writes a file tensor by tensor: (name, shape, function that gives the array), each asked for once.

    The bytes are those of the safetensors package (tensors in the order of their names). A failure leaves part of a
    file behind: write into a directory that is renamed when complete.

    Raises:
      CheckpointError: values that the type cannot hold, or that are not finite.
    """
    tensors = sorted(tensors, key=lambda item: item[0])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, _ in tensors:
        end = position + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, read in tensors:
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(read(), FLOATS[dtype])
            assert array.shape == tuple(shape), (name, array.shape, shape)
            if not is_finite(array):
                raise CheckpointError(f"tensor {name} holds values that are not finite as {dtype}: nothing was written")
            file.write(array.reshape(-1).view(np.uint8))


def is_finite(array: np.ndarray, rows: int = 2**20) -> bool:
    """Whether all values of a contiguous array are finite in float32, without a copy of the whole."""
    flat = array.reshape(-1)
    with np.errstate(over="ignore"):
        return all(
            np.isfinite(flat[start : start + rows].astype(np.float32, copy=False)).all()
            for start in range(0, flat.size, rows)
        )
