# SPDX-License-Identifier: Apache-2.0
"""The paper's runs compiled for TPU pods: one JSON file an entry below results/, and a table of them all.

`python tpu/table.py` compiles what has no file yet, one entry at a time (minutes each), and prints the table.
`--only NAME` takes one entry, `--print` compiles nothing. Each file is what `rlp compile --json` ends with.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is compiled where: arguments of `rlp compile`."""

    experiment: str
    topology: str
    slices: int = 1
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        several = f"-x{self.slices}" if self.slices > 1 else ""
        return f"{self.experiment}-{self.topology.replace(':', '-')}{several}"

    def command(self, level: str | None) -> list[str]:
        """The command line."""
        settings = [word for setting in self.settings for word in ("--set", setting)]
        options = ["--topology", self.topology, "--slices", str(self.slices), "--json", *settings]
        options += ["--level", level] if level else []
        return [sys.executable, "-m", "rlp_jax", "compile", f"pod/{self.experiment}", *options]


def parts(chips: int, documents: int = 512) -> tuple[str, ...]:
    """Settings with which a chip has one document of each microbatch."""
    return (f"rlp.microbatches={max(1, documents // chips)}",)


QWEN, QWEN_14B, NEMOTRON = "qwen3_1_7b", "qwen3_14b", "nemotron_nano_12b_v2"
# Fewer slots than thoughts where a chip's memory does not hold the keys and values of all at once.
ENTRIES = (
    Entry(QWEN, "v5e:8x8", settings=(*parts(64), "rlp.slots=2")),
    Entry(QWEN, "v5e:16x16", settings=parts(256)),
    Entry(QWEN, "v5p:4x4x4", settings=parts(64)),
    Entry(QWEN, "v6e:8x8", settings=(*parts(64), "rlp.slots=4")),
    Entry(QWEN, "v5e:16x16", slices=2, settings=parts(512)),
    Entry(QWEN_14B, "v5p:4x4x4", settings=(*parts(64), "rlp.slots=8")),
    Entry(QWEN_14B, "v5p:4x8x8", settings=parts(256)),
    Entry(QWEN_14B, "v6e:16x16", settings=(*parts(32), "mesh.tensor=8", "rlp.slots=4")),
    # A hybrid's learner holds the scores of its attention layers: heads on several chips make them fit.
    Entry(NEMOTRON, "v5p:4x4x4", settings=(*parts(32), "mesh.tensor=2")),
    Entry(NEMOTRON, "v5p:4x8x8", settings=(*parts(128), "mesh.tensor=2")),
    # The residual stream of one document's 16 thoughts alone takes two thirds of such a chip.
    Entry(NEMOTRON, "v6e:16x16", settings=(*parts(32), "mesh.tensor=8", "rlp.group_size=6")),
)


def compile_entry(entry: Entry, level: str | None) -> None:
    """Writes the entry's file.

    Raises:
      RuntimeError: the command failed other than by saying that the run does not fit.
    """
    done = subprocess.run(entry.command(level), capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{entry.name}: {done.stderr.strip()[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{entry.name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".tmp").replace(path)


def table() -> str:
    """All results as Markdown."""
    columns = (
        "run",
        "chips",
        "mesh",
        "batch",
        "level",
        "fits",
        "peak GiB",
        "of GiB",
        "step at least s",
        "longest phase",
        "learner",
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for entry in ENTRIES:
        path = RESULTS / f"{entry.name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        memory, phases = result["hbm_per_chip"], result["phases"]
        peak = max(memory[name]["peak"] for name in ("sample", "learn") if name in memory)
        mesh = " ".join(f"{name}={size}" for name, size in result["mesh"].items() if size > 1)
        batch = f"{result['documents']} × {result['thoughts']}"
        chips = f"{result['slices']} × " * (result["slices"] > 1) + result["topology"]
        row = [result["model"], chips, mesh, batch, result["optimization_level"],
               "yes" if result["fits"] else "no", f"{peak / GIB:.2f}", f"{memory['capacity'] / GIB:.2f}"]  # fmt: skip
        if phases:
            longest = max(phases, key=lambda name: phases[name]["bound_s"])
            gradient = phases["gradient"]
            row += [f"{result['step_bound_s']:.2f}",
                    f"{longest} {phases[longest]['bound_s']:.2f} ({phases[longest]['limit']})",
                    f"{gradient['flops'] / gradient['needed_flops']:.3f} of the needed operations"]  # fmt: skip
        else:
            row += ["-"] * 3
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="an entry's name")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    parser.add_argument("--level", choices=("O0", "O1", "O2", "O3"), help="of optimisation")
    args = parser.parse_args()
    for entry in () if args.print else ENTRIES:
        if args.only not in (None, entry.name) or (RESULTS / f"{entry.name}.json").is_file():
            continue
        print(f"{entry.name}: compiling", file=sys.stderr, flush=True)
        try:
            compile_entry(entry, args.level)
        except RuntimeError as error:
            print(error, file=sys.stderr)
    print(table())


if __name__ == "__main__":
    main()
