# SPDX-License-Identifier: Apache-2.0
"""Memory that loading takes: a process's peak over what it held before, against its largest tensor plus its shards.

    python experiments/benchmarks/loading.py [--quick] [--json]

Workload: a synthetic checkpoint of Qwen3-1.7B's shapes, random bfloat16 in shards of 1 GB (3.4 GB on disk, in a
temporary directory, removed afterwards), loaded by processes of their own: float32 onto one device (6.9 GB),
float32 over eight simulated devices of one process with fsdp=8 (the same memory, in eighths), and bfloat16 onto one
device. `over_bound` is peak / (largest tensor as stored + own shards); loading streams where it is at most 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import finish

from rlp_jax.checkpoints_io.huggingface import INDEX, open_directory
from rlp_jax.checkpoints_io.leaves import Target
from rlp_jax.checkpoints_io.safetensors_file import write_file
from rlp_jax.checkpoints_io.tables import tensors
from rlp_jax.models.presets import CONFIGS
from rlp_jax.models.transformer import ModelConfig

QUICK = ModelConfig("qwen3", vocab_size=8_192, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64,
                    d_ff=1_024, tie_embeddings=True, qk_norm=True)  # fmt: skip
CASES = {  # name: (devices, param_dtype)
    "one_device_float32": (1, "float32"),
    "eight_devices_float32": (8, "float32"),
    "one_device_bfloat16": (1, "bfloat16"),
}


def write_checkpoint(directory: Path, config: ModelConfig, shard_bytes: int) -> int:
    """Random weights of a config, shard by shard. Returns the bytes of the largest tensor as stored."""
    from rlp_jax.checkpoints_io.hf_config import config_to_json

    block = np.random.default_rng(0).normal(scale=0.02, size=2**20).astype(np.float32)
    names = [
        (tensor.name.huggingface.format(layer), tensor.stored)
        for tensor in tensors(config)
        for layer in tensor.layers or (None,)
    ]
    shards, room = [], 0
    for name, shape in names:
        size = 2 * int(np.prod(shape))
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, shape, lambda shape=shape: np.resize(block, shape)))
        room -= size
    weight_map = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard, "BF16")
        weight_map |= {name: file for name, _, _ in shard}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config_to_json(config, None)))
    return max(2 * int(np.prod(shape)) for _, shape in names)


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def load_here(directory: str, dtype: str) -> dict:
    """Loads in this process and measures it."""
    import jax

    from rlp_jax.config import MeshConfig
    from rlp_jax.sharding import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    jax.block_until_ready(jax.device_put(np.zeros(8)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = memory("VmRSS"), time.perf_counter()
    _, read = open_directory(directory)
    params = read(Target(mesh, dtype=dtype))
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {"devices": jax.device_count(), "peak_bytes": peak, "shards_bytes": shards, "seconds": round(seconds, 1)}


def load_elsewhere(directory: str, devices: int, dtype: str) -> dict:
    """The same in a process of its own, with simulated devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--load", directory, "--dtype", dtype]
    done = subprocess.run(command, env=os.environ | flags, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of 6 million parameters")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load_here(args.load, args.dtype)))
        return
    config = QUICK if args.quick else CONFIGS["qwen3-1.7b"]
    result = {"workload": "4 layers, 256 wide" if args.quick else "qwen3-1.7b, bfloat16 shards"}
    with tempfile.TemporaryDirectory() as directory:
        largest = write_checkpoint(Path(directory), config, 2**21 if args.quick else 10**9)
        result["largest_tensor_MB"] = round(largest / 1e6, 1)
        for name, (devices, dtype) in CASES.items():
            row = load_elsewhere(directory, devices, dtype)
            result[f"{name}_peak_MB"] = round(row["peak_bytes"] / 1e6, 1)
            result[f"{name}_shards_MB"] = round(row["shards_bytes"] / 1e6, 1)
            result[f"{name}_over_bound"] = round(row["peak_bytes"] / (largest + row["shards_bytes"]), 3)
            result[f"{name}_seconds"] = row["seconds"]
    finish(result, args.json)


if __name__ == "__main__":
    main()
