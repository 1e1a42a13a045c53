# SPDX-License-Identifier: Apache-2.0
"""`rlp compile`: does a run fit on a pod, what does it move, and what is the least time of a step; without a TPU."""

import dataclasses
import json
from typing import Any

from rlp_jax.aot.chips import Topology
from rlp_jax.aot.programs import Abstract, TooLarge, abstract_run, compile_step
from rlp_jax.aot.roofline import advice, largest_arrays, largest_collectives, largest_traffic, memory_of, phases_of
from rlp_jax.config import Config, ConfigError, MeshConfig
from rlp_jax.sharding import ROLLOUT

GIB, TERA, GIGA = 2**30, 1e12, 1e9
TENSOR, DATA = (1, 2, 4, 8), (1, 2, 4, 8, 16)  # sizes that a search tries
O0 = "compiled at O0, which overestimates temporaries: what does not fit may fit at the default level"


def compile_for(config: Config, topology: Topology, level: str | None = None, tokens: int | None = None) -> dict:
    """Compiles a step for a pod and says everything of it that can be said without one.

    Args:
      config: all settings; `model` may name a published shape.
      level: of optimisation, "O0" to "O3"; None: as in a run.
      tokens: of each thought; None: the most there may be.

    Returns:
      What `--json` prints: numbers are of one chip, in bytes, operations and seconds, unless they say otherwise.

    Raises:
      ConfigError, CheckpointError: settings, model or mesh that cannot work.
    """
    tokens = config.rlp.thought_tokens if tokens is None else tokens
    if not 1 <= tokens <= config.rlp.thought_tokens:
        raise ConfigError(f"--tokens is {tokens}: a thought has 1 to {config.rlp.thought_tokens} (rlp.thought_tokens)")
    if topology.slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=topology.slices))
    run = abstract_run(config, topology)
    said: dict[str, Any] = {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": dict(run.mesh.shape),
        "rollout_tensor": run.mesh.shape.get(ROLLOUT, 1) * run.mesh.shape["tensor"],
        "model": config.model,
        "remat": config.remat,
        "documents": config.batch_documents,
        "thoughts": config.rlp.positions * config.rlp.group_size,  # of a document
        "microbatches": config.rlp.microbatches,
        "slots": config.rlp.slots or config.rlp.positions * config.rlp.group_size,
        "optimization_level": level or "default",
        "tokens": tokens,
        "chip": dataclasses.asdict(topology.chip),
    }
    programs = []
    try:
        for program in compile_step(run, level, tokens):
            programs.append(program)
    except TooLarge as error:
        return said | _too_large(run, error)
    phases, memory = phases_of(run, programs, tokens), memory_of(run, programs)
    fits = all(memory[program.name]["peak"] <= memory["capacity"] for program in programs)
    chip = topology.chip
    said |= {
        "fits": fits,
        "step_bound_s": sum(phase.bound(chip)[1] for phase in phases.values()),
        "phases": {
            name: {"bound_s": phase.bound(chip)[1], "limit": phase.bound(chip)[0], "seconds": phase.seconds(chip)}
            | dataclasses.asdict(phase)
            for name, phase in phases.items()
        },
        "hbm_per_chip": memory,
        "largest_arrays": largest_arrays(programs),
        "largest_collectives": largest_collectives(programs),
        "largest_traffic": largest_traffic(programs),
        "compile_seconds": {program.name: round(program.seconds, 1) for program in programs},
    }
    return said if fits else said | {"advice": advice(run, None, memory)}


def _too_large(run: Abstract, error: TooLarge) -> dict[str, Any]:
    return {
        "fits": False,
        "step_bound_s": None,
        "phases": {},
        "hbm_per_chip": {"capacity": error.capacity, error.program: {"peak": error.used}},
        "program": error.program,
        "largest_arrays": error.largest,
        "advice": advice(run, error, None),
    }


def search(config: Config, topology: Topology, tokens: int | None = None, tell=print) -> list[dict]:
    """Compiles for every sensible mesh at O0; those that fit first, the fastest bound first.

    Raises:
      ConfigError: no mesh splits the batch and the model.
    """
    found = []
    meshes = list(candidate_meshes(config, topology))
    if not meshes:
        raise ConfigError(
            f"no mesh of {topology.chips} chips splits batch_documents {config.batch_documents}: "
            "make it a multiple of what data and fsdp can be"
        )
    for mesh, microbatches in meshes:
        rlp = dataclasses.replace(config.rlp, microbatches=microbatches)
        result = compile_for(dataclasses.replace(config, mesh=mesh, rlp=rlp), topology, "O0", tokens)
        tell(one_line(result))
        found.append(result)
    return sorted(found, key=lambda result: (not result["fits"], result["step_bound_s"] or 0.0))


