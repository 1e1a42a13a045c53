#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""THIRD_PARTY.md: whose work this one stands on, and under which terms, from what is installed and declared.

    python .ci/third_party.py            # write it again
    python .ci/third_party.py --check    # exit code 1 and a line for each difference

Licences are what the installed packages say of themselves. A package of an extra that is not installed keeps the row it
has; one without a row has to be installed first.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from rlp_jax.models.presets import WEIGHTS, Packaged

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "THIRD_PARTY.md"
INTRO = """\
# Third parties

Written by `.ci/third_party.py`. rlp_jax is under the Apache License 2.0 (LICENSE). What it needs is
installed beside it, under these terms.

## Packages

| package | needed by | licence |
|---|---|---|
"""
WEIGHTS_INTRO = """
## Weights

No weights of others are in the distribution. These are fetched by name when somebody asks for them:

| name | from the package | licence |
|---|---|---|
"""
DATA = """
## Data

No data set is in the distribution. `experiments/results/smollm2` quotes problems of GSM8K (MIT licence, OpenAI) in its
log of thoughts; only the source distribution has it. The models in `rlp_jax/assets` and `experiments/paper/bases` are
our own, under the licence of the project.
"""
# How packages write one and the same licence.
NAMES = {
    "Apache License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Python Software Foundation License": "PSF-based",
}


def declared() -> dict[str, str]:
    """Package to who needs it: "all", or the extras in their order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {_name(requirement): ["all"] for requirement in project["dependencies"]}
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            if _name(requirement) == project["name"]:  # other extras of this one, which have rows of their own
                continue
            by = needed.setdefault(_name(requirement), [])
            if by != ["all"]:
                by.append(f"`{extra}`")
    return {name: ", ".join(by) for name, by in sorted(needed.items(), key=lambda item: item[0].lower())}


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def licence(package: str) -> str | None:
    """What the installed package says, None where it is not installed."""
    try:
        meta = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return None
    classified = [text.rpartition(" :: ")[2] for text in meta.get_all("Classifier") or [] if text.startswith("License")]
    said = meta.get("License-Expression") or (classified or [meta.get("License") or "not said"])[0]
    return NAMES.get(said := said.strip().splitlines()[0], said)


def page() -> str:
    before = dict(re.findall(r"^\| ([\w.-]+) \| [^|]*\| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE))
    rows, missing = [], []
    for name, by in declared().items():
        said = licence(name) or before.get(name)
        if said is None:
            missing.append(name)
        rows.append(f"| {name} | {by} | {said} |")
    if missing:
        sys.exit(f"third_party.py: install {', '.join(missing)} to read the licence")
    return INTRO + "\n".join(rows) + "\n" + WEIGHTS_INTRO + "\n".join(weights()) + "\n" + DATA


def weights() -> list[str]:
    rows = []
    for name, source in WEIGHTS.items():
        if not isinstance(source, Packaged):
            parts = getattr(source, "parts", (source,))
            packages = ", ".join(f"{part.distribution} {part.version}" for part in parts)
            rows.append(f"| {name} | {packages} | {source.license} |")
    return rows


def main() -> int:
    now, before = page(), PAGE.read_text()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(now)
        return 0
    different = sorted(set(now.splitlines()) ^ set(before.splitlines()))
    if different:
        print("THIRD_PARTY.md is not current: python .ci/third_party.py", *different, sep="\n", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
