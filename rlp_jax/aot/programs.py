# SPDX-License-Identifier: Apache-2.0
"""The two programs of an RLP step, compiled for a pod from shapes alone: the same that `rlp train` would run there."""

import contextlib
import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from rlp_jax import rlp
from rlp_jax.aot import hlo
from rlp_jax.aot.chips import Topology, devices_of
from rlp_jax.aot.hlo_cost import Traffic, traffic
from rlp_jax.aot.jaxpr_cost import Turns, count_flops, inner_jaxprs
from rlp_jax.aot.workload import PHASES, loop_turns
from rlp_jax.checkpoints_io.load import open_shape
from rlp_jax.config import Config, ConfigError, Template
from rlp_jax.data.template import TemplateTokens, check_lengths, template_tokens
from rlp_jax.models.backend import compiling_for
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.optimizer import make_optimizer
from rlp_jax.settings import check_devices, validate
from rlp_jax.sharding import batch_sharding, document_shards, make_mesh, mesh_shape, with_shardings
from rlp_jax.state import TrainState, init_state
from rlp_jax.train import in_place

CHARACTERS = 4  # of a token, where no tokenizer is at hand to count the template's
LISTED = 6  # of the largest arrays
OPTIMIZATION_LEVELS = ("O0", "O1", "O2", "O3")


class Abstract(NamedTuple):
    """A run without its arrays: shapes, types and where they would live."""

    config: Config
    topology: Topology
    model: LanguageModel
    template: TemplateTokens
    mesh: jax.sharding.Mesh
    shards: int
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    step: Callable[[Params | None], rlp.Step]  # from the parameters that a KL term is measured against


@dataclasses.dataclass
class Program:
    """A compiled half of a step.

    Attributes:
      flops: over all devices, by phase.
      module: the compiled program of one chip.
      traffic: what it moves, by phase.
      memory: bytes a chip: arguments, outputs (those that are not arguments given up), temporaries, code.
      seconds: what tracing, lowering and compiling took.
    """

    name: str
    flops: Counter
    module: hlo.Module
    traffic: dict[str, Traffic]
    memory: dict[str, int]
    seconds: float


class TooLarge(Exception):
    """A program that does not fit: `used` and `capacity` in bytes, and its largest arrays (bytes, what, where).

    The compiler's message names them, or not; then they are those of the program before it was split over chips.
    """

    def __init__(self, program: str, message: str, jaxpr: core.ClosedJaxpr | None = None):
        super().__init__(message)
        self.program = program
        self.used, self.capacity = _sizes(message)
        self.largest = _largest(message) or ([] if jaxpr is None else _largest_values(jaxpr))


