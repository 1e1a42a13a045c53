# SPDX-License-Identifier: Apache-2.0
"""Which algorithm a run trains with: a name in its config, and a step of one signature.

The loop of `train.py` knows the signature alone. RLP's rivals and the post-training stand in `baselines/`.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from rlp_jax import rlp
from rlp_jax.baselines import cpt, rlvr, rpt, sft
from rlp_jax.config import Config
from rlp_jax.data.template import TemplateTokens
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.state import TrainState

Decode = Callable[[list[int]], str]


class Step(Protocol):
    """The parts of a step; the first and the last are jitted.

    Attributes:
      judge: None, or (batch, samples, decode, again) -> samples between the two, on the host: a verifier's verdicts.
        Numpy arrays of all documents in and out; every process of a run makes the same call. `again(*more)` samples
        once more, with what `sample` is to know of it.
    """

    judge: Callable[[dict, Any, Decode, Callable[..., Any]], Any] | None

    def sample(self, params: Params, ema_params: Params, batch: dict, key: jax.Array, *more: Any) -> Any:
        """What the policy says of a batch of documents, a NamedTuple with documents first in every leaf; None where
        nothing is sampled."""

    def learn(self, state: TrainState, batch: dict, samples: Any) -> tuple[TrainState, dict[str, jax.Array], Any]:
        """The next state, which takes the place of the given one in memory; float32 scalar metrics, "finite" and
        "grad_norm" among them; and the scores of the samples, None without."""


MakeStep = Callable[
    [LanguageModel, optax.GradientTransformation, TemplateTokens, Config, Params | None, Mesh | None], Step
]

ALGORITHMS: dict[str, MakeStep] = {
    "rlp": rlp.make_step,
    "cpt": cpt.make_step,
    "sft": sft.make_step,
    "rpt": rpt.make_step,
    "rlvr": rlvr.make_step,
}
