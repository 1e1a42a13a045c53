# SPDX-License-Identifier: Apache-2.0
"""The least time of an RLP step on paper: sampling against learning against communication, from 8 to 8,192 chips.

    python tpu/scale.py [--write]

Prints the tables of SCALE.md. Three times a phase: its operations, its bytes in HBM and its bytes over the
interconnect, each over the chip's published peak (`rlp_jax/aot/chips.py`); the longest counts, and phases add up, as in
`rlp compile`. Operations come from `rlp_jax/aot/workload.py`; bytes from the formulas below, times a factor that the
compiled programs in results/ give: the median over them of what was compiled over what the formula says.

Per chip, with N chips, X of them along 'tensor' (while sampling `mesh.rollout_tensor`), and so `ways` = N / X shares of
the documents:
- rollout, HBM: each turn reads the weights / X, the prefixes of its documents, and the ring of each thought's keys and
  values; a slot count below G makes more rounds of turns, which begin with the ring that the first one left.
- gradient, HBM: activations of every token and layer (four passes with remat), logits of what is scored, weights.
- gradient, interconnect: every microbatch gathers the weights of a layer twice and sums their gradients; with X > 1
  also two sums of activations a layer and pass.
- sampling, interconnect: weights gathered once for prefill, baseline and rollout each; with X > 1 two sums of
  activations a layer and token.
"""

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import jax

from rlp_jax.aot.chips import CHIPS, Chip
from rlp_jax.aot.programs import template_of
from rlp_jax.aot.workload import needed_flops
from rlp_jax.checkpoints_io.load import open_shape
from rlp_jax.config import Config
from rlp_jax.rollout.engine import ring_sizes
from rlp_jax.settings import load_experiment

RESULTS = Path(__file__).parent / "results"
PAGE, MARK = Path(__file__).parent / "SCALE.md", "## Tables"
PAPER = {"Qwen3-1.7B": "qwen3_1_7b", "Qwen3-14B": "qwen3_14b", "Nemotron-Nano-12B-v2": "nemotron_nano_12b_v2"}
CHIP_COUNTS = tuple(2**n for n in range(3, 14))
TENSOR = (1, 2, 4, 8)
COMPUTE, MASTER = 2, 4  # bytes of a number while computing, and of parameters, their average and moments
STATE = 4 * MASTER  # bytes a parameter: it, its average, two moments
SAMPLE, LEARN = ("baseline", "prefill", "rollout"), ("gradient",)
RESOURCES = ("flops", "hbm", "ici")
# What the paper used 32 of, as if all were connected by NVLink: data sheet of the SXM5 model.
H100 = Chip(989e12, 1979e12, 80e9, 3350e9, 450e9, 50e9, 8, 1, "nvidia.com/en-us/data-center/h100")


class Shape(NamedTuple):
    """What counts of a model: `layers` are the weights of all products but the head's, `sampled` bytes of one while
    decoding, `cached` bytes of keys and values a token, `state` bytes of recurrent state a sequence. Numbers that all
    layers write for a token: `residual` of them whole on every chip of 'tensor', `widths` split over them."""

    config: object
    params: object
    layers: int
    head: int
    sampled: int
    cached: int
    state: int
    residual: int
    widths: int


def shape_of(config: Config) -> Shape:
    model = open_shape(config.model, config.compute_dtype)[0]
    cfg, params = model.config, jax.eval_shape(model.init, jax.random.key(0))
    layers = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" and path[0].key != "head"
    )
    hybrid = cfg.hybrid
    attending = cfg.n_layers if hybrid is None else hybrid.pattern.count("*")
    mixing = 0 if hybrid is None else hybrid.pattern.count("M")
    heads = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim
    residual, widths = cfg.n_layers * 4 * cfg.d_model, attending * 2 * heads
    if hybrid is None:
        widths += cfg.n_layers * 3 * cfg.d_ff
    else:
        widths += hybrid.pattern.count("-") * 2 * cfg.d_ff + mixing * 4 * hybrid.width
    return Shape(
        cfg, params, layers, cfg.d_model * cfg.vocab_size, COMPUTE,
        2 * attending * cfg.n_kv_heads * cfg.head_dim * COMPUTE,
        0 if hybrid is None else mixing * hybrid.width * hybrid.state_size * MASTER, residual, widths,
    )  # fmt: skip


