# SPDX-License-Identifier: Apache-2.0
"""`rlp train --dry-run`: what a run would compute, with which memory and over how many tokens, from shapes alone.

Nothing is compiled, and no weight is read or made: a pod's run is described on a laptop. What one chip of a pod
needs, and in which time, is `rlp compile`'s to say.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlp_jax.algorithms import ALGORITHMS
from rlp_jax.aot.matching import Means, matched, measure
from rlp_jax.aot.matching import describe as describe_budget
from rlp_jax.aot.programs import batch_shapes, template_of
from rlp_jax.checkpoints_io.load import open_shape
from rlp_jax.config import RESPONDING, WITHOUT_THOUGHTS, Config
from rlp_jax.data.template import TemplateTokens, check_lengths
from rlp_jax.learner import Learner
from rlp_jax.models.backend import compiling_for
from rlp_jax.models.cache import fork
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.models.vocabulary import chunk_tokens
from rlp_jax.optimizer import make_optimizer
from rlp_jax.rollout import packing
from rlp_jax.state import init_state
from rlp_jax.validation import validate

MEASURED_BYTES = 64 << 20  # of all files together: so much text is read to count its tokens, more is not
GENERATORS = ("compose", "reasoning_gym/")  # sources without a file
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a run would take.

    Attributes:
      shapes: arrays of a step by name, as "int32[512,2048]".
      parameters: counts, "all" of them and "embedding", "layers" and so on as the tree is called.
      memory: bytes over all devices together, by what they are for.
      tokens: of a step, by name ("read", "sampled", "scored"); `run_tokens` of the whole run.
      measured: whether documents were read for their mean length; else they count at data.document_tokens.
      notes: what the figures leave out.
    """

    config: Config
    shapes: dict[str, str]
    parameters: dict[str, int]
    memory: dict[str, float]
    tokens: dict[str, float]
    measured: bool
    matched: Config | None
    notes: tuple[str, ...]

    @property
    def run_tokens(self) -> dict[str, float]:
        """Tokens of the whole run."""
        return {name: self.config.steps * count for name, count in self.tokens.items()}


def dry_run(config: Config) -> DryRun:
    """Describes a run without running it.

    Raises:
      ConfigError, CheckpointError: settings or model that cannot work.
    """
    validate(config)
    model, tokenizer = open_shape(config.model, config.compute_dtype)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=config.remat))
    template = template_of(config.template, tokenizer)
    if tokenizer is not None or config.algorithm not in RESPONDING:
        check_lengths(template, config, model.config.max_positions)
    notes = []
    if tokenizer is None:
        notes.append(f"{config.model} is a shape without a tokenizer: the template's tokens are estimated")
    optimizer = make_optimizer(config.optimizer, config.steps * config.updates)
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), optimizer))
    means, measured = _means(config, notes)
    samples = _samples(config, model, template, optimizer, state.params, notes)
    parts = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in state.params.items()}
    matched_run = None
    if config.algorithm == "rlp":
        matched_run = matched(config, "flops", means, count=False)
    batch = batch_shapes(config.batch_documents, config.data.document_tokens)
    shapes = {name: _shape(leaf) for name, leaf in batch.items()}
    if samples is not None:
        shapes |= {name: _shape(leaf) for name, leaf in samples._asdict().items() if hasattr(leaf, "shape")}
    shapes |= _learner_shapes(config, model, template)
    return DryRun(
        config,
        shapes,
        {"all": sum(parts.values()), **parts},
        _memory(config, model, template, state),
        _tokens(config, means),
        measured,
        matched_run,
        tuple(notes),
    )


def _means(config: Config, notes: list[str]) -> tuple[Means, bool]:
    """Mean tokens of a document, counted where that is quick, else the most there may be."""
    most = Means(float(config.data.document_tokens), float(config.rlp.thought_tokens))
    files = [Path(source) for source in config.data.sources if not source.startswith(GENERATORS)]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        notes.append(f"{absent[0]} is not there to be read: documents count at data.document_tokens")
        return most, False
    if sum(file.stat().st_size for file in files) > MEASURED_BYTES:
        notes.append("the files are large: documents count at data.document_tokens")
        return most, False
    if open_shape(config.model, config.compute_dtype)[1] is None:
        return most, False
    return measure(config), True


