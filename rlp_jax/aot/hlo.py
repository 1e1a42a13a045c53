# SPDX-License-Identifier: Apache-2.0
"""The compiled program as text (HLO), read into instructions: as far as counting its traffic needs it.

The text is the optimised and scheduled program of one chip. Layouts tell where an array lies: those without a memory
space S(n) in the chip's main memory (HBM).
"""

import dataclasses
import math
import re

BYTES = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: `main` says whether it lies in HBM."""

    dtype: str
    dims: tuple[int, ...]
    main: bool

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0)

    @property
    def hbm(self) -> float:
        """Bytes in HBM."""
        return self.bytes if self.main else 0.0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass
class Instruction:
    """`shapes` are the arrays of its result, one unless it is a tuple."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str  # attributes and metadata
    root: bool

    @property
    def op_name(self) -> str:
        """Where it was traced: scopes and operation, "" if the compiler has lost it."""
        found = _OP_NAME.search(self.rest)
        return found.group(1) if found else ""

    @property
    def called(self) -> dict[str, list[str]]:
        """Computations by role: body, condition, calls, to_apply, branches."""
        called: dict[str, list[str]] = {}
        for role, name in _CALLED.findall(self.rest):
            role = "branches" if role in ("true_computation", "false_computation") else role
            called.setdefault(role, []).append(name)
        branches = _BRANCHES.search(self.rest)
        if branches:
            called["branches"] = [name.strip().lstrip("%") for name in branches.group(1).split(",")]
        return called

    @property
    def value(self) -> int | None:
        """Of an integer constant."""
        found = re.match(r"(-?\d+)\)", self.rest) if self.opcode == "constant" else None
        return int(found.group(1)) if found else None


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


@dataclasses.dataclass
class Module:
    computations: dict[str, Computation]
    entry: str


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Turns of a loop of `computation` that counts from a constant to a constant, None if it is another kind."""
    known = _TRIP_COUNT.search(loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called["condition"][0]]
    compare = condition.root
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return None
    start, stop = (_integer(condition, computation, loop, name) for name in compare.operands)
    return None if stop is None else stop - (start or 0)


def _integer(condition: Computation, around: Computation, loop: Instruction, name: str) -> int | None:
    """The constant that a value of a loop's condition is, or starts from."""
    found = condition.instructions[name]
    if found.opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", found.rest).group(1))
        start = around.instructions[loop.operands[0]]
        if start.opcode != "tuple":
            return None
        found = around.instructions[start.operands[index]]
        while found.opcode == "copy":
            found = around.instructions[found.operands[0]]
    return found.value


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    Raises:
      ValueError: no entry computation in it.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            header = _HEADER.match(line)
            if header:
                current = Computation(header.group(2))
                computations[current.name] = current
                entry = current.name if header.group(1) else entry
            continue
        instruction = _instruction(line)
        if instruction is not None:
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    result, rest = line[at:end], line[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    stop = len(rest) if opcode == "constant" else _closing("(" + rest, 0) - 1
    operands = () if opcode == "constant" else tuple(_NAME.findall(rest[:stop]))
    if opcode != "constant" and not operands and rest[:stop]:  # names without %, in hand-written or newer text
        operands = tuple(word.strip().split(" ")[-1] for word in rest[:stop].split(","))
    attributes = rest if opcode == "constant" else rest[stop:]
    return Instruction(start.group(2), opcode.strip(), shapes(result), operands, attributes, bool(start.group(1)))


def _closing(text: str, opened: int) -> int:
    """The place of the bracket that closes the one at `opened`."""
    depth = 0
    for place in range(opened, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type: "bf16[8,128]{1,0:T(8,128)(2,1)S(1)}" or a tuple of such."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.strip().lstrip("<=")) for size in dims.split(",") if size.strip())
        found.append(Shape(dtype, sizes, "S(" not in layout))
    return tuple(found)
