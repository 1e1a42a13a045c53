# SPDX-License-Identifier: Apache-2.0
"""`rlp compile`: tiny runs compiled by the real TPU compiler, what does not fit, and what cannot be."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from tiny_run import tiny_config

from rlp_jax.cli import main
from rlp_jax.config import Config, DataConfig, MeshConfig, RLPConfig, to_json
from rlp_jax.models.presets import CONFIGS

libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu, the TPU compiler, is not installed: extra tpu"
)
POD = Config(model="qwen3-8b", batch_documents=4, compute_dtype="bfloat16", data=DataConfig(("-",)),
             rlp=RLPConfig(group_size=2, thought_tokens=8), mesh=MeshConfig(data=1, fsdp=-1))  # fmt: skip


def experiment(path, config):
    path.write_text(
        f"from rlp_jax.settings import from_json\n\n\ndef config():\n    return from_json({to_json(config)!r}, '')\n"
    )
    return str(path)


def compiled(*arguments):
    """Exit code, text and the last line's JSON, in a process that takes no TPU."""
    alone = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", "rlp_jax", "compile", *arguments, "--level", "O0", "--json"]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr[-4_000:]
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "tensor"), [("v5e:2x2", 1), ("v6e:2x2", 2), ("v5p:2x2x1", 2)])
def test_compiles_a_tiny_run_for_every_generation(tmp_path, topology, tensor):
    mesh = MeshConfig(data=1, fsdp=-1, tensor=tensor, rollout="gathered")
    config = tiny_config(tmp_path, compute_dtype="bfloat16", mesh=mesh)
    code, text, said = compiled(experiment(tmp_path / "tiny.py", config), "--topology", topology)
    assert code == 0 and said["fits"] and said["chips"] == 4
    assert said["mesh"] == {"slice": 1, "data": 1, "fsdp": 4 // tensor, "tensor": tensor}
    memory, phases = said["hbm_per_chip"], said["phases"]
    # Two layers, embedding and norms, float32: 10,656 parameters in matrices, 160 in norms that all chips keep.
    matrices = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48) + 256 * 32
    assert 4 * matrices / 4 <= memory["params"] <= 4 * matrices / (4 // tensor) + 4 * 160
    assert memory["ema"] == memory["params"] and memory["optimizer"] == pytest.approx(2 * memory["params"], abs=16)
    assert memory["sample"]["arguments"] >= 2 * memory["params"] and memory["cache"] > 0
    assert {"baseline", "prefill", "rollout", "gradient", "update"} <= set(phases)
    for name in ("baseline", "prefill", "rollout", "gradient"):
        assert 0 < phases[name]["needed_flops"] < 2 * phases[name]["flops"]
        assert phases[name]["hbm_bytes"] > 0
        assert phases[name]["bound_s"] == max(phases[name]["seconds"].values())
    heaviest = said["largest_traffic"]
    assert heaviest[0]["bytes"] <= phases[heaviest[0]["phase"]]["hbm_bytes"] and heaviest == sorted(
        heaviest, key=lambda one: -one["bytes"]
    )
    assert said["step_bound_s"] == pytest.approx(sum(phase["bound_s"] for phase in phases.values()))
    assert phases["gradient"]["ici_bytes"] > 0 and phases["gradient"]["dcn_bytes"] == 0  # gradients are summed
    assert "O0 compiles" not in text and "overestimates" in text


@libtpu
@pytest.mark.slow
def test_compiles_what_does_not_fit(tmp_path):
    """8 billion parameters on four chips: the answer names large arrays and what to change."""
    code, text, said = compiled(experiment(tmp_path / "pod.py", POD), "--topology", "v5e:2x2")
    assert code == 1 and not said["fits"] and said["step_bound_s"] is None
    memory = said["hbm_per_chip"]
    assert memory[said["program"]]["peak"] > memory["capacity"] > 15 * 2**30
    assert said["largest_arrays"][0]["bytes"] > 2**30 and "[" in said["largest_arrays"][0]["array"]
    assert all(one["bytes"] < 2**40 and one["from"] for one in said["largest_arrays"])
    assert any("mesh.tensor" in advice for advice in said["advice"])
    assert "does not fit" in text


def test_published_shapes_have_no_weights_and_need_none():
    from rlp_jax.checkpoints_io.load import open_shape

    model, tokenizer = open_shape("qwen3-14b", "bfloat16")
    assert tokenizer is None and model.config.compute_dtype == "bfloat16"
    assert model.config.d_model == CONFIGS["qwen3-14b"].d_model


@pytest.mark.parametrize("name", ["qwen3_1_7b", "qwen3_14b", "nemotron_nano_12b_v2"])
def test_the_papers_runs(name):
    from rlp_jax.settings import load_experiment, validate

    config = load_experiment(f"pod/{name}")
    validate(config)
    rlp = config.rlp
    assert (config.batch_documents, rlp.group_size, config.data.document_tokens, rlp.thought_tokens) == (
        512, 16, 2048, 2048,
    )  # fmt: skip
    assert (config.compute_dtype, rlp.temperature, config.optimizer.learning_rate) == ("bfloat16", 0.7, 1e-6)
    assert config.model in CONFIGS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pod/qwen3_1_7b"], "required: --topology"),
        (["pod/qwen3", "--topology", "v5e:4x4"], "unknown experiment 'pod/qwen3'"),
        (["pod/qwen3_1_7b", "--topology", "v4:4x4"], "'v4' is not a known chip"),
        (["pod/qwen3_1_7b", "--topology", "v5p:4x4"], "a v5p has 3 axes"),
        (["pod/qwen3_1_7b", "--topology", "v5e:4x4", "--slices", "0"], "--slices is 0"),
        (["pod/qwen3_1_7b", "--topology", "v5e:4x4", "--tokens", "0"], "--tokens is 0"),
        (["pod/qwen3_1_7b", "--topology", "v5e:4x4", "--tokens", "2049"], "--tokens is 2049"),
        (["pod/qwen3_1_7b", "--topology", "v5e:4x4", "--search", "--level", "O3"], "--level O3 with --search"),
        (["pod/qwen3_1_7b", "--topology", "v5e:1x1"], "take two or more"),
        (
            ["pod/qwen3_1_7b_cpt", "--topology", "v5e:4x4"],
            "algorithm is cpt: only RLP's step is compiled ahead of time",
        ),
        (["pod/qwen3_1_7b", "--topology", "v5e:4x4", "--set", "rlp.group_size=1"], "rlp.group_size is 1"),
    ],
)
def test_what_cannot_be(capsys, arguments, message):
    try:
        code = main(["compile", *arguments])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("rlp: error: ") and err.count("\n") == 1 and message in err, err


def test_without_the_compiler(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compile", "pod/qwen3_1_7b", "--topology", "v5e:4x4"]) == 2
    assert "pip install 'rlp_jax[tpu]'" in capsys.readouterr().err
