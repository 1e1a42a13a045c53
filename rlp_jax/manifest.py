# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is what was written: a manifest inside it holds every file's size and SHA-256.

Orbax writes a checkpoint into a temporary directory and renames it at the end. `SealedPath` writes the manifest just
before that rename. So a directory under its final name always has one, whenever the process is killed, and one without
was tampered with or is half deleted. Storage that loses, cuts or flips what it had acknowledged is found by `fault`.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import os
from pathlib import Path

import orbax.checkpoint as ocp

from rlp_jax.storage import StorageError, reason, retried

FILE = "manifest.json"
LATER = {FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax writes two more files after the manifest
THREADS = 8


class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary directory, with a manifest in the checkpoint when it gets its name."""

    async def finalize(self):
        if self.get_final().name.isdigit():  # a step, not one of the items inside it
            await asyncio.to_thread(seal, Path(self.get()))
        await super().finalize()


def seal(directory: Path) -> None:
    """Writes the manifest of a checkpoint whose files are complete."""
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    names = [name for name in names if name not in LATER]
    files = dict(zip(names, _each(_measure, [directory / name for name in names]), strict=True))
    with open(directory / FILE, "w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def fault(directory: Path, say=lambda text: None) -> str | None:
    """What is wrong with a checkpoint, None where every file is as it was written.

    Args:
      directory: a checkpoint.
      say: told of attempts to read it that failed.
    """
    try:
        files = json.loads((directory / FILE).read_text(encoding="utf-8"))["files"]
        expected = {directory / name: (size, digest) for name, (size, digest) in files.items()}
    except FileNotFoundError:
        return f"it has no {FILE}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {FILE} cannot be read ({reason(error)})"
    for path, (size, _) in expected.items():  # cheap, and finds what is cut off or gone
        held = path.stat().st_size if path.is_file() else None
        if held != size:
            name = path.relative_to(directory)
            return f"{name} is missing" if held is None else f"{name} holds {held} bytes instead of {size}"

    def changed(path: Path) -> str | None:
        name = path.relative_to(directory)
        try:
            held = retried(lambda: _measure(path) if path.exists() else None, path, say)
        except StorageError as error:
            return f"{name} cannot be read ({reason(error.__cause__)})"
        if held is None:
            return f"{name} is missing"
        return None if held == expected[path] else f"the contents of {name} changed"

    return next(filter(None, _each(changed, expected)), None)


def _measure(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _each(function, items) -> list:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:  # hashing lets go of the interpreter
        return list(pool.map(function, items))
