"""Does this backend compute shared prefixes right? A comparison at the start of a run, on the run's own weights.

All of training rests on branches of a fork having the numbers of separate sequences. Tests prove it on CPU; a new
accelerator, compiler or attention kernel has to prove it before it is trusted with a run.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlp_jax.models.cache import fork
from rlp_jax.models.transformer import LanguageModel, Params
from rlp_jax.models.vocabulary import token_logprobs

TOLERANCE = {"float32": 5e-3, "bfloat16": 0.5}  # nats a token; wrong masks or positions are off by whole nats
DOCUMENT, BRANCH = 48, 8  # tokens read of the document, and of each branch


class SharingError(RuntimeError):
    """Branches of a fork differ from the same sequences read whole."""


def check_sharing(model: LanguageModel, params: Params, tokens_T: np.ndarray) -> float:
    """Log-probabilities of two branches that fork from one document, against the sequences read whole.

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

    @jax.jit
    def difference(params):
        def logprobs(hidden_RSD):
            return token_logprobs(lambda x: model.unembed(params, x), hidden_RSD[:, :-1], branch_RS[:, 1:]).logprob

        _, cache = model.hidden(params, document_T[None], stops_BK=length_R[None])
        forked_BRSD, _ = model.hidden(params, branch_RS[None], fork(cache, jnp.asarray(length_R)[None]))
        whole_RTD, _ = model.hidden(params, whole_RT)
        at_RS1 = (length_R[:, None] + np.arange(BRANCH))[..., None]
        own_RSD = jnp.take_along_axis(whole_RTD, at_RS1, 1)
        forked_RS, own_RS = logprobs(forked_BRSD[0]), logprobs(own_RSD)
        comparable_RS = jnp.isfinite(forked_RS) | jnp.isfinite(own_RS)  # broken weights are another error than sharing
        return jnp.max(jnp.where(comparable_RS, jnp.abs(forked_RS - own_RS), 0.0))

    found, allowed = float(difference(params)), TOLERANCE[model.config.compute_dtype]
    if not found <= allowed:
        raise SharingError(
            f"branches that share their prefix differ by {found:.3g} nats a token from sequences read whole (allowed: "
            f"{allowed} in {model.config.compute_dtype}) on {jax.default_backend()}, jax {jax.__version__}: this "
            "combination of model and backend cannot be trusted; please report it"
        )
    return found
