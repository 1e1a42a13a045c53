# SPDX-License-Identifier: Apache-2.0
"""What is kept of a step that was not finite."""

import math

import numpy as np
import pytest

from rlp_jax.learner import Samples, Scores
from rlp_jax.rows import not_finite_rows, skipped_message

B, K, G, T, H = 3, 2, 2, 5, 2


def step():
    """Batch, samples and scores of three documents, all finite; the second one has a position that does not count."""
    batch = {
        "tokens_BT": np.arange(B * T).reshape(B, T),
        "length_B": np.array([5, 3, 4]),
        "document_B": np.array([101, 102, 103]),
    }
    fields = dict.fromkeys(Samples._fields)
    fields |= {
        "position_BK": np.array([[1, 3], [1, 0], [2, 1]]),
        "valid_BK": np.array([[True, True], [True, False], [True, True]]),
        "s_ema_BKH": np.full((B, K, H), -1.0, np.float32),
    }
    return batch, Samples(**fields), Scores(np.full((B, K, G), 0.5, np.float32), None, None, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["reward", "baseline"])
def test_the_documents_whose_scores_are_not_finite_are_kept(bad, where):
    batch, samples, scores = step()
    (scores.reward_BKG if where == "reward" else samples.s_ema_BKH)[2, 1, 0] = bad
    scores.reward_BKG[1, 1] = math.nan  # of a position that does not count
    (row,) = not_finite_rows(7, batch, samples, scores, str)
    assert (row["step"], row["document"], row["positions"]) == (7, 103, [2, 1])
    assert row["tokens"] == [10, 11, 12, 13] and row["text"] == "[10, 11, 12, 13]"
    assert np.isfinite(row["rewards"][0]).all() and np.isfinite(row["s_ema"][0])
    assert not np.isfinite(row["rewards"][1] if where == "reward" else row["s_ema"][1]).all()


def test_all_documents_are_kept_where_the_gradient_alone_was_not_finite():
    rows = not_finite_rows(7, *step(), str)
    assert [row["document"] for row in rows] == [101, 102, 103]
    assert rows[1]["positions"] == [1] and rows[1]["tokens"] == [5, 6, 7]
    message = skipped_message(5, rows * 4, "run/nonfinite.jsonl")
    assert "5 steps in a row were not finite, the last one step 7 on documents 101, 102, 103, 101" in message
    assert "and 4 more" in message and message.endswith("look at these documents in run/nonfinite.jsonl")
