# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a program before it is compiled, from its jaxpr, loops counted by their turns.

The compiler's own count takes a loop's body once and a Pallas kernel for nothing. Here products and convolutions are
counted (an addition and a multiplication each), nothing else: what runs on the matrix units. What a shard_map does on
every device is counted for every device.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Turns:
    """What a program does not say of itself.

    Attributes:
      loops: turns of loops that end when something is found while they run, by the innermost `jax.named_scope` around.
      grid: (name of a kernel, its equation) -> size of the grid's last axis where that is not known before.
    """

    loops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    grid: Callable[[str, Any], float] | None = None

    def of(self, path: str) -> float | None:
        """Turns of the loop at a path of scopes, None if nothing is given for it."""
        name = innermost(path, self.loops)
        return None if name is None else self.loops[name]


def innermost(path: str, names: Iterator[str] | Sequence[str] | Mapping) -> str | None:
    """The last of these names in a path of scopes, which transformations may have wrapped: "jvp(name)/while"."""
    last = None
    wanted = set(names)
    for word in re.finditer(r"[\w.]+", path):
        if word.group() in wanted:
            last = word.group()
    return last


class UnknownTurns(ValueError):
    """A loop without a number of turns."""


def count_flops(jaxpr: core.ClosedJaxpr, turns: Turns | None = None, phases: Sequence[str] = ()) -> Counter:
    """Operations of the whole program, over all devices, by the innermost of `phases` that they are traced in ("" for
    none).

    Raises:
      UnknownTurns: a loop or kernel whose turns depend on values, and `turns` says nothing of it.
    """
    total = Counter()
    _walk(jaxpr.jaxpr, "", 1.0, turns or Turns(), tuple(phases), total)
    return total


def _walk(jaxpr: core.Jaxpr, path: str, times: float, turns: Turns, phases: tuple[str, ...], total: Counter) -> None:
    for eqn in jaxpr.eqns:
        here = f"{path}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        if name in _PRODUCTS:
            total[innermost(here, phases) or ""] += times * _PRODUCTS[name](eqn)
        elif name == "cond":
            branches = []
            for branch in eqn.params["branches"]:
                counted = Counter()
                _walk(branch.jaxpr, here, times, turns, phases, counted)
                branches.append(counted)
            total.update(max(branches, key=lambda counted: counted.total()))
        elif name == "while":
            if _has_products(eqn.params["body_jaxpr"].jaxpr):
                count = turns.of(here)
                if count is None:
                    raise UnknownTurns(f"nobody has said how often the loop at {here} turns")
                _walk(eqn.params["body_jaxpr"].jaxpr, here, times * count, turns, phases, total)
        else:
            repeated = times * _repeats(name, eqn, turns)
            for inner in inner_jaxprs(eqn):
                _walk(inner, here, repeated, turns, phases, total)


def _repeats(name: str, eqn, turns: Turns) -> float:
    """How often an equation runs the jaxprs that it holds."""
    if name == "scan":
        return eqn.params["length"]
    if name == "shard_map":
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
    if name == "pallas_call":
        mapping = eqn.params["grid_mapping"]
        known = math.prod(size for size in mapping.grid if isinstance(size, int))
        if not mapping.num_dynamic_grid_bounds:
            return known
        kernel = eqn.params["name"]
        if turns.grid is None:
            raise UnknownTurns(f"nobody has said how large the grid of kernel {kernel} is")
        return known * turns.grid(kernel, eqn)
    return 1


def inner_jaxprs(eqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters: of jit, remat, scan, custom derivatives, shard_map, kernels."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _has_products(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _PRODUCTS or any(_has_products(inner) for inner in inner_jaxprs(eqn))
        for eqn in jaxpr.eqns
    )


def _dot_general(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    out, left = eqn.outvars[0].aval, eqn.invars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)


def _convolution(eqn) -> float:
    kernel = eqn.invars[1].aval.shape
    features = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[features]


_PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
