# SPDX-License-Identifier: Apache-2.0
"""The quickstart's rival: reinforcement pre-training on the same lines, `rlp train quickstart_rpt`.

The model thinks, closes its thought and says the next token, which is right or wrong. It knows no \\boxed{}: the answer
is what stands between the closing tag and the next full stop, as in `</think> e .`. Group size and temperature are
RPT's.
"""

import dataclasses

from rlp_jax.config import Config, RPTConfig
from rlp_jax.settings import load_experiment


def config() -> Config:
    quickstart = load_experiment("quickstart")
    return dataclasses.replace(
        quickstart,
        name="quickstart_rpt",
        algorithm="rpt",
        template=dataclasses.replace(quickstart.template, end="."),
        rlp=dataclasses.replace(quickstart.rlp, group_size=8, temperature=0.8, thought_tokens=18),
        rpt=RPTConfig(answer_open="", answer_close=" .", rounds=2),
    )
