# SPDX-License-Identifier: Apache-2.0
"""RLP in minutes on two CPU cores, nothing downloaded: `rlp train quickstart`.

The model is our own small decoder (`pretrain_quickstart.py`), the text lines of chained operations
(`rlp_jax/data/compose.py`). Its thoughts mostly apply the operations from last to first, which says nothing about the
answer. RLP sees plain lines alone, no thought and no mark for a right one, and has to find out which thoughts pay.
"""

from rlp_jax.config import Config, DataConfig, EvalConfig, OptimizerConfig, RLPConfig, Template
from rlp_jax.data import compose


def config() -> Config:
    return Config(
        name="quickstart",
        model="quickstart",
        steps=40,
        batch_documents=16,
        remat="elementwise",
        template=Template(instruction=compose.INSTRUCTION, open=compose.OPEN, close=compose.CLOSE),
        # Thoughts only before answers, at two of a document's three: elsewhere the text is random by construction.
        rlp=RLPConfig(group_size=16, positions=2, position_mode="span", thought_tokens=16),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        data=DataConfig(sources=("compose:2048",), document_tokens=32, heldout_fraction=0.125),
        eval=EvalConfig(every=10, documents=128, positions=3, group_size=4, batch_documents=32),
    )
