# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks, each in a fresh kernel and an empty folder: `python notebooks/execute.py --quick`.

A cell that fails ends it with that cell and its error, exit code 1. Needs `pip install -e '.[notebooks]'`.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SECONDS = 1800  # of a cell, at most
# The smallest sizes; and programs compiled in haste, which are most of the time of a few steps.
QUICK = {"RLP_NOTEBOOK_QUICK": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def execute(path: Path, folder: Path, quick: bool):
    """The notebook with its outputs, after a run in `folder`, and a last cell that prints its processor time.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell that failed; CellTimeoutError, DeadKernelError: or never ended.
    """
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell("import time\n\nprint(time.process_time())"))
    # This very interpreter, whatever kernels are registered on the machine.
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[:] = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager.kernel_spec.argv.append("--IPKernelApp.log_level=ERROR")  # it warns of its own defaults
    client = NotebookClient(
        notebook, km=manager, timeout=SECONDS, startup_timeout=SECONDS, shutdown_kernel="immediate",
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    return client.execute(cleanup_kc=True, env=os.environ | (QUICK if quick else {}))


def pictures(notebook) -> int:
    """Outputs that are shown rather than printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return sum(bool({"image/png", "text/html"} & set(output.get("data", ()))) for output in outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of file names, for instance 01 03 (default: all)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes that run every cell")
    parser.add_argument("--keep", type=Path, help="write the notebooks with their outputs into this folder")
    args = parser.parse_args()
    paths = sorted(path for path in FOLDER.glob("*.ipynb") if path.name.startswith(tuple(args.names) or ""))
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(args.names)}")

    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    with tempfile.TemporaryDirectory() as scratch:
        # Kernels share what they compile, and what a program needs is the same from one notebook to the next.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        for path in paths:
            folder, started = Path(scratch) / path.stem, time.monotonic()
            folder.mkdir()
            try:
                notebook = execute(path, folder, args.quick)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
            seconds = float(notebook.cells.pop().outputs[0].text)
            print(f"{path.name}: {time.monotonic() - started:.0f} s, {seconds:.0f} s of processor time, "
                  f"{pictures(notebook)} pictures", flush=True)  # fmt: skip
            if args.keep:
                args.keep.mkdir(parents=True, exist_ok=True)
                nbformat.write(notebook, args.keep / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
