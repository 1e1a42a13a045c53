# SPDX-License-Identifier: Apache-2.0
"""What compiled programs say of a run on a pod: memory a chip, traffic, and the least time that each phase can take.

The bound of a phase is the longest of four times, each at the chip's published peak: its products, its traffic in HBM,
over the interconnect, and between slices. The step's is their sum. A run takes longer: nothing here overlaps perfectly
or reaches its peak.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from rlp_jax.aot.chips import Chip
from rlp_jax.aot.hlo_cost import Traffic
from rlp_jax.aot.programs import LISTED, Abstract, Program, TooLarge
from rlp_jax.aot.workload import PHASES, needed_flops
from rlp_jax.rollout.engine import ring_sizes

OTHER = "other"  # what was traced in no phase


@dataclasses.dataclass(frozen=True)
class Phase:
    """Bytes and operations of one chip, and seconds."""

    program: str
    flops: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float
    sent_by_kind: dict[str, float]
    needed_flops: float | None

    def seconds(self, chip: Chip) -> dict[str, float]:
        """At the chip's peaks."""
        return {
            "flops": self.flops / chip.bfloat16_flops,
            "hbm": self.hbm_bytes / chip.hbm_bandwidth,
            "ici": self.ici_bytes / chip.ici_bandwidth,
            "dcn": self.dcn_bytes / (chip.dcn_bandwidth / chip.chips_per_host),
        }

    def bound(self, chip: Chip) -> tuple[str, float]:
        """What limits it, and its least time in seconds."""
        return max(self.seconds(chip).items(), key=lambda item: item[1])


def phases_of(run: Abstract, programs: Sequence[Program], tokens: int) -> dict[str, Phase]:
    """Every phase that computes or moves something."""
    chips = run.topology.chips
    needed = needed_flops(run.model.config, run.state.params, run.template, run.config, tokens)
    found = {}
    for program in programs:
        for name in sorted({*program.traffic, *program.flops}, key=lambda name: (*PHASES, "").index(name)):
            one, label = program.traffic.get(name, Traffic()), name or f"{program.name}: {OTHER}"
            found[label] = Phase(
                program.name, program.flops[name] / chips, one.hbm_bytes, one.ici_bytes, one.dcn_bytes,
                one.by_kind(), needed[name] / chips if name in needed else None,
            )  # fmt: skip
    return found


def memory_of(run: Abstract, programs: Sequence[Program]) -> dict[str, Any]:
    """Bytes of a chip's memory: what stays there from step to step, and what each program adds."""
    parts = {"params": run.state.params, "ema": run.state.ema_params, "optimizer": run.state.opt_state}
    memory: dict[str, Any] = {name: _shard_bytes(tree) for name, tree in parts.items()}
    memory["capacity"] = run.topology.chip.hbm_bytes
    for program in programs:
        used = dict(program.memory)
        if program.name == "sample":
            used["optimizer"] = memory["optimizer"]  # not an argument, but there
            memory["cache"] = _cache_bytes(run, program)
        memory[program.name] = used | {"peak": sum(used.values())}
    return memory


