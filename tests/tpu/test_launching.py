# SPDX-License-Identifier: Apache-2.0
"""What starts a run on TPUs, as far as a machine without any can check it: the scripts' commands and the manifests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlp_jax.watchdog import LOST

TPU = Path(__file__).parents[2] / "tpu"
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/home/user"}
REQUEST = {"NAME": "mine", "ZONE": "us-west4-a", "PROJECT": "p", "BUCKET": "b"}


def shell(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(TPU / script), *arguments],
        env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, TPU.glob("*.sh")))
    found = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=TPU.parent)
    assert found.returncode == 0, found.stdout


def test_queued_resources_by_hand():
    def commands(*arguments, **environment):
        done = shell("queued.sh", "--dry-run", *arguments, **REQUEST, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (create,) = commands("create")
    assert create.startswith("gcloud compute tpus queued-resources create mine --zone us-west4-a --project p ")
    assert "--accelerator-type v5litepod-16" in create and "--node-id mine" in create and "--spot" not in create
    (create,) = commands("create", SLICES="2", SPOT="yes", ACCELERATOR="v5litepod-256")
    assert (
        "--node-count 2 --node-prefix mine --spot" in create and "v5litepod-256" in create and "node-id" not in create
    )
    (start,) = commands("start", "my.py", "--run-dir", "/gcs/runs/x")
    assert "--node all --worker all" in start and "tpu/worker.sh" in start and "my.py" in start
    assert [line.split()[:2] for line in commands("keep", "my.py")] == [
        ["gcloud", "compute"], ["git", "-C"], ["gcloud", "storage"], ["gcloud", "compute"], ["gcloud", "compute"],
    ]  # fmt: skip


def test_queued_resources_say_what_is_missing():
    done = shell("queued.sh", "--dry-run", "create", **(REQUEST | {"BUCKET": ""}))
    assert done.returncode == 2 and "BUCKET is not set" in done.stderr
    assert shell("queued.sh", "--dry-run", "start", **REQUEST).returncode == 2
    assert shell("queued.sh", "--dry-run", "launch", **REQUEST).returncode == 2


def test_a_worker_asks_the_environment_unless_it_is_told_who_it_is():
    plain = shell("worker.sh", "--dry-run", "quickstart", "--run-dir", "r").stdout.splitlines()
    assert "RLP_DISTRIBUTED=auto" in plain and plain[-1].split() == [
        "python3",
        "-m",
        "rlp_jax",
        "train",
        "quickstart",
        "--run-dir",
        "r",
    ]
    assert not any(line.startswith("LIBTPU_INIT_ARGS") for line in plain)
    told = shell("worker.sh", "--dry-run", "quickstart", "--processes", "2", "--process-id", "0").stdout
    assert "RLP_DISTRIBUTED" not in told
    assert (
        "--xla_tpu_enable_ici_ag_pipelining=true"
        in shell("worker.sh", "--dry-run", "q", RLP_TPU_FLAGS="overlap").stdout
    )


def worker(tmp_path, codes, **environment):
    """worker.sh with a program in Python's place that ends with these exit codes, one after the other."""
    program = tmp_path / "python"
    program.write_text(
        f"""#!/bin/bash
codes=({" ".join(map(str, codes))})
n=$(cat {tmp_path}/count 2>/dev/null || echo 0)
echo $((n + 1)) > {tmp_path}/count
exit "${{codes[n]}}"
"""
    )
    program.chmod(0o755)
    done = shell("worker.sh", "q", PYTHON=str(program), RLP_RESTART_DELAY="0", **environment)
    return done.returncode, int((tmp_path / "count").read_text())


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([3], 3, 1),
        ([LOST, 137, 143, 1, 0], 0, 5),
        ([LOST, 2], 2, 2),
        ([LOST] * 9, LOST, 5),
    ],
)
def test_a_worker_starts_again_what_can_be_helped(tmp_path, codes, code, starts):
    assert worker(tmp_path, codes, RLP_RESTARTS="5") == (code, starts)


def test_a_worker_in_a_pod_leaves_it_to_jobset(tmp_path):
    assert worker(tmp_path, [LOST, 0], RLP_RESTARTS="0") == (LOST, 1)


def test_a_worker_that_is_told_to_stop_stops(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/bash\ntrap 'exit 143' TERM\necho ready\nfor i in {1..600}; do sleep 0.1; done\n")
    program.chmod(0o755)
    with subprocess.Popen(
        ["bash", str(TPU / "worker.sh"), "q"], env=ENVIRONMENT | {"PYTHON": str(program)}, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(60) == 143


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-multislice.yaml"])
def test_manifests_hang_together(name):
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((TPU / "gke" / name).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = manifest["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"] and rule["name"]
    (slices,) = spec["replicatedJobs"]
    assert slices["replicas"] == (2 if "multislice" in name else 1)
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    of_host = int(container["resources"]["limits"]["google.com/tpu"])
    assert job["parallelism"] == job["completions"] == chips // of_host and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # else a pod failure policy is refused
    (exit_codes,) = (rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"])
    assert exit_codes["containerName"] == container["name"] and exit_codes["values"] == [2, 3]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert [volume["name"] for volume in pod["volumes"]] == list(mounts)
    run_dir = container["args"][container["args"].index("--run-dir") + 1]
    assert any(run_dir.startswith(path) for path in mounts.values())
    assert {"name": "RLP_RESTARTS", "value": "0"} in container["env"]


def test_manifests_pass_arguments_that_exist():
    yaml = pytest.importorskip("yaml")
    from rlp_jax.cli import parser
    from rlp_jax.config import Config
    from rlp_jax.settings import override

    for file in (TPU / "gke").glob("*.yaml"):
        (slices,) = yaml.safe_load(file.read_text())["spec"]["replicatedJobs"]
        (container,) = slices["template"]["spec"]["template"]["spec"]["containers"]
        override(Config(), parser().parse_args(["train", *container["args"]]).overrides)


def test_the_image_copies_what_exists():
    lines = (TPU / "Dockerfile").read_text().splitlines()
    copied = [path for line in lines if line.startswith("COPY") for path in line.split()[1:-1]]
    assert copied and all((TPU.parent / path).exists() for path in copied)


@pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")
def test_scripts_may_be_executed():
    assert all(os.access(TPU / name, os.X_OK) for name in ("worker.sh", "queued.sh"))
