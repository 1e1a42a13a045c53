# SPDX-License-Identifier: Apache-2.0
"""Documents and thoughts laid out one after another, and what their tokens see, as plain loops."""

import numpy as np


def random_ranges(rng, length, sizes=(1, 40)):
    """Documents of random sizes, each followed by thoughts that start at random places of it; padding to `length`.

    Returns prefix_start, prefix_end and own_start, int32 [length].
    """
    start, end, own = (np.zeros(length, np.int32) for _ in range(3))
    at = 0

    def put(size, prefix_start, prefix_end):
        nonlocal at
        size = min(size, length - at)
        start[at : at + size], end[at : at + size], own[at : at + size] = prefix_start, prefix_end, at
        at += size

    while at < length - sizes[1] // 2:
        document, size = at, int(rng.integers(*sizes))
        put(size, 0, 0)
        for _ in range(rng.integers(0, 4)):
            put(int(rng.integers(*sizes)), document, document + int(rng.integers(0, size + 1)))
    own[at:] = np.arange(at, length)
    return start, end, own


def attention(q_CNE, k_CME, v_CME, ranges):
    """float64, a query and a head at a time."""
    C, N, E = q_CNE.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q_CNE, k_CME, v_CME))
    out = np.zeros((C, N, E))
    start, end, own = ranges
    for p in range(C):
        seen = [c for c in range(C) if start[p] <= c < end[p] or own[p] <= c <= p]
        for head in range(N):
            m = head // (N // k.shape[1])
            score = k[seen, m] @ q[p, head] / np.sqrt(E)
            weight = np.exp(score - score.max())
            out[p, head] = weight @ v[seen, m] / weight.sum()
    return out