class Layout(NamedTuple):
    """Chips along 'tensor' while whole sequences are read, and while `sampling`; slots: thoughts of a document at a
    time."""

    chips: int
    tensor: int
    sampling: int
    slots: int
    microbatches: int


def ring_reads(tokens: int, limit: int) -> int:
    """Columns that a thought of so many tokens reads of its own ring, which has one size after the other."""
    reads, before = 0, 0
    for size in ring_sizes(limit):
        here = max(0, min(size, tokens) - before)
        reads, before = reads + here * size, size
    return reads


def costs(config: Config, shape: Shape, layout: Layout, tokens: int) -> dict[str, dict[str, float]]:
    """Operations and bytes of a chip by phase, by the formulas alone."""
    rlp, T, template = config.rlp, config.data.document_tokens, template_of(config.template, None)
    G, rounds = rlp.positions * rlp.group_size, math.ceil(rlp.positions * rlp.group_size / layout.slots)
    needed = needed_flops(shape.config, shape.params, template, config, tokens)
    sharing = dict.fromkeys(needed, layout.tensor) | {"rollout": layout.sampling}
    flops = {name: count / min(layout.chips, config.batch_documents * sharing[name]) for name, count in needed.items()}

    def shares(X):  # of documents and of weights a chip; below one document it would have nothing to do
        return max(1.0, config.batch_documents * X / layout.chips), (shape.layers + shape.head) * COMPUTE / X

    def sums(X, count, per_layer):  # all-reduces of activations along 'tensor'
        sent = 2 * (X - 1) / X * count * shape.config.d_model * COMPUTE
        return per_layer * shape.config.n_layers * sent if X > 1 else 0.0

    def others(X):  # the share of an array cut over `ways` that a chip does not have
        return 1 - X / layout.chips

    X, turns = layout.sampling, rounds * tokens
    documents, weights = shares(X)
    grown = next(size for size in ring_sizes(rlp.thought_tokens) if size >= tokens)  # later rounds begin with it
    columns = layout.slots * ring_reads(tokens, rlp.thought_tokens) + (G - layout.slots) * tokens * grown
    own = documents * columns * shape.cached / X
    prefixes = documents * T * shape.cached / X * turns
    states = documents * G * tokens * 2 * shape.state / X
    drawn = documents * G * tokens * 2 * shape.config.vocab_size * MASTER / X
    rollout = turns * weights * shape.sampled / COMPUTE + own + prefixes + states + drawn
    rollout_ici = others(X) * weights + sums(X, documents * G * tokens, 2)

    X = layout.tensor
    documents, weights = shares(X)
    learnt = documents * (T + G * (tokens + len(template.open) + len(template.close) + rlp.horizon))
    scored = documents * G * (tokens + rlp.horizon)
    passes = layout.microbatches
    activations = (
        4 * learnt * (shape.residual + shape.widths / X) * COMPUTE + 4 * scored * shape.config.vocab_size * MASTER / X
    )
    gradient = activations + passes * 4 * weights

    once = others(X) * weights
    hbm = {"baseline": 2 * weights, "prefill": 2 * weights, "rollout": rollout, "gradient": gradient}
    ici = dict.fromkeys(("baseline", "prefill"), once + sums(X, documents * T, 2)) | {
        "rollout": rollout_ici,
        "gradient": passes * 4 * once + sums(X, learnt, 6),
    }
    return {name: {"flops": flops[name], "hbm": hbm[name], "ici": ici[name]} for name in hbm}


def memory(config: Config, shape: Shape, layout: Layout) -> float:
    """Bytes of a chip while sampling: state, gathered weights, keys and values of prefixes and of the slots."""
    documents = max(1.0, config.batch_documents * layout.sampling / layout.chips)
    parameters = shape.layers + 2 * shape.head
    columns = sum(ring_sizes(config.rlp.thought_tokens)[-2:])  # one ring is copied into the next
    rings = documents * layout.slots * columns * shape.cached
    states = documents * layout.slots * 2 * shape.state
    kept = (rings + states + documents * config.data.document_tokens * shape.cached) / layout.sampling
    return STATE * parameters / layout.chips + COMPUTE * (shape.layers + shape.head) / layout.sampling + kept


Factors = dict[tuple[str, str], float]


def step(config: Config, shape: Shape, layout: Layout, chip: Chip, tokens: int, factors: Factors) -> dict[str, float]:
    """Least seconds of each phase."""
    peaks = {"flops": chip.bfloat16_flops, "hbm": chip.hbm_bandwidth, "ici": chip.ici_bandwidth}
    return {
        phase: max(cost[name] * factors.get((phase, name), 1.0) / peaks[name] for name in RESOURCES)
        for phase, cost in costs(config, shape, layout, tokens).items()
    }


