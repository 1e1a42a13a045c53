# SPDX-License-Identifier: Apache-2.0
"""What somebody who misspelt a name may have meant."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """ ": did you mean ...?", to be put behind a message; all that there is where nothing is near.

    The nearest of the known names: those that end alike (`group_size` -> `rlp.group_size`), then by spelling within
    the same section, where a common "rlp." says nothing.
    """
    known = list(known)
    section, _, last = name.rpartition(".")
    near = [other for other in known if other.rpartition(".")[2] == last]
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    close = [beside[other] for other in difflib.get_close_matches(last, beside, n=3, cutoff=0.6)]
    near += [other for other in close or difflib.get_close_matches(name, known, n=3, cutoff=0.6) if other not in near]
    if near:
        return f": did you mean {' or '.join(near[:3])}?"
    return f": there are {', '.join(known)}" if known else ""
