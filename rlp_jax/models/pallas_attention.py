# SPDX-License-Identifier: Apache-2.0
"""Self-attention as a TPU kernel (FlashAttention, arXiv 2205.14135), written in Pallas.

A kernel works through a list of steps, each one block of queries against one block of keys. Only the pairs of blocks
that `visited_blocks` marks are on it: what nobody sees is neither fetched nor computed, and no step is spent to find
that out. The list comes from traced ranges; its length is the grid's last bound, known when the program runs.

Scores lie transposed, keys down a block (sublanes) and queries across (lanes). So what belongs to a query (its ranges,
its largest score, its normaliser) is a row that broadcasts down a block, and takes one number in memory, not 128.
The O query heads of a key head are taken one after another within a step: they share its keys and its mask.

Products of float32 follow `jax.default_matmul_precision`, as those of XLA do: by default a TPU rounds to bfloat16, at
"highest" it does not; "high" does not exist here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlp_jax.models.blocked_attention import visited_blocks
from rlp_jax.models.causal_attention import KEPT, MASKED
from rlp_jax.models.layers import pad_axis

LANES = 128  # the places of a block are a multiple of it
BLOCK = 512  # places of a block at most
# Of a block's queries, the O heads together. Vector memory (16 MiB a kernel unless more is asked for) holds at most six
# of these (queries and two more like them, fetched ahead or written behind), as many in float32 as one of them has
# numbers, keys and values twice, and a few [block, block] of float32, 1 MiB each.
HEADS_BYTES = 1 << 20
STEPS = 1 << 17  # of one kernel at most: 4 bytes each in scalar memory, which has 1 MiB
FIRST, LIVE, LAST = 1, 2, 4  # flags of a step, see `_steps`
FLAGS, COLUMNS = 3, 14  # bits that the flags and a block's number take


def attend(q_BMOCE, k_BMCE, v_BMCE, prefix_start_BC, prefix_end_BC, own_start_BC, *, interpret: bool = False):
    """`self_attention` of scaled queries, O query heads a key head: [B, M, O, C, E].

    q, k and v are of one dtype, float32 or bfloat16. Differentiable in them, in reverse mode.

    Args:
      interpret: run the kernels' Python on any device, slowly. Compiled they are for TPU only.
    """
    B, _, O, C, E = q_BMOCE.shape
    block = block_size(C, O * E * q_BMOCE.dtype.itemsize)
    pad = -C % block
    q_BMOCE, k_BMCE, v_BMCE = (pad_axis(x, pad, -2) for x in (q_BMOCE, k_BMCE, v_BMCE))
    place_BC = jnp.broadcast_to(jnp.arange(C + pad), (B, C + pad))
    own_start_BC = jnp.concatenate([own_start_BC, place_BC[:, C:]], -1)  # padding sees itself: no empty row of the map
    ranges = pad_axis(prefix_start_BC, pad, -1), pad_axis(prefix_end_BC, pad, -1), own_start_BC
    limits_B4C = jnp.stack([*ranges, place_BC], 1).astype(jnp.int32)
    visited_Bnn = visited_blocks(*ranges, block, block)
    attend_all = functools.partial(_attend, block, interpret)
    operands = visited_Bnn, limits_B4C, q_BMOCE, k_BMCE, v_BMCE
    if visited_Bnn.size <= STEPS:
        return attend_all(*operands)[..., :C, :]
    one_by_one = jax.lax.map(lambda one: attend_all(*(x[None] for x in one))[0], operands)
    return one_by_one[..., :C, :]


def block_size(length: int, bytes_of_heads: int) -> int:
    """A multiple of LANES, at most BLOCK, so that few places are padding and a block fits with all heads of a place."""
    most = max(min(BLOCK, HEADS_BYTES // bytes_of_heads // LANES * LANES), LANES)
    blocks = -(-length // most)
    return -(-length // (LANES * blocks)) * LANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block, interpret, *operands):
    return _forward(block, interpret, *operands)[0]


def _save(block, interpret, *operands):
    out_BMOCE, normaliser_BMOC = checkpoint_name(_forward(block, interpret, *operands), KEPT)
    return out_BMOCE, (operands, out_BMOCE, normaliser_BMOC)


def _forward(block, interpret, *operands):
    """The output, and the logarithm of what its weights are divided by [B, M, O, C]."""
    _, _, O, _, E = operands[2].shape
    scratch = (O, block), (O, block), (O, E, block)
    return _run("attention", _forward_kernel, "lqkk", "qn", scratch, False, block, interpret, *operands)


def _backward(block, interpret, residuals, d_out_BMOCE):
    operands, out_BMOCE, normaliser_BMOC = residuals
    _, _, O, _, E = d_out_BMOCE.shape
    dot_BMOC = (d_out_BMOCE.astype(jnp.float32) * out_BMOCE.astype(jnp.float32)).sum(-1)
    common = block, interpret, *operands, d_out_BMOCE, normaliser_BMOC, dot_BMOC
    (dq_BMOCE,) = _run("attention_dq", _dq_kernel, "lqkkqnn", "q", [(O, E, block)], False, *common)
    dk_BMCE, dv_BMCE = _run("attention_dkv", _dkv_kernel, "lqkkqnn", "kk", [(block, E)] * 2, True, *common)
    return None, None, dq_BMOCE, dk_BMCE, dv_BMCE


_attend.defvjp(_save, _backward)


def _run(name, kernel, inputs: str, outputs: str, scratch, by_key: bool, block: int, interpret, visited_Bnn, *operands):
    """Runs a kernel over (sequences, key heads, steps); the steps of a block of queries (`by_key`: of keys) are a row.

    A letter of `inputs` and `outputs` is an array's kind: q [B, M, O, C, E], k [B, M, C, E], a number for a query
    n [B, M, O, C], limits l [B, 4, C]. `scratch` lists the shapes that a row's steps share, in float32.
    """
    B, M, O, C, E = operands[1].shape
    steps, bound = _steps(visited_Bnn.swapaxes(1, 2) if by_key else visited_Bnn)
    length = len(steps) // B
    query, key = (_column, _row) if by_key else (_row, _column)

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda b, m, t, steps_ref: index(b, m, steps_ref[b * length + t]))

    specs = {
        "q": spec((None, None, O, block, E), lambda b, m, step: (b, m, 0, query(step), 0)),
        "k": spec((None, None, block, E), lambda b, m, step: (b, m, key(step), 0)),
        "n": spec((None, None, O, block), lambda b, m, step: (b, m, 0, query(step))),
        "l": spec((None, 4, block), lambda b, m, step: (b, 0, query(step))),
    }
    dtype = operands[1].dtype
    results = {"q": ((B, M, O, C, E), dtype), "k": ((B, M, C, E), dtype), "n": ((B, M, O, C), jnp.float32)}

    def body(steps_ref, *refs):
        step = steps_ref[pl.program_id(0) * length + pl.program_id(2)]
        kernel(key(step), *(pl.when(step & flag != 0) for flag in (FIRST, LIVE, LAST)), *refs)

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(*results[x]) for x in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, M, bound),
            in_specs=[specs[x] for x in inputs],
            out_specs=[specs[x] for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(steps, *operands)


def _steps(visited_Bnn):
    """The visited pairs of each sequence, row by row, as numbers [B·n·n]; and the most that a sequence has.

    A number holds row, column, and whether the step is its row's FIRST, its LAST, and LIVE. Every block visits itself,
    so no row is empty and the last block's visit to itself comes last. Sequences with fewer pairs repeat it, without
    any flag: nothing is fetched or done for that.
    """
    B, n, _ = visited_Bnn.shape
    visited_Bp = visited_Bnn.reshape(B, n * n)
    count_B1 = visited_Bp.sum(-1, keepdims=True)
    place_p = jnp.arange(n * n)
    pair_Bp = jnp.sort(jnp.where(visited_Bp, place_p, n * n - 1), -1)
    row_Bp, column_Bp = pair_Bp // n, pair_Bp % n
    edge_Bp = jnp.diff(row_Bp, prepend=-1, append=n) != 0  # between the step before and this one
    first_Bp = edge_Bp[:, :-1]
    last_Bp = (edge_Bp[:, 1:] & (place_p < count_B1)) | (place_p == count_B1 - 1)
    flags_Bp = FIRST * first_Bp + LIVE * (place_p < count_B1) + LAST * last_Bp
    step_Bp = (row_Bp << COLUMNS | column_Bp) << FLAGS | flags_Bp
    return step_Bp.reshape(-1).astype(jnp.int32), count_B1.max()


def _row(step):
    return step >> (COLUMNS + FLAGS)


def _column(step):
    return (step >> FLAGS) & ((1 << COLUMNS) - 1)


def _forward_kernel(j, first, live, last, limits, q, k, v, out, normaliser, top_OQ, total_OQ, sum_OEQ):
    """Block j of keys. Here and below, names without a suffix are the blocks that `_run` hands in and out."""

    @first
    def _():
        top_OQ[...] = jnp.full_like(top_OQ, MASKED)
        total_OQ[...] = jnp.zeros_like(total_OQ)
        sum_OEQ[...] = jnp.zeros_like(sum_OEQ)

    @live
    def _():
        k_kE, v_kE, seen_kQ = k[...], v[...], _seen(limits, j)
        for o, row in _heads(q):
            score_kQ = _scores(k_kE, q[o], seen_kQ)
            old_1Q = top_OQ[row]
            top_1Q = jnp.maximum(old_1Q, score_kQ.max(0, keepdims=True))
            weight_kQ, fade_1Q = jnp.exp(score_kQ - top_1Q), jnp.exp(old_1Q - top_1Q)
            top_OQ[row] = top_1Q
            total_OQ[row] = total_OQ[row] * fade_1Q + weight_kQ.sum(0, keepdims=True)
            sum_OEQ[o] = sum_OEQ[o] * fade_1Q + _product("ke,kq->eq", v_kE, weight_kQ.astype(v_kE.dtype))

    @last
    def _():
        normaliser[...] = top_OQ[...] + jnp.log(total_OQ[...])
        for o, row in _heads(q):
            out[o] = (sum_OEQ[o] / total_OQ[row]).T.astype(out.dtype)


def _dq_kernel(j, first, live, last, limits, q, k, v, d_out, normaliser, dot, dq, sum_OEQ):
    @first
    def _():
        sum_OEQ[...] = jnp.zeros_like(sum_OEQ)

    @live
    def _():
        k_kE, v_kE, seen_kQ = k[...], v[...], _seen(limits, j)
        for o, row in _heads(q):
            weight_kQ = jnp.exp(_scores(k_kE, q[o], seen_kQ) - normaliser[row])
            d_score_kQ = weight_kQ * (_product("ke,qe->kq", v_kE, d_out[o]) - dot[row])
            sum_OEQ[o] += _product("ke,kq->eq", k_kE, d_score_kQ.astype(k_kE.dtype))

    @last
    def _():
        for o, _ in _heads(q):
            dq[o] = sum_OEQ[o].T.astype(dq.dtype)


def _dkv_kernel(j, first, live, last, limits, q, k, v, d_out, normaliser, dot, dk, dv, dk_sum_kE, dv_sum_kE):
    @first
    def _():
        dk_sum_kE[...] = jnp.zeros_like(dk_sum_kE)
        dv_sum_kE[...] = jnp.zeros_like(dv_sum_kE)

    @live
    def _():
        k_kE, v_kE, seen_kQ = k[...], v[...], _seen(limits, j)
        for o, row in _heads(q):
            q_QE, d_out_QE = q[o], d_out[o]
            weight_kQ = jnp.exp(_scores(k_kE, q_QE, seen_kQ) - normaliser[row])
            d_score_kQ = weight_kQ * (_product("ke,qe->kq", v_kE, d_out_QE) - dot[row])
            dk_sum_kE[...] += _product("kq,qe->ke", d_score_kQ.astype(q_QE.dtype), q_QE)
            dv_sum_kE[...] += _product("kq,qe->ke", weight_kQ.astype(d_out_QE.dtype), d_out_QE)

    @last
    def _():
        dk[...] = dk_sum_kE[...].astype(dk.dtype)
        dv[...] = dv_sum_kE[...].astype(dv.dtype)


def _heads(q):
    """For each query head its number, and its row of [O, queries] as a slice, which keeps a row a row."""
    return [(o, slice(o, o + 1)) for o in range(q.shape[0])]


def _product(subscripts, a, b):
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None  # others are refused for bfloat16
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _scores(k_kE, q_QE, seen_kQ):
    return jnp.where(seen_kQ, _product("ke,qe->kq", k_kE, q_QE), MASKED)


def _seen(limits, j):
    """[keys, queries]: which keys of block j the queries of these limits see."""
    start_1Q, end_1Q, own_1Q, place_1Q = (limits[i : i + 1] for i in range(4))
    block = limits.shape[-1]
    key_kQ = j * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
    return ((key_kQ >= start_1Q) & (key_kQ < end_1Q)) | ((key_kQ >= own_1Q) & (key_kQ <= place_1Q))
