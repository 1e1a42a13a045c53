# SPDX-License-Identifier: Apache-2.0
"""What a work directory holds before any run: the study's data, and the bases that are kept."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.paper.configs import DATA
from experiments.paper.processes import Failed, Pool

KEPT = Path(__file__).with_name("bases")  # bases as they were made once, so that all results share them


def make_data(work: Path, pool: Pool, check: Callable[[], None]) -> None:
    """Writes the data where there are none yet, all or nothing.

    Args:
      check: called with the data in place; raises where results are of others.

    Raises:
      Failed: they could not be written.
    """
    if (work / DATA).is_dir():
        return

    def job():
        partial = work / f"{DATA}.part"
        shutil.rmtree(partial, ignore_errors=True)
        yield ["-m", "experiments.paper.data_files", partial.name], DATA
        os.replace(partial, work / DATA)
        check()
        return "written"

    pool.begin(DATA, job())
    while pool.busy:
        for _, text, error in pool.turn():
            if error:
                raise Failed(text)


def copy_bases(names: Iterable[str], folder: Path) -> None:
    """The bases that are kept, where the folder has none of their name yet."""
    for name in names:
        kept, there = KEPT / name, folder / name
        if kept.is_dir() and not there.exists():
            partial = there.with_name(f"{name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(kept, partial)
            os.replace(partial, there)
