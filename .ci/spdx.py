#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The licence in one line at the head of every Python file of ours: `# SPDX-License-Identifier: Apache-2.0`.

    python .ci/spdx.py            # add it where it is missing
    python .ci/spdx.py --check    # exit code 1 and the names of files without it

A first line that names the interpreter stays first.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = "# SPDX-License-Identifier: Apache-2.0\n"


def with_licence(source: str) -> str:
    """The source with the line in its place; unchanged where it has it."""
    head, body = "", source
    if source.startswith("#!"):
        head, _, body = source.partition("\n")
        head += "\n"
    return source if body.startswith(LINE) or not body.strip() else head + LINE + body


def files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def main() -> int:
    missing = [path for path in files() if with_licence(text := path.read_text(encoding="utf-8")) != text]
    if "--check" in sys.argv[1:]:
        for path in missing:
            print(f"{path.relative_to(ROOT)}: no licence line, python .ci/spdx.py adds it", file=sys.stderr)
        return int(bool(missing))
    for path in missing:
        path.write_text(with_licence(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(missing)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