def _shard_bytes(tree: Any) -> float:
    def of_leaf(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return float(sum(map(of_leaf, jax.tree.leaves(tree))))


def _cache_bytes(run: Abstract, sample: Program) -> float:
    """Keys, values and recurrent states among what the last decoding loop carries."""
    config, model = run.config, run.model.config
    last = ring_sizes(config.rlp.thought_tokens)[-1]
    columns = {len(run.template.open) + last, config.data.document_tokens + len(run.template.context)}
    heads = None if model.hybrid is None else (model.hybrid.head_dim, model.hybrid.state_size)

    def cached(shape):
        keys = len(shape.dims) >= 4 and shape.dims[-1] == model.head_dim and shape.dims[-2] in columns
        return keys or (heads is not None and shape.dims[-2:] == heads)

    carried = [
        sum(shape.bytes for shape in instruction.shapes if cached(shape))
        for computation in sample.module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]
    return max(carried, default=0.0)


def largest_arrays(programs: Sequence[Program]) -> list[dict[str, Any]]:
    """The largest results in HBM, each shape once."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for program in programs:
        computations = program.module.computations.values()
        fusions = (i for c in computations for i in c.instructions.values() if i.opcode == "fusion")
        fused = {name for fusion in fusions for name in fusion.called["calls"]}
        for computation in computations:
            if computation.name in fused:
                continue
            for instruction in computation.instructions.values():
                if instruction.opcode in ("parameter", "get-tuple-element", "tuple", "while", "bitcast"):
                    continue
                for shape in instruction.shapes:
                    if shape.main:
                        entry = {"bytes": shape.bytes, "array": str(shape), "from": instruction.op_name}
                        found.setdefault((program.name, str(shape)), entry | {"program": program.name})
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:LISTED]


def largest_collectives(programs: Sequence[Program]) -> list[dict[str, Any]]:
    """Those that send the most, all turns together."""
    found = [
        {"program": program.name} | dataclasses.asdict(collective)
        for program in programs
        for moved in program.traffic.values()
        for collective in moved.collectives
    ]
    return sorted(found, key=lambda entry: -(entry["ici_bytes"] + entry["dcn_bytes"]))[:LISTED]


def largest_traffic(programs: Sequence[Program]) -> list[dict[str, Any]]:
    """The instructions that move the most bytes in HBM, all turns together."""
    found = [
        {"program": program.name, "phase": phase, "bytes": moved, "arrays": arrays, "from": op_name}
        for program in programs
        for phase, one in program.traffic.items()
        for (op_name, arrays), moved in one.moved.items()
    ]
    return sorted(found, key=lambda entry: -entry["bytes"])[:LISTED]


def advice(run: Abstract, error: TooLarge | None, memory: dict[str, Any] | None) -> list[str]:
    """What to change where memory does not suffice, most effective first."""
    config, mesh = run.config, run.mesh.shape
    part = config.batch_documents // (config.rlp.microbatches * config.rlp.minibatches)
    program = error.program if error is not None else max(("sample", "learn"), key=lambda name: memory[name]["peak"])
    state = sum(_shard_bytes(tree) for tree in (run.state.params, run.state.ema_params, run.state.opt_state))
    said = []
    if program == "learn" and part > run.shards:
        most = config.rlp.microbatches * part // run.shards
        said.append(f"raise rlp.microbatches (now {config.rlp.microbatches}, at most {most})")
    if program == "learn" and config.remat != "layer":
        said.append(f"set remat=layer (now {config.remat})")
    if program == "sample":
        thoughts = config.rlp.positions * config.rlp.group_size
        slots = config.rlp.slots or thoughts
        if slots > 1:
            said.append(f"lower rlp.slots (now {slots} of {thoughts} thoughts of a document at a time)")
        if config.rlp.rollout_dtype is None and config.compute_dtype == "float32":
            said.append("set rlp.rollout_dtype=bfloat16 (now float32)")
        sampling = config.mesh.rollout_tensor or mesh["tensor"]
        if config.mesh.rollout == "gathered" and sampling < run.model.config.n_kv_heads:
            said.append(f"raise mesh.rollout_tensor (now {sampling}): it splits gathered weights, keys and values")
    if mesh["data"] > 1:
        size = f"{state / 2**30:.1f} GiB a chip"
        said.append(f"move devices from mesh.data (now {mesh['data']}) to mesh.fsdp: the state is {size}")
    if mesh["tensor"] < run.model.config.n_kv_heads:
        said.append(f"raise mesh.tensor (now {mesh['tensor']}): it splits keys, values and activations as well")
    if config.compute_dtype == "float32":
        said.append("set compute_dtype=bfloat16 (now float32)")
    return [*said, "or take more chips, or fewer batch_documents"]