def template_of(template: Template, tokenizer: Any) -> TemplateTokens:
    """The template's tokens; without a tokenizer as many as there may be, of no meaning."""
    if tokenizer is not None:
        return template_tokens(template, tokenizer)

    def stand_in(text):
        return (0,) * -(-len(text) // CHARACTERS)

    return TemplateTokens((), stand_in(template.instruction), stand_in(template.open), stand_in(template.close))


def batch_shapes(B: int, T: int, sharding: jax.sharding.Sharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of B documents, padded to T tokens, without its arrays."""
    shapes = {
        "tokens_BT": ((B, T), jnp.int32), "length_B": ((B,), jnp.int32), "span_BT": ((B, T), bool),
        "document_B": ((B,), jax.dtypes.canonicalize_dtype(jnp.int64)), "weight_B": ((B,), jnp.float32),
    }  # fmt: skip
    return {name: jax.ShapeDtypeStruct(*of, sharding=sharding) for name, of in shapes.items()}


def abstract_run(config: Config, topology: Topology) -> Abstract:
    """What `train` builds, without data and weights.

    Raises:
      ConfigError, CheckpointError: settings, model or mesh that cannot work.
    """
    validate(config)
    if config.algorithm != "rlp":
        raise ConfigError(
            f"algorithm is {config.algorithm}: only RLP's step is compiled ahead of time, set algorithm=rlp"
        )
    if topology.chips == 1:
        raise ConfigError(f"--topology {topology.name}: one chip has no mesh to compile for, take two or more")
    check_devices(config, mesh_shape(config.mesh, topology.chips))
    mesh = make_mesh(config.mesh, devices_of(topology))
    model, tokenizer = open_shape(config.model, config.compute_dtype)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=config.remat))
    template = template_of(config.template, tokenizer)
    check_lengths(template, config, model.config.max_positions)
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates)
    shards = document_shards(mesh)
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), optimizer))
    state = with_shardings(state, mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch = batch_shapes(config.batch_documents, config.data.document_tokens, batch_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)

    def step(reference_params):
        return rlp.make_step(model, optimizer, template, config, reference_params, mesh)

    return Abstract(config, topology, model, template, mesh, shards, state, batch, key, step)


def compile_step(run: Abstract, level: str | None, tokens: int) -> Iterator[Program]:
    """Compiles sampling, then learning, which starts from the shardings that sampling ends with.

    Args:
      level: one of OPTIMIZATION_LEVELS; None: as in a run.
      tokens: of each thought, for counting.

    Raises:
      TooLarge: a program that needs more memory than a chip has.
      jaxpr_cost.UnknownTurns: a loop that `loop_turns` does not know.
    """
    turns = loop_turns(run.model, run.template, run.config, run.shards, tokens)
    sample_args = run.state.params, run.state.ema_params, run.batch, run.key
    reference = run.state.params if run.config.rlp.kl_coefficient > 0 else None
    function = run.step(reference).sample
    sample, compiled = _compile("sample", run, function, sample_args, level, turns)
    yield sample
    shapes = jax.eval_shape(function, *sample_args)
    samples = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, compiled.output_shardings
    )

    def learn(state, batch, samples, reference_params):
        return run.step(reference_params).learn(state, batch, samples)

    learn = in_place(learn, run.state, run.mesh)
    yield _compile("learn", run, learn, (run.state, run.batch, samples, reference), level, turns)[0]


def _compile(name: str, run: Abstract, function: Any, args: tuple, level: str | None, turns: Turns):
    start = time.perf_counter()
    with compiling_for("tpu"), optimization(level):
        traced = function.trace(*args)
        flops = count_flops(traced.jaxpr, turns, PHASES)
        try:
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise TooLarge(name, str(error), traced.jaxpr) from error
            raise
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    seconds = time.perf_counter() - start
    module = hlo.parse(compiled.as_text())
    moved = traffic(module, turns, PHASES, run.topology.chips_per_slice)
    return Program(name, flops, module, moved, memory, seconds), compiled


@contextlib.contextmanager
def optimization(level: str | None) -> Iterator[None]:
    """Compiles with an optimisation level; None leaves JAX's own."""
    before = jax.config.jax_optimization_level
    if level is not None:
        jax.config.update("jax_optimization_level", level)
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_USED = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_SIZE = re.compile(r"Size: ([\d.]+)([KMGT]?)")


def _sizes(message: str) -> tuple[float, float]:
    found = next((found for pattern in _USED if (found := pattern.search(message))), None)
    if found is None:
        return 0.0, 0.0
    used, used_unit, capacity, unit = found.groups()
    return float(used) * _UNITS[used_unit], float(capacity) * _UNITS[unit]


def _largest_values(jaxpr: core.ClosedJaxpr) -> list[dict[str, Any]]:
    """The largest results in a jaxpr and those inside it, each shape once, over all chips."""
    found: dict[str, dict[str, Any]] = {}

    def walk(jaxpr, path):
        for eqn in jaxpr.eqns:
            here = f"{path}/{eqn.source_info.name_stack}".strip("/")
            for aval in (var.aval for var in eqn.outvars):
                if getattr(aval, "ndim", 0) and hasattr(aval.dtype, "itemsize"):
                    name = f"{aval.dtype}[{','.join(map(str, aval.shape))}] over all chips"
                    found.setdefault(name, {"bytes": aval.size * aval.dtype.itemsize, "array": name, "from": here})
            if eqn.primitive.name != "pallas_call":
                for inner in inner_jaxprs(eqn):
                    walk(inner, here)

    walk(jaxpr.jaxpr, "")
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:LISTED]


def _largest(message: str) -> list[dict[str, Any]]:
    """The compiler's own list of the largest allocations."""
    listed = []
    for entry in re.split(r"\n\s*\d+\. ", message)[1:]:
        size, shape = _SIZE.search(entry), re.search(r"Shape: (\S+)", entry)
        operator = re.search(r'op_name="([^"]*)"', entry)
        if size:
            listed.append({
                "bytes": float(size.group(1)) * _UNITS[size.group(2)],
                "array": shape.group(1).split("{")[0] if shape else "",
                "from": operator.group(1) if operator else "",
            })  # fmt: skip
    return listed[:LISTED]
