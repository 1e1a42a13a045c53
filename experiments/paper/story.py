# SPDX-License-Identifier: Apache-2.0
"""People go to rooms and follow each other; in the end the text says where one of them is.

    Ann goes to hall . Bob goes to attic . Cid goes to den . Dan follows Bob . Eve follows Dan . Fay follows Ann .
    Eve is in attic .

Who follows goes where the other has gone. The thought traces the person asked for back to a room,
`Eve follows Dan follows Bob goes to attic`; the wrong procedure traces whoever moved last.
"""

import numpy as np

from experiments.paper.chains import EMPTY, Chain, Problem

NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ivy", "Joe")
ROOMS = ("hall", "attic", "den", "garden", "kitchen", "cellar", "porch", "study")
PLACED = 3  # people who go to a room, each to another one
FOLLOWERS = (4, 5)
DEPTH = (2, 3)  # how often one has to go from follower to followed, for the person asked for
WORDS = (*NAMES, *ROOMS, "goes", "to", "follows", "in")  # and "is", which the textbook has

Moves = dict[str, tuple[str, str]]  # who: (how, whom or where), in order of time


def story(rng: np.random.Generator) -> Problem:
    """The wrong procedure ends in the right room as often as by chance, which rejection sees to."""
    meet = rng.random() < 1 / PLACED
    while True:
        names = [NAMES[k] for k in rng.permutation(len(NAMES))]
        rooms = [ROOMS[k] for k in rng.permutation(len(ROOMS))]
        count = PLACED + int(rng.integers(FOLLOWERS[0], FOLLOWERS[1] + 1))
        moves: Moves = {name: ("goes to", room) for name, room in zip(names[:PLACED], rooms, strict=False)}
        for i in range(PLACED, count):
            moves[names[i]] = ("follows", names[rng.integers(i)])
        asked = [name for name in names[: count - 1] if DEPTH[0] < len(trace(moves, name).steps) <= DEPTH[1] + 1]
        wrong = trace(moves, names[count - 1])
        if not asked or len(wrong.steps) > DEPTH[1] + 1:
            continue
        who = asked[rng.integers(len(asked))]
        right = trace(moves, who)
        if (right.states[-1] == wrong.states[-1]) == meet:
            break
    question = " ".join((*(f"{name} {how} {where} ." for name, (how, where) in moves.items()), f"{who} is in"))
    return Problem("story", question, right.states[-1], right, wrong)


def trace(moves: Moves, who: str) -> Chain:
    """From a person to a room."""
    states, steps = [who], []
    while who in moves:
        how, who = moves[who]
        states.append(who)
        steps.append(how)
    return Chain(tuple(states), tuple(steps))


def last_mover(words: list[str]) -> Chain:
    """The trace of whoever moved last in a text that stops anywhere; empty where the text does not tell."""
    moves, last = {}, None
    for i, word in enumerate(words):
        if word in NAMES and words[i + 1 : i + 2] == ["follows"] and words[i + 3 : i + 4] == ["."]:
            last, moves[word] = word, ("follows", words[i + 2])
        elif word in NAMES and words[i + 1 : i + 3] == ["goes", "to"] and words[i + 4 : i + 5] == ["."]:
            last, moves[word] = word, ("goes to", words[i + 3])
    if last is None:
        return EMPTY
    seen, who = {last}, last
    while who in moves:  # people of an earlier passage may have been overtaken by a later one
        who = moves[who][1]
        if who in seen:
            return EMPTY
        seen.add(who)
    chain = trace(moves, last)
    return chain if chain.states[-1] in ROOMS else EMPTY
