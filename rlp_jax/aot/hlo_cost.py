# SPDX-License-Identifier: Apache-2.0
"""What a compiled program moves on one chip: bytes in HBM, and bytes over the interconnect by kind of collective.

Everything is counted from the program's text. An instruction reads its operands and writes its result, a fusion as
one; slices of larger arrays count as what is taken from them, updates in place as what is put in. A loop's body counts
by its turns: those that the compiler knows, else those given for the scope that it was traced in.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlp_jax.aot.hlo import Computation, Instruction, Module, Shape, trip_count
from rlp_jax.aot.jaxpr_cost import Turns, UnknownTurns, innermost

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "optimization-barrier", "add-dependency", "copy-done", "async-done", "async-update", "domain",
    "rng-get-and-update-state", "send-done", "recv-done",
}  # fmt: skip
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=(?:\w+)?\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


@dataclasses.dataclass
class Collective:
    """One collective instruction: `times` it runs, its result, and what each chip sends for it, all times together."""

    kind: str
    shape: str
    group: int
    times: float
    ici_bytes: float
    dcn_bytes: float
    op_name: str
    result_bytes: float  # of one time


@dataclasses.dataclass
class Traffic:
    """Of one phase, a chip. moved: bytes in HBM by (op_name, results) of the instructions, all times together."""

    moved: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    @property
    def hbm_bytes(self) -> float:
        return float(sum(self.moved.values()))

    @property
    def ici_bytes(self) -> float:
        return sum(one.ici_bytes for one in self.collectives)

    @property
    def dcn_bytes(self) -> float:
        return sum(one.dcn_bytes for one in self.collectives)

    def by_kind(self) -> dict[str, float]:
        """Bytes sent by kind."""
        kinds = Counter()
        for one in self.collectives:
            kinds[one.kind] += one.ici_bytes + one.dcn_bytes
        return dict(kinds)


def traffic(module: Module, turns: Turns, phases: Sequence[str], chips_per_slice: int) -> dict[str, Traffic]:
    """Traffic of each phase ("" for what belongs to none).

    Args:
      turns: of loops whose number the compiler does not know.
      phases: names of scopes; an instruction belongs to the innermost that it was traced in.
      chips_per_slice: collectives among chips of several slices go over the hosts' network.

    Raises:
      UnknownTurns: a loop without a number of turns.
    """
    counter = _Counter(module, turns, tuple(phases), chips_per_slice)
    counter.walk(module.computations[module.entry], 1.0, "")
    return counter.phases_traffic


class _Counter:
    def __init__(self, module: Module, turns: Turns, phases: tuple[str, ...], chips_per_slice: int):
        self.module, self.turns, self.phases, self.chips_per_slice = module, turns, phases, chips_per_slice
        self.phases_traffic: dict[str, Traffic] = {}

    def walk(self, computation: Computation, times: float, phase: str) -> None:
        for instruction in computation.instructions.values():
            here = innermost(instruction.op_name, self.phases) or phase
            called = instruction.called
            if instruction.opcode == "while":
                count = trip_count(self.module, computation, instruction)
                count = self.turns.of(self._path(instruction)) if count is None else count
                if count is None:
                    raise UnknownTurns(f"nobody has said how often the loop {self._path(instruction)} turns")
                self.walk(self.module.computations[called["body"][0]], times * count, here)
            elif instruction.opcode == "conditional":
                self._heaviest([self.module.computations[name] for name in called["branches"]], times, here)
            elif instruction.opcode in ("call", "async-start"):
                for name in called.get("to_apply", []) + called.get("calls", []):
                    self.walk(self.module.computations[name], times, here)
            else:
                self._count(computation, instruction, times, here)

    def _path(self, loop: Instruction) -> str:
        """The loop's scopes; where the compiler has lost them, those that everything in its body shares."""
        if loop.op_name:
            return loop.op_name
        body = self.module.computations[loop.called["body"][0]]
        inside = [i.op_name.split("/") for i in body.instructions.values() if i.op_name]
        shared = []
        for parts in zip(*inside, strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return "/".join(shared)

    def _heaviest(self, branches: list[Computation], times: float, phase: str) -> None:
        """The branch that moves the most."""
        counted = []
        for branch in branches:
            other = _Counter(self.module, self.turns, self.phases, self.chips_per_slice)
            other.walk(branch, times, phase)
            counted.append(other.phases_traffic)
        heaviest = max(counted, key=lambda traffic: sum(one.hbm_bytes + one.ici_bytes for one in traffic.values()))
        for name, one in heaviest.items():
            own = self._of(name)
            own.moved.update(one.moved)
            own.collectives += one.collectives

    def _of(self, phase: str) -> Traffic:
        return self.phases_traffic.setdefault(phase, Traffic())

    def _count(self, computation: Computation, instruction: Instruction, times: float, phase: str) -> None:
        own = self._of(phase)
        if moved := times * self._moved(computation, instruction):
            own.moved[instruction.op_name, " ".join(map(str, instruction.shapes))] += moved
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            own.collectives.append(self._collective(computation, instruction, kind, times))
        elif instruction.opcode == "fusion":  # the compiler fuses collectives with the products beside them
            self._fused_collectives(self._fused(instruction), own, times)

    def _fused_collectives(self, fused: Computation, own: Traffic, times: float) -> None:
        for inner in fused.instructions.values():
            kind = inner.opcode.removesuffix("-start")
            if inner.opcode == "fusion":
                self._fused_collectives(self._fused(inner), own, times)
            elif kind in COLLECTIVES:
                # A reduce-scatter is written as an all-reduce of which each chip takes its part.
                kind = "reduce-scatter" if "all-reduce-scatter" in fused.name else kind
                own.collectives.append(self._collective(fused, inner, kind, times))

    def _moved(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes of HBM read and written by one instruction that is no control flow."""
        opcode = instruction.opcode
        if opcode in _NOTHING or opcode.endswith("-done") or "AllocateBuffer" in instruction.rest:
            return 0.0
        operands = [self._shapes(computation, name) for name in instruction.operands]
        result = sum(shape.hbm for shape in instruction.shapes)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return result + min(_hbm(operands[0]), sum(shape.bytes for shape in instruction.shapes))
        if opcode == "dynamic-update-slice":
            return 2 * _hbm(operands[1])
        if opcode == "scatter":
            return sum(2 * _hbm(shapes) for shapes in operands[len(instruction.shapes) :])
        if opcode in ("copy-start", "slice-start"):  # the result names target, source and a flag
            target = instruction.shapes[0]
            source = operands[0][0]
            return target.hbm + (target.bytes if source.main else 0.0)
        if opcode.removesuffix("-start") in COLLECTIVES:
            return sum(map(_hbm, operands)) + sum(shape.hbm for shape in _results(instruction))
        if opcode == "fusion":
            return self._fusion(instruction, operands)
        return sum(map(_hbm, operands)) + result

    def _fusion(self, instruction: Instruction, operands: list[tuple[Shape, ...]]) -> float:
        fused = self._fused(instruction)
        read = sum(min(self._read(fused, number, _hbm(shapes)), _hbm(shapes)) for number, shapes in enumerate(operands))
        roots = self._roots(fused)
        if len(roots) != len(instruction.shapes):  # one operation with several results
            return read + _hbm(instruction.shapes)
        written = (self._written(*root, shape) for root, shape in zip(roots, instruction.shapes, strict=True))
        return read + sum(written)

    def _fused(self, fusion: Instruction) -> Computation:
        return self.module.computations[fusion.called["calls"][0]]

    def _read(self, fused: Computation, number: int, whole: float) -> float:
        """Bytes that a fusion reads of an operand: what its slices take, nothing of what it updates in place."""
        if whole == 0.0:
            return 0.0
        parameter = next(
            i.name for i in fused.instructions.values() if i.opcode == "parameter" and i.operands[0] == str(number)
        )
        read, pending = 0.0, [parameter]
        while pending:
            name = pending.pop()
            for user in fused.instructions.values():
                if name not in user.operands or user.opcode == "parameter":
                    continue
                if user.opcode in ("bitcast", "reshape"):
                    pending.append(user.name)
                elif user.opcode == "fusion":
                    inner = self._fused(user)
                    read += sum(self._read(inner, n, whole) for n, used in enumerate(user.operands) if used == name)
                elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                    read += sum(shape.bytes for shape in user.shapes)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    return whole
        return read

    def _roots(self, fused: Computation) -> list[tuple[Computation, Instruction]]:
        """What each result of a fusion comes from."""
        root = fused.root
        return (
            [(fused, fused.instructions[name]) for name in root.operands] if root.opcode == "tuple" else [(fused, root)]
        )

    def _written(self, fused: Computation, root: Instruction, shape: Shape) -> float:
        """Bytes that a fusion writes for one result: of an update in place the update."""
        while root.opcode in ("bitcast", "reshape", "fusion"):
            if root.opcode == "fusion":
                fused, root = self._roots(self._fused(root))[0]
            else:
                root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice" and shape.main:
            return sum(part.bytes for part in fused.instructions[root.operands[1]].shapes)
        return shape.hbm

    def _shapes(self, computation: Computation, name: str) -> tuple[Shape, ...]:
        found = computation.instructions.get(name)
        return found.shapes if found else ()

    def _collective(self, computation: Computation, instruction: Instruction, kind: str, times: float) -> Collective:
        groups = replica_groups(instruction.rest)
        size = max((len(group) for group in groups), default=1)
        result = _results(instruction)
        operand_bytes = sum(sum(s.bytes for s in self._shapes(computation, name)) for name in instruction.operands)
        result_bytes = sum(shape.bytes for shape in result)
        sent = sent_bytes(kind, operand_bytes, result_bytes, size)
        slices = max((len({chip // self.chips_per_slice for chip in group}) for group in groups), default=1)
        # A ring over several slices crosses between them once a slice: each chip's share goes over the hosts' network.
        return Collective(
            kind, " ".join(map(str, result)), size, times, 0.0 if slices > 1 else times * sent,
            times * sent if slices > 1 else 0.0, instruction.op_name, result_bytes,
        )  # fmt: skip


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.hbm for shape in shapes)


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """The arrays that a collective gives: of a start, whose result names operands too, the second half."""
    arrays = [shape for shape in instruction.shapes if shape.dims or len(instruction.shapes) == 1]
    if not instruction.opcode.endswith("-start") or len(arrays) < 2:
        return instruction.shapes
    if instruction.opcode == "all-reduce-start":
        return tuple(arrays)
    return tuple(arrays[len(arrays) // 2 :])


def sent_bytes(kind: str, operand_bytes: float, result_bytes: float, group: int) -> float:
    """What each of a group of chips sends at least, as a ring does."""
    if group <= 1 and kind != "collective-permute":
        return 0.0
    share = (group - 1) / group if group else 0.0
    return {
        "all-gather": result_bytes * share,
        "all-reduce": 2 * result_bytes * share,
        "reduce-scatter": operand_bytes * share,
        "all-to-all": operand_bytes * share,
        "collective-permute": operand_bytes,
        "collective-broadcast": operand_bytes,
    }[kind]


def replica_groups(attributes: str) -> list[list[int]]:
    """The chips that a collective joins: lists written out, or as an iota "[groups,size]<=[dims]T(order)"."""
    explicit = _EXPLICIT.search(attributes)
    if explicit:
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d, ]*)\}", explicit.group(1))]
    mesh = _MESH.search(attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        chips = _device_ids(mesh.group(2), math.prod(axes.values()))
        return _join(chips, axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh.group(3)))
    iota = _IOTA.search(attributes)
    if iota:
        groups, size, dims, order = iota.groups()
        return _iota(dims, order).reshape(int(groups), int(size)).tolist()
    pairs = _PAIRS.search(attributes)
    if pairs:
        return [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs.group(1).split("},{")]
    return []


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in a grid of `dims`, its axes put into `order`, flat."""
    sizes = [int(n) for n in dims.split(",")]
    chips = np.arange(math.prod(sizes)).reshape(sizes)
    return (chips.transpose([int(n) for n in order.split(",")]) if order else chips).reshape(-1)


def _device_ids(text: str | None, count: int) -> np.ndarray:
    """The chips of a mesh in its order: counted, as "[dims]T(order)", or written out."""
    if text is None:
        return np.arange(count)
    iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text)
    return _iota(*iota.groups()) if iota else np.array([int(n) for n in re.findall(r"\d+", text)])


def _join(chips: np.ndarray, axes: dict[str, int], joined: list[tuple[str, str, str]]) -> list[list[int]]:
    """Groups of chips along the joined axes of a mesh; an axis with (before, size) is joined in part."""
    split, inside = [], []
    for name, size in axes.items():
        part = next((entry for entry in joined if entry[0] == name), None)
        if part is None or not part[2]:
            split.append(size)
            inside.append(part is not None)
        else:
            before, middle = int(part[1]), int(part[2])
            split += [before, middle, size // (before * middle)]
            inside += [False, True, False]
    order = sorted(range(len(split)), key=lambda axis: inside[axis])
    size = math.prod(n for n, joins in zip(split, inside, strict=True) if joins)
    return chips.reshape(split).transpose(order).reshape(-1, size).tolist()