def layouts(config: Config, shape: Shape, chips: int, chip: Chip):
    """Those that fit: powers of two along 'tensor' and the most slots for which memory suffices. Whole sequences are
    read with one document a chip at least, while there are enough of them."""
    G = config.rlp.positions * config.rlp.group_size
    possible = [tensor for tensor in TENSOR if tensor <= chips and shape.config.n_kv_heads % tensor == 0]
    tensor = next((size for size in possible if chips // size <= config.batch_documents), possible[-1])
    microbatches = max(1, config.batch_documents * tensor // chips)
    for sampling in (size for size in possible if size >= tensor):
        for slots in (G // 2**n for n in range(int(math.log2(G)) + 1)):
            layout = Layout(chips, tensor, sampling, slots, microbatches)
            if memory(config, shape, layout) < 0.9 * chip.hbm_bytes:
                yield layout
                break


def best(config, shape, chips, chip, factors, phases=(*SAMPLE, *LEARN), tokens=None):
    """The fastest layout that fits and its phases; None where none fits."""
    tokens = config.rlp.thought_tokens if tokens is None else tokens
    found = [
        (layout, step(config, shape, layout, chip, tokens, factors)) for layout in layouts(config, shape, chips, chip)
    ]
    return min(found, key=lambda one: sum(one[1][name] for name in phases), default=None)


def ratios() -> dict[str, dict[tuple[str, str], float]]:
    """Compiled over formula, for every result that is there: by entry, then by phase and resource."""
    names = {load_experiment(f"pod/{file}").model: file for file in PAPER.values()}
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if result["phases"] and result["slices"] == 1:
            config = load_experiment(f"pod/{names[result['model']]}")
            tensor, sampling = result["mesh"]["tensor"], result["rollout_tensor"]
            layout = Layout(result["chips"], tensor, sampling, result["slots"], result["microbatches"])
            group = result["thoughts"] // config.rlp.positions
            rlp = dataclasses.replace(config.rlp, microbatches=result["microbatches"], group_size=group)
            formula = costs(dataclasses.replace(config, rlp=rlp), shape_of(config), layout, result["tokens"])
            keys = {"flops": "flops", "hbm": "hbm_bytes", "ici": "ici_bytes"}
            phases = result["phases"]
            compiled = {(p, r): phases[p][keys[r]] for p in formula for r in RESOURCES if p in phases}
            # What is gathered once for all of sampling belongs to no phase: the rollout has to wait for it.
            compiled["rollout", "ici"] += phases.get("sample: other", {}).get("ici_bytes", 0.0)
            found[path.stem] = {
                key: value / formula[key[0]][key[1]] for key, value in compiled.items() if formula[key[0]][key[1]]
            }
    return found


def factors_of(found: dict[str, dict[tuple[str, str], float]]) -> Factors:
    keys = {key for one in found.values() for key in one}
    return {key: statistics.median(one[key] for one in found.values() if key in one) for key in sorted(keys)}


def row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(heading: tuple[str, ...], rows) -> str:
    return "\n".join([row(*heading), "|" + "---|" * len(heading), *(row(*cells) for cells in rows)])


def describe(found) -> list:
    """Cells of one layout, for COLUMNS."""
    if found is None:
        return ["does not fit", *[""] * (len(COLUMNS) - 1)]
    layout, seconds = found
    total, rollout, gradient = sum(seconds.values()), seconds["rollout"], seconds["gradient"]
    rest = total - rollout - gradient
    return [*layout[1:4], *(f"{part:.2f}" for part in (rollout, rest, gradient, total))]


COLUMNS = ("tensor", "sampling", "slots", "rollout s", "baseline, prefill s", "gradient s", "step s")


def by_chips(name: str, generation: str, factors: Factors) -> str:
    config = load_experiment(f"pod/{PAPER[name]}")
    shape, chip = shape_of(config), CHIPS[generation]
    found = {chips: best(config, shape, chips, chip, factors) for chips in CHIP_COUNTS}
    work = {chips: chips * sum(one[1].values()) for chips, one in found.items() if one}
    rows = [
        [chips, *describe(one), f"{min(work.values()) / work[chips]:.0%}" if one else ""]
        for chips, one in found.items()
    ]
    return table(("chips", *COLUMNS, "of the best chip-seconds"), rows)


def by_size(name: str, generation: str, chips: int, factors: Factors) -> str:
    """G and L one at a time around the paper's, then what else would help."""
    paper, rows = load_experiment(f"pod/{PAPER[name]}"), []
    shape, chip = shape_of(paper), CHIPS[generation]

    def add(said, shape=shape, tokens=None, **rlp):
        config = dataclasses.replace(paper, rlp=dataclasses.replace(paper.rlp, **rlp))
        rows.append([said, *describe(best(config, shape, chips, chip, factors, tokens=tokens))])

    add("the paper's: G = 16, L = 2,048, every thought at its full length")
    for group in (4, 8, 32, 64):
        add(f"G = {group}", group_size=group)
    for tokens in (256, 512, 1024, 4096, 8192):
        add(f"L = {tokens:,}", thought_tokens=tokens)
    for tokens in (512, 1024):
        add(f"thoughts of {tokens:,} tokens, L = 2,048", tokens=tokens)
    add("weights in int8 while decoding", shape._replace(sampled=1))
    add("keys and values in int8 (not built)", shape._replace(cached=shape.cached // 2))
    add("both", shape._replace(sampled=1, cached=shape.cached // 2))
    return table(("", *COLUMNS), rows)


def papers_own(factors: Factors) -> str:
    """The paper's 12.47 s a step on 32 H100 by the same formulas."""
    config, rows = load_experiment("pod/qwen3_1_7b"), []
    shape = shape_of(config)
    for tokens in (512, 1024, 1536, 2048):
        rows.append([tokens, *describe(best(config, shape, 32, H100, factors, tokens=tokens))])
    return table(("tokens a thought", *COLUMNS), rows)


def apart(name: str, generation: str, factors: Factors) -> str:
    """Sampling on chips of its own, a batch ahead, against all chips doing one after the other."""
    config, rows = load_experiment(f"pod/{PAPER[name]}"), []
    shape, chip = shape_of(config), CHIPS[generation]
    for chips in (64, 256, 1024, 4096):
        together = best(config, shape, chips, chip, factors)
        if together is None:
            rows.append([chips, "does not fit", "", "", ""])
            continue
        choices = []
        for eighths in range(1, 8):
            samplers, learners = chips * eighths // 8, chips - chips * eighths // 8
            sample = best(config, shape, samplers, chip, factors, SAMPLE)
            learn = best(config, shape, learners, chip, factors, LEARN)
            if sample and learn:
                choices.append((max(sum(sample[1][p] for p in SAMPLE), learn[1]["gradient"]), samplers))
        seconds, samplers = min(choices, default=(math.nan, 0))
        whole = sum(together[1].values())
        rows.append([chips, f"{whole:.2f}", samplers, f"{seconds:.2f}", f"{whole / seconds:.2f}"])
    return table(("chips", "in turns s", "of them sampling", "apart s", "gain"), rows)


def tables() -> dict[str, str]:
    """What SCALE.md shows, by heading."""
    found = ratios()
    factors = factors_of(found)
    keys = list(factors)
    entries = found | {f"median of {len(found)}": factors}
    checks = ([name, *(f"{one[key]:.2f}" if key in one else "" for key in keys)] for name, one in entries.items())
    runs = (("Qwen3-1.7B", "v5e"), ("Qwen3-1.7B", "v5p"), ("Qwen3-14B", "v5p"), ("Nemotron-Nano-12B-v2", "v5p"))
    return (
        {"Compiled over formula": table(("entry", *map(" ".join, keys)), checks)}
        | {f"{name} on {generation}": by_chips(name, generation, factors) for name, generation in runs}
        | {
            "Qwen3-1.7B on 256 chips of v5e": by_size("Qwen3-1.7B", "v5e", 256, factors),
            "Qwen3-1.7B on 32 H100, where the paper measured 12.47 s": papers_own(factors),
            "Sampling on chips of its own, Qwen3-1.7B on v5e": apart("Qwen3-1.7B", "v5e", factors),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into SCALE.md as well")
    args = parser.parse_args()
    text = "\n\n".join(f"**{heading}**\n\n{body}" for heading, body in tables().items())
    print(text)
    if args.write:
        prose = PAGE.read_text().split(MARK)[0]
        PAGE.write_text(f"{prose}{MARK}\n\n{text}\n")


if __name__ == "__main__":
    main()
