# SPDX-License-Identifier: Apache-2.0
"""Optional packages are optional, and nothing heavy is imported before its use: in a process that has none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Whatever an extra brings, and what people have beside it. `sys.modules[name] = None` makes an import fail, and
# `importlib.util.find_spec` say that it is not there. tensorflow is not among them: tensorflow-datasets, which does
# without it, takes a blocked one for a broken one.
OPTIONAL = (
    *("torch", "transformers", "accelerate", "lm_eval", "math_verify", "latex2sympy2_extended", "qwix", "datasets"),
    *("reasoning_gym", "tensorboard", "wandb", "xprof", "libtpu", "pandas", "sentencepiece", "gcsfs"),
    *("IPython", "ipywidgets", "hypothesis", "pytest", "nbformat", "zstandard"),
)
HEAVY = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax", "grain", "chex", "matplotlib", "jinja2", "rich")
HEAVY = (*HEAVY, "tensorflow_datasets", "tokenizers", "gguf", "safetensors", "tensorboardX")
NEEDS = {"rlp_jax.evals.lm_eval_adapter": "lm_eval"}  # modules that are an adapter of an optional package

BLOCKED = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
LOADED = f"\nprint(*sorted({{m.split('.')[0] for m, module in sys.modules.items() if module}} & set({HEAVY!r})))"
HELP = """
from rlp_jax.cli import main, parser
(commands,) = [action.choices for action in parser()._actions if action.dest == "command"]
assert {"train", "eval", "sample", "convert", "report", "compile"} <= set(commands)
for command in ([], *([name] for name in commands)):
    try:
        main([*command, "--help"])
    except SystemExit as done:
        assert not done.code, command
sys.stdout = sys.__stdout__
"""


def python(program: str) -> str:
    """What a fresh process prints last."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


@pytest.mark.parametrize(
    "program", ["import rlp_jax", "import rlp_jax; dir(rlp_jax)", HELP], ids=["import", "dir", "help"]
)
def test_nothing_heavy_is_imported(program):
    assert python(BLOCKED + program + LOADED) == ""


def test_every_module_and_public_name_without_optional_packages():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "rlp_jax").rglob("*.py")
        if path.name != "__main__.py"
    )
    program = f"""
from importlib import import_module
import rlp_jax
for name in {[module for module in modules if module not in NEEDS]!r}:
    import_module(name)
for name in rlp_jax.__all__:
    getattr(rlp_jax, name)
print("all")"""
    assert python(BLOCKED + program) == "all"


@pytest.mark.parametrize("module", NEEDS)
def test_an_adapter_names_its_package(module):
    program = f"{BLOCKED}\ntry:\n    import {module}\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert python(program) == NEEDS[module]


def test_optional_packages_are_imported_inside_functions():
    """At a module's top no package that the distribution does not declare (its own adapters apart)."""
    for path in (ROOT / "rlp_jax").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and name not in NEEDS:
                base = getattr(node, "module", None)
                tops = {(base or alias.name).split(".")[0] for alias in node.names}
                assert tops.isdisjoint(OPTIONAL), f"{path}:{node.lineno}"