def candidate_meshes(config: Config, topology: Topology):
    """Meshes whose document axes divide the batch, with the most microbatches up to the configured that do, too; where
    weights are gathered for sampling, also with the most devices along 'tensor' there."""
    for tensor in TENSOR:
        for data in DATA:
            fsdp, rest = divmod(topology.chips_per_slice, tensor * data)
            if rest or (fsdp == 1 and data > 1):
                continue
            ways = topology.slices * data * fsdp
            share = config.batch_documents // config.rlp.minibatches
            parts = [m for m in range(1, config.rlp.microbatches + 1) if share % m == 0 and share // m % ways == 0]
            if not parts:
                continue
            mesh = MeshConfig(topology.slices, data, fsdp, tensor, config.mesh.rollout)
            yield mesh, parts[-1]
            most = TENSOR[-1]
            if mesh.rollout == "gathered" and tensor < most and fsdp % (most // tensor) == 0:
                yield dataclasses.replace(mesh, rollout_tensor=most), parts[-1]


def one_line(result: dict) -> str:
    """Of a search."""
    mesh = " ".join(f"{name}={size}" for name, size in result["mesh"].items())
    where = f"{mesh} microbatches={result['microbatches']}"
    memory = result["hbm_per_chip"]
    peak = max(memory[name]["peak"] for name in ("sample", "learn") if name in memory)
    used = f"{peak / GIB:.1f} of {memory['capacity'] / GIB:.1f} GiB"
    return (
        f"{where}: step at least {result['step_bound_s']:.2f} s, {used}"
        if result["fits"]
        else (f"{where}: does not fit, {used}")
    )


def describe(result: dict) -> str:
    """A result as text: memory, phases, and what to change if it does not fit."""
    mesh = ", ".join(f"{name} {size}" for name, size in result["mesh"].items())
    several = f"{result['slices']} slices of " if result["slices"] > 1 else ""
    lines = [f"{result['model']} on {several}{result['topology']} ({result['chips']} chips: {mesh}), "
             f"thoughts of {result['tokens']} tokens, optimisation level {result['optimization_level']}"]  # fmt: skip
    memory, capacity = result["hbm_per_chip"], result["hbm_per_chip"]["capacity"]
    lines.append(f"\nmemory a chip, GiB of {capacity / GIB:.2f}")
    for name in ("params", "ema", "optimizer", "cache"):
        if name in memory:
            lines.append(f"  {name:<12} {memory[name] / GIB:8.2f}")
    for name in ("sample", "learn"):
        if name in memory:
            parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in memory[name].items() if part != "peak")
            lines.append(f"  {name:<12} {memory[name]['peak'] / GIB:8.2f}" + (f"  ({parts})" if parts else ""))
    if result["phases"]:
        lines.append("\nphase           bound s  limit  TFLOP (needed)      HBM GB    ICI GB    DCN GB   a chip")
        for name, phase in result["phases"].items():
            needed = "-" if phase["needed_flops"] is None else f"{phase['needed_flops'] / TERA:.2f}"
            lines.append(
                f"{name:<15} {phase['bound_s']:7.3f}  {phase['limit']:<5}  {phase['flops'] / TERA:7.2f} ({needed:>7}) "
                f"{phase['hbm_bytes'] / GIGA:10.2f} {phase['ici_bytes'] / GIGA:9.3f} {phase['dcn_bytes'] / GIGA:9.3f}"
            )
            for kind, sent in phase["sent_by_kind"].items():
                if sent:
                    lines.append(f"    {kind:<24} {sent / GIGA:.3f} GB")
        lines.append(f"step at least {result['step_bound_s']:.3f} s; remat is {result['remat']}")
        lines.append("\ncollectives that send most")
        for one in result["largest_collectives"]:
            sent = (one["ici_bytes"] + one["dcn_bytes"]) / GIGA
            lines.append(f"  {sent:8.3f} GB in {one['times']:g} times: {one['kind']} {one['shape']} among "
                         f"{one['group']}, {one['op_name']}")  # fmt: skip
        lines.append("\ninstructions that move most in HBM")
        for one in result["largest_traffic"]:
            lines.append(f"  {one['bytes'] / GIGA:10.2f} GB {one['phase']}: {one['arrays']}, {one['from']}")
    lines.append("\nlargest arrays")
    for one in result["largest_arrays"]:
        lines.append(f"  {one['bytes'] / GIB:8.3f} GiB {one['array']}, {one['from']}")
    if not result["fits"]:
        lines.append("\ndoes not fit" + (f": {result['program']} ran out of memory" if "program" in result else ""))
        lines += [f"  - {advice}" for advice in result["advice"]]
    if result["optimization_level"] == "O0":
        lines.append(f"\n{O0}")
    return "\n".join(lines)


def as_json(result: dict) -> str:
    return json.dumps(result)
