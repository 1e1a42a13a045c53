# SPDX-License-Identifier: Apache-2.0
"""GRPO with a verifier on the quickstart's problems: `rlp train quickstart_rlvr`.

The question is a document's first line up to its "=", the answer is exact: what the response says between the closing
tag and the next full stop, as in `</think> e .`.
"""

import dataclasses

from rlp_jax.config import Config, RLVRConfig
from rlp_jax.settings import load_experiment


def config() -> Config:
    quickstart = load_experiment("quickstart")
    return dataclasses.replace(
        quickstart,
        name="quickstart_rlvr",
        algorithm="rlvr",
        batch_documents=32,
        template=dataclasses.replace(quickstart.template, end="."),
        rlp=dataclasses.replace(quickstart.rlp, positions=1, thought_tokens=18),
        rlvr=RLVRConfig(verifier="exact", answer_open="", answer_close=" ."),
    )