def _samples(
    config: Config, model: LanguageModel, template: TemplateTokens, optimizer: Any, params: Any, notes: list[str]
) -> Any:
    """The shapes of what a step samples, None where it samples nothing."""
    if config.algorithm in WITHOUT_THOUGHTS:
        return None
    if config.algorithm == "rpt" and config.rpt.proxy:
        notes.append("rpt.proxy is another model: the shapes of what is sampled are left out")
        return None
    reference = params if config.rlp.kl_coefficient > 0 else None
    step = ALGORITHMS[config.algorithm](model, optimizer, template, config, reference, None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = batch_shapes(config.batch_documents, config.data.document_tokens)
    with compiling_for("tpu"):  # layers stay a scan there: on CPU decoding is unrolled, which takes long to trace
        return jax.eval_shape(step.sample, params, params, batch, key)


def _sequences(config: Config, model: LanguageModel, template: TemplateTokens) -> tuple[int, int]:
    """Sequences computed together by the learner, and tokens of each."""
    if config.algorithm in WITHOUT_THOUGHTS:
        longest = config.data.document_tokens + len(template.plain)
        tokens = getattr(config, config.algorithm).sequence_tokens + len(template.plain)
        return (max(1, tokens // longest), longest) if model.config.hybrid else (1, tokens)
    rlp, T = config.rlp, config.data.document_tokens
    documents = config.batch_documents // rlp.minibatches
    if model.config.hybrid is None:
        return 1, Learner(model, template, config).bins(rlp.microbatches, documents, T).capacity
    branch = packing.longest_branch(rlp.thought_tokens, template, rlp.horizon)
    return documents // rlp.microbatches, T + len(template.context) + rlp.positions * rlp.group_size * branch


def _learner_shapes(config: Config, model: LanguageModel, template: TemplateTokens) -> dict[str, str]:
    rows, tokens = _sequences(config, model, template)
    return {"learner, at a time": f"{rows} x {tokens} tokens"}


def _memory(config: Config, model: LanguageModel, template: TemplateTokens, state: Any) -> dict[str, float]:
    """Bytes over all devices. `learner` is what the gradient adds to the state: summed and new gradients, what the
    backward pass keeps of one microbatch under `remat` (found by tracing it), and three copies of a chunk of logits."""
    weights = _bytes(state.params)
    memory = {"parameters": weights, "EMA": _bytes(state.ema_params), "optimizer": _bytes(state.opt_state)}
    if config.rlp.kl_coefficient > 0:
        memory["reference"] = weights
    lasting = sum(memory.values())
    if config.algorithm not in WITHOUT_THOUGHTS:
        memory["caches"] = _cache_bytes(config, model, template, state.params)
        low = config.rlp.rollout_dtype or config.compute_dtype
        size = {"float32": 0, "bfloat16": 2, "int8": 1}[low]
        memory["sampler's weights"] = weights / 4 * size  # of another type than the masters
    rows, tokens = _sequences(config, model, template)
    several = config.algorithm in WITHOUT_THOUGHTS or config.rlp.microbatches > 1
    chunk = min(rows * tokens, packing.SCORED, chunk_tokens(model.config.vocab_size))
    memory["learner"] = (
        weights * (2 if several else 1)
        + _kept_bytes(model, state.params, rows, tokens)
        + 3.0 * 4 * chunk * model.config.vocab_size
    )
    memory["peak"] = lasting + max(
        memory["learner"], memory.get("caches", 0.0) + memory.get("sampler's weights", 0.0)
    )  # fmt: skip
    return memory


def _kept_bytes(model: LanguageModel, params: Any, rows: int, tokens: int) -> float:
    """What the backward pass of whole sequences keeps from the forward pass, weights left out."""

    def forward(params, tokens_BT):
        return jax.vjp(lambda params: model.hidden(params, tokens_BT)[0], params)[1]

    kept = jax.eval_shape(forward, params, jax.ShapeDtypeStruct((rows, tokens), jnp.int32))
    ours: dict[tuple, int] = {}
    for leaf in jax.tree.leaves(params):
        ours[leaf.shape] = ours.get(leaf.shape, 0) + 1
    total = 0.0
    for leaf in jax.tree.leaves(kept):
        if ours.get(leaf.shape, 0):  # a weight, or the same in the type that is computed in
            ours[leaf.shape] -= 1
            continue
        total += _size(leaf)
    return total


def _cache_bytes(config: Config, model: LanguageModel, template: TemplateTokens, params: Any) -> float:
    """Documents' keys and values (or states) and a place in the ring for every token of every thought being decoded."""
    rlp, B = config.rlp, config.batch_documents
    branches = rlp.positions * rlp.group_size
    slots = min(rlp.slots or branches, branches)
    tokens = config.data.document_tokens + len(template.context)
    low = rlp.rollout_dtype or config.compute_dtype
    sampler = model.in_dtype("bfloat16") if low == "bfloat16" else model

    def caches(params, tokens_BT, prefix_BQ):
        _, cache = sampler.hidden(params, tokens_BT, stops_BK=prefix_BQ[:, : rlp.positions])
        return fork(cache, prefix_BQ, len(template.open) + rlp.thought_tokens)

    shapes = jax.ShapeDtypeStruct((B, tokens), jnp.int32), jax.ShapeDtypeStruct((B, slots), jnp.int32)
    return _bytes(jax.eval_shape(caches, params, *shapes))


def _tokens(config: Config, means: Means) -> dict[str, float]:
    """Tokens of one step: documents read, thoughts sampled at the cap, true tokens scored after them."""
    rlp, B = config.rlp, config.batch_documents
    read = B * means.document_tokens
    if config.algorithm in WITHOUT_THOUGHTS:
        return {"read": read}
    thoughts = B * rlp.positions * rlp.group_size
    counts = {"read": read, "sampled": thoughts * means.thought_tokens}
    return counts | ({} if config.algorithm in RESPONDING else {"scored": float(thoughts * rlp.horizon)})


def describe(run: DryRun) -> str:
    """A dry run in lines for a reader."""
    config, rlp = run.config, run.config.rlp
    lines = [f"dry run of {config.name}: algorithm {config.algorithm}, model {config.model}, {config.steps:,} steps, "
             "nothing is written"]  # fmt: skip
    parts = ", ".join(f"{name} {count:,}" for name, count in run.parameters.items() if name != "all")
    lines.append(f"\nparameters  {run.parameters['all']:,} ({parts})")
    lines.append("\nshapes of a step")
    lines += [f"  {name:<22} {shape}" for name, shape in run.shapes.items()]
    lines.append("\nmemory, all devices together")
    lines += [f"  {name:<22} {_human(size)}" for name, size in run.memory.items() if size and name != "peak"]
    lines.append(f"  {'peak, about':<22} {_human(run.memory['peak'])} (state, and the larger of learner and sampler)")
    source = "mean documents of this data" if run.measured else "documents at data.document_tokens"
    if config.algorithm not in WITHOUT_THOUGHTS:
        source += f", thoughts at the cap of {rlp.thought_tokens:,} tokens"
    lines.append(f"\ntokens{'':<16} {'a step':>16} {'the run':>20}   ({source})")
    lines += [
        f"  {name:<20} {count:16,.0f} {run.run_tokens[name]:20,.0f}" for name, count in run.tokens.items()
    ]  # fmt: skip
    if run.matched is not None:
        lines.append("\ncontinued pretraining for as much compute (rlp train ... --as cpt --match flops)")
        lines += [f"  {line}" for line in describe_budget(run.matched).splitlines()]
    lines += [f"\nnote: {note}" for note in run.notes]
    mesh = config.mesh
    if (mesh.slices, mesh.data, mesh.fsdp, mesh.tensor) != (1, -1, 1, 1):
        lines.append("\nnote: what one chip of a pod needs: rlp compile EXPERIMENT --topology v5e:16x16")
    return "\n".join(lines)


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _size(leaf: Any) -> float:
    try:
        return float(math.prod(leaf.shape) * leaf.dtype.itemsize)
    except (AttributeError, TypeError):  # not an array, or without a size of its own
        return 0.0


def _bytes(tree: Any) -> float:
    return sum(map(_size, jax.tree.leaves(tree)))


def _human(size: float) -> str:
    power = min(int(math.log(max(size, 1.0), 1024)), len(UNITS) - 1)
    return f"{size / 1024**power:,.2f} {UNITS[power]}"
