# SPDX-License-Identifier: Apache-2.0
"""Imports go one way (ARCHITECTURE.md), read from the source with ast; and the checker catches wrong examples."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "rlp_jax"
ROOT = Path(__file__).parents[1] / PACKAGE

# ARCHITECTURE.md, lowest first. A module imports from layers below it and, without cycles, from its own.
LAYERS = (
    ("objective", "config", "metrics", "settings", "nearest", "overrides", "validation"),
    ("models",),
    (
        "bridge",
        "checkpoints_io",
        "rollout",
        "data",
        "state",
        "optimizer",
        "sharding",
        "checkpoint",
        "manifest",
        "storage",
        "writers",
        "live",
        "wandb_writer",
        "interrupt",
        "distributed",
        "watchdog",
        "goodput",
        "profiling",
    ),
    ("learner", "rlp", "baselines", "algorithms", "evals", "report", "rows"),
    ("train",),
    ("aot",),
    # "" is the package itself, whose functions are the way in for other code.
    ("api", "cli", "commands", "__main__", ""),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
ALONE = {"objective": {"chex", "jax"}}  # parts that import these packages and nothing else
BOTTOM = {"models.layers"}  # modules that import nothing of ours, though they live in a package further up
LINEN_PART = "models"


def imports(source: str, module: str, modules: set[str]) -> set[str]:
    """Absolute names a module imports anywhere in its source, inside functions too.

    `from rlp_jax import rlp` gives `rlp_jax.rlp` where that is one of `modules`; a name that is not one of them gives
    the module it is taken from.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if module in packages(modules) else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in modules or f"{base}.{alias.name}" == "flax.linen" else base)
    return names


def packages(modules: set[str]) -> set[str]:
    return {m.rpartition(".")[0] for m in modules}


def part_of(module: str) -> str:
    """`rlp_jax.models.cache` is of the part `models`; `rlp_jax` itself of the part ``."""
    return module.split(".")[1] if "." in module else ""


def violations(sources: dict[str, str]) -> list[str]:
    """What breaks the import direction in a package given as {module name: source}, one line each."""
    found, edges, modules = [], {}, set(sources)
    for module, source in sorted(sources.items()):
        part = part_of(module)
        if part not in LEVEL:
            found.append(f"{module}: `{part}` is in no layer, add it to ARCHITECTURE.md and to LAYERS")
            continue
        for name in sorted(imports(source, module, modules)):
            top = name.split(".")[0]
            if (name + ".").startswith("flax.linen.") and part != LINEN_PART:
                found.append(f"{module}: imports flax.linen, which only {LINEN_PART}/ may")
            if part in ALONE and top not in ALONE[part]:
                found.append(f"{module}: imports {name}, only {sorted(ALONE[part])} are allowed")
            if top != PACKAGE:
                continue
            if module.removeprefix(f"{PACKAGE}.") in BOTTOM:
                found.append(f"{module}: imports {name}, but stands at the bottom")
            target = part_of(name)
            if LEVEL.get(target, -1) > LEVEL[part]:
                found.append(f"{module}: imports {name}, which is in a higher layer")
            if module != name:
                edges.setdefault(module, set()).add(name)
    return found + [f"cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles between modules, each once."""
    found, done = [], set()

    def visit(module, path):
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def package_sources() -> dict[str, str]:
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def test_imports_go_one_way():
    sources = package_sources()
    assert f"{PACKAGE}.objective" in sources and f"{PACKAGE}.models.layers" in sources
    assert violations(sources) == []


GOOD = {
    "rlp_jax": "def load(p):\n    from rlp_jax.checkpoints_io import load\n",
    "rlp_jax.objective": "import chex\nimport jax.numpy as jnp\n",
    "rlp_jax.config": "import json\n",
    "rlp_jax.models": "",
    "rlp_jax.models.layers": "import flax.linen as nn\n",
    "rlp_jax.models.cache": "from flax import linen as nn\nfrom rlp_jax.models import layers\n",
    "rlp_jax.checkpoints_io": "from rlp_jax.models.cache import Cache\n",
    "rlp_jax.rlp": "from rlp_jax import objective\nfrom rlp_jax.models import cache as c\n",
    "rlp_jax.train": "from rlp_jax import rlp\n",
}


def test_the_checker_accepts_a_good_package():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("rlp_jax.objective", "import optax\n", "rlp_jax.objective: imports optax"),
        ("rlp_jax.objective", "from rlp_jax.config import Config\n", "rlp_jax.objective: imports rlp_jax.config"),
        ("rlp_jax.models.cache", "from rlp_jax.rlp import step\n", "imports rlp_jax.rlp, which is in a higher layer"),
        ("rlp_jax.models.cache", "from rlp_jax import rlp\n", "imports rlp_jax.rlp, which is in a higher layer"),
        ("rlp_jax.models.cache", "import rlp_jax.rlp as r\n", "imports rlp_jax.rlp, which is in a higher layer"),
        ("rlp_jax.models.cache", "from ..rlp import step\n", "imports rlp_jax.rlp, which is in a higher layer"),
        ("rlp_jax.models.cache", "from .. import rlp\n", "imports rlp_jax.rlp, which is in a higher layer"),
        ("rlp_jax.models", "from . import layers\nfrom ..rlp import x\n", "imports rlp_jax.rlp, which is in a higher"),
        ("rlp_jax.models.cache", "def f():\n    import rlp_jax.train\n", "imports rlp_jax.train, which is in a higher"),
        ("rlp_jax.config", "from rlp_jax import load\n", "imports rlp_jax, which is in a higher layer"),
        ("rlp_jax.models.layers", "from rlp_jax.config import Dtype\n", "but stands at the bottom"),
        ("rlp_jax.rlp", "import flax.linen as nn\n", "rlp_jax.rlp: imports flax.linen"),
        ("rlp_jax.rlp", "from flax import linen\n", "rlp_jax.rlp: imports flax.linen"),
        ("rlp_jax.rlp", "from flax.linen import Module\n", "rlp_jax.rlp: imports flax.linen"),
        ("rlp_jax.helpers", "", "`helpers` is in no layer"),
        ("rlp_jax.evals", "from rlp_jax.evals import loop\n", None),
    ],
)
def test_the_checker_catches_a_wrong_example(module, source, message):
    found = violations({**GOOD, module: source})
    if message is None:
        assert found == []
    else:
        assert message in found[0]
        assert all(line.startswith("cycle") for line in found[1:])  # an import upwards may close one, too


def test_the_checker_catches_a_cycle():
    wrong = {"rlp_jax.rlp": "import rlp_jax.evals\n", "rlp_jax.evals": "from rlp_jax.rlp import score\n"}
    assert violations({**GOOD, **wrong}) == ["cycle: rlp_jax.evals -> rlp_jax.rlp -> rlp_jax.evals"]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("rlp_jax.objective", ("flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib", "jinja2")),
        ("rlp_jax.report.page", ("matplotlib", "jinja2", "flax")),
    ],
)
def test_importing_one_module_alone_brings_nothing_heavy(module, forbidden):
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert set(loaded.stdout.split()) & set(forbidden) == set()
