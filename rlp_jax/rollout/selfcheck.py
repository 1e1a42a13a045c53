# SPDX-License-Identifier: Apache-2.0
"""Does this backend compute shared prefixes right? A comparison at the start of a run, on the run's own weights.

All of training rests on branches of a fork having the numbers of separate sequences. Tests prove it on CPU; a new
accelerator, compiler or attention kernel has to prove it before it is trusted with a run.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.models.cache import fork
from rlp_jax.models.self_attention import Layout, Ranges
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import token_logprobs
from rlp_jax.rollout.packing import COARSE
from rlp_jax.sharding import mesh_of, over

TOLERANCE = {"float32": 5e-3, "bfloat16": 0.5}  # nats a token; wrong masks or positions are off by whole nats
DOCUMENT, BRANCH = 48, 8  # tokens read of the document, and of each branch


class SharingError(RuntimeError):
    """Branches of a fork differ from the same sequences read whole."""


def check_sharing(model: LanguageModel, params: Params, tokens_T: np.ndarray) -> float:
    """Log-probabilities of two branches of one document, against the sequences read whole.

    Once forked from it as rollouts are, and where the learner packs, once in a sequence with it.

    Args:
      tokens_T: a document; the branches are made of its own tokens.

    Returns:
      The largest difference in nats.

    Raises:
      SharingError: it is too large, or one side alone is not finite.
    """
    document_T = np.asarray(tokens_T, np.int32)[:DOCUMENT]
    length_R = np.array([len(document_T) // 2, len(document_T) - 1])
    branch_RS = np.stack([np.resize(document_T, BRANCH), np.resize(document_T[::-1], BRANCH)])
    whole_RT = np.zeros((2, DOCUMENT + BRANCH), np.int32)
    for row_T, length, branch_S in zip(whole_RT, length_R, branch_RS, strict=True):
        row_T[: length + BRANCH] = [*document_T[:length], *branch_S]

    packed = _pack(document_T, length_R, branch_RS)

    @jax.jit
    def difference(params):
        def logprobs(hidden_RSD):
            return token_logprobs(model.unembedding(params), hidden_RSD[:, :-1], branch_RS[:, 1:]).logprob

        _, cache = model.hidden(params, document_T[None], stops_BK=length_R[None])
        forked_BRSD, _ = model.hidden(params, branch_RS[None], fork(cache, jnp.asarray(length_R)[None]))
        shared = [forked_BRSD[0]]
        if model.config.hybrid is None:
            tokens_C, layout, place_RS = packed
            shared.append(model.hidden_packed(params, tokens_C[None], layout)[0][place_RS])
        whole_RTD, _ = model.hidden(params, whole_RT)
        at_RS1 = (length_R[:, None] + np.arange(BRANCH))[..., None]
        own_RS = logprobs(jnp.take_along_axis(whole_RTD, at_RS1, 1))
        worst = jnp.zeros(())
        for hidden_RSD in shared:
            ours_RS = logprobs(hidden_RSD)
            # Broken weights, which give both sides NaN, are another error than sharing.
            comparable_RS = jnp.isfinite(ours_RS) | jnp.isfinite(own_RS)
            worst = jnp.maximum(worst, jnp.max(jnp.where(comparable_RS, jnp.abs(ours_RS - own_RS), 0.0)))
        return worst

    with over(mesh_of(params)):
        found, allowed = float(difference(params)), TOLERANCE[model.config.compute_dtype]
    if not found <= allowed:
        raise SharingError(
            f"branches that share their prefix differ by {found:.3g} nats a token from sequences read whole (allowed: "
            f"{allowed} in {model.config.compute_dtype}) on {jax.default_backend()}, jax {jax.__version__}: this "
            "combination of model and backend cannot be trusted; please report it"
        )
    return found


def _pack(document_T: np.ndarray, length_R: np.ndarray, branch_RS: np.ndarray) -> tuple[np.ndarray, Layout, np.ndarray]:
    """The learner's layout, long enough for the attention that long sequences get: tokens, layout, branches' places."""
    C, S = 2 * COARSE, branch_RS.shape[1]
    tokens_C, position_C, start_C, end_C = np.zeros((4, C), np.int32)
    own_C = np.arange(C, dtype=np.int32)
    at = len(document_T)
    tokens_C[:at], position_C[:at], own_C[:at] = document_T, np.arange(at), 0
    place_RS = at + np.arange(branch_RS.size).reshape(branch_RS.shape)
    for place_S, length, branch_S in zip(place_RS, length_R, branch_RS, strict=True):
        tokens_C[place_S], position_C[place_S] = branch_S, length + np.arange(S)
        end_C[place_S], own_C[place_S] = length, place_S[0]
    ranges = Ranges(*(jnp.asarray(x)[None] for x in (start_C, end_C, own_C)))
    return tokens_C, Layout(jnp.asarray(position_C)[None], ranges), place_RS
