# SPDX-License-Identifier: Apache-2.0
"""Quotes in thoughts by hand, and against a plain search over random ones."""

import random

from tiny_run import byte_tokenizer

from rlp_jax.evals.probes import Quotes, Words, find_quotes, is_known, other_places, quoted_places, without

DOCUMENT = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]


def test_quotes_by_hand():
    def quotes(thought, position=3, horizon=1):
        return find_quotes(thought.split(), DOCUMENT, position, horizon)

    assert quotes("it sat on it") == Quotes(True, True, False, False, False)
    assert quotes("on") == Quotes(True, True, False, False, True)
    assert quotes("on on") == Quotes(True, True, False, False, True)
    assert quotes("") == Quotes(False, False, False, False, False)
    assert quotes("a mat and so") == Quotes(False, False, True, False, False)
    assert quotes("a mat or and") == Quotes(False, False, False, False, False)
    assert quotes("the cat sat on a mat and") == Quotes(True, True, True, True, False)
    # Two scored tokens: the second alone is no quote, and bare may hold any of them.
    assert quotes("a", horizon=2) == Quotes(False, False, False, False, True)
    assert quotes("on the a", horizon=2) == Quotes(True, False, False, False, False)
    assert quotes("so on a mat and then", horizon=2) == Quotes(True, True, True, False, False)
    # Nothing to quote where the document ends or has not begun.
    assert quotes("it", position=8) == Quotes(True, True, None, False, True)
    assert quotes("it", position=2).behind is None and quotes("it", position=3).behind is False


def test_known_in_the_prefix():
    document = ["a", "b", "a", "c"]
    assert [is_known(document, t) for t in range(4)] == [False, False, True, False]


def test_runs_are_taken_out():
    def left(thought, target):
        words = thought.split()
        return " ".join(without(words, quoted_places(words, target.split())))

    assert left("a e b e", "e") == "a b"
    assert left("a b", "e") == "a b"
    assert left("e e", "e") == ""
    assert left("x on a mat on the a", "on a mat") == "x the a"  # a lone "a" begins no run
    assert left("on on a", "on a") == ""


def test_against_a_plain_search():
    rng = random.Random(0)
    for _ in range(500):
        document = rng.choices("abcd", k=10)
        thought = rng.choices("abcd", k=rng.randint(0, 8))
        position, horizon = rng.randint(0, 7), rng.randint(1, 3)
        text, target = "".join(thought), "".join(document[position : position + horizon])
        found = find_quotes(thought, document, position, horizon)
        assert found.target == (target[0] in text) and found.whole == (target in text)
        after = "".join(document[position + horizon :][:3])
        assert found.ahead == (after in text if len(after) == 3 else None)
        assert found.behind == ("".join(document[position - 3 : position]) in text if position >= 3 else None)
        assert found.bare == (bool(text) and not text.strip(target))
        places = quoted_places(thought, list(target))
        if horizon == 1:
            assert "".join(without(thought, places)) == text.replace(target, "")
        others = other_places(len(thought), places, (1, 2))
        if others is None:
            assert len(places) > len(thought) - len(places)
        else:
            assert len(set(others)) == len(places) and not set(others) & set(places)
            assert others == other_places(len(thought), places, (1, 2))


def test_other_places_are_drawn():
    draws = {tuple(other_places(10, [3], (seed,))) for seed in range(60)}
    assert len(draws) == 9 and (3,) not in draws


def test_words_ignore_spaces_around():
    class Pieces:
        def decode(self, ids):
            return "".join(["9", " 9", "  ", "\n", "\ufffd", "", "9."][i] for i in ids)

    words = Words(Pieces())
    assert words([0, 1, 2, 3, 4, 5, 6]) == ["9", "9", "  ", "\n", 4, 5, "9."]
    tokenizer = byte_tokenizer()
    assert Words(tokenizer)(tokenizer.encode("a b")) == ["a", " ", "b"]
