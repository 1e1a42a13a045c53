# SPDX-License-Identifier: Apache-2.0
"""The same records in every format that a source may have."""

import gzip
import json
from pathlib import Path

from rlp_jax.data.columns import write_array_record


def jsonl(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write(directory: Path, kind: str, records: list[dict]) -> str:
    """Writes them below a directory; gives what data.sources takes."""
    path = directory / f"records.{kind}"
    if kind == "jsonl":
        path.write_bytes(jsonl(records))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(records)))
    elif kind == "jsonl.zst":
        from backports import zstd

        path.write_bytes(zstd.compress(jsonl(records)))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    elif kind == "array_record":
        write_array_record(str(path), records)
    elif kind.startswith("hf"):
        folder = directory / kind.replace(":", "_")
        folder.mkdir()
        write(folder, "parquet", records)
        return f"hf:{folder}::train" + kind.removeprefix("hf")
    elif kind == "tfds":
        from rlp_jax.config import DataConfig
        from rlp_jax.data.rlp_documents import build

        source = write(directory, "jsonl", records)
        return f"tfds:{build('written', DataConfig((source,)), directory / 'datasets')[0]}:train"
    return str(path)
