# SPDX-License-Identifier: Apache-2.0
"""A table of links in the line, a start and a number of hops: where does the walk end?

    q>t u>p v>s t>r p>q s>u r>v from p 3 = r .

A link is one word. The links form one cycle through all nodes, in random order. The thought is the walk with a count of
the hops that are left, `p 3 q 2 t 1 r`; the wrong procedure walks from the first node of the table instead.
"""

import numpy as np

from experiments.paper.chains import Chain, Problem

NODES = "pqrstuv"
HOPS = (3, 4)
WORDS = (*NODES, *(f"{a}>{b}" for a in NODES for b in NODES if a != b), "from")


def pointers(rng: np.random.Generator, hops: tuple[int, int] = HOPS) -> Problem:
    cycle = [NODES[k] for k in rng.permutation(len(NODES))]
    target = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    table = [NODES[k] for k in rng.permutation(len(NODES))]
    start = table[rng.integers(1, len(NODES))]
    count = int(rng.integers(hops[0], hops[1] + 1))
    links = " ".join(f"{node}>{target[node]}" for node in table)
    right, wrong = walk(target, start, count), walk(target, table[0], count)
    return Problem("pointers", f"{links} from {start} {count} =", right.states[-1], right, wrong)


def walk(target: dict[str, str], start: str, count: int) -> Chain:
    nodes = [start]
    for _ in range(count):
        nodes.append(target[nodes[-1]])
    return Chain(tuple(nodes), tuple(str(left) for left in range(count, 0, -1)))
