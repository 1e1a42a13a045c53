# SPDX-License-Identifier: Apache-2.0
"""Our models as models of lm-eval (EleutherAI's harness, extra: eval): any of its tasks, scored by our forward.

    import lm_eval
    from rlp_jax.evals.lm_eval_adapter import RlpLM

    lm_eval.simple_evaluate(model=RlpLM("smollm2-135m-instruct"), tasks=["arc_easy"])

Tokens, truncation and windows are those of the harness's own Hugging Face backend, so that scores can be compared.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from rlp_jax.checkpoint import load_run
from rlp_jax.checkpoints_io.load import load
from rlp_jax.data.documents import stable_hash
from rlp_jax.evals.devices import mesh_for
from rlp_jax.evals.generation import GREEDY, Decoder, common, decode, finish, padded, stop_table
from rlp_jax.models.vocabulary import token_logprobs
from rlp_jax.settings import is_run, read_config
from rlp_jax.sharding import document_shards, make_mesh, over, place_batch

DEFAULT_MAX_TOKENS = 256  # of a generation whose task sets no cap, as in the harness


@register_model("rlp_jax")
class RlpLM(TemplateLM):
    """A model of ours for lm-eval.

    Args:
      model: preset, Hugging Face directory, GGUF file or run directory (its policy).
      batch_size: requests computed together; over a mesh the next multiple of its shares of documents.
      max_length: of a sequence, tokens; by default the model's context.
      seed: of sampled generations.
      mesh: devices along its axes, as data=2,tensor=4; by default as the run had them, else weights over all.
      max_batch_size, device: given by the harness, of no use here.
    """

    def __init__(
        self,
        model: str,
        batch_size: int | str = 8,
        max_length: int | None = None,
        seed: int = 0,
        mesh: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        trained = read_config(model) if is_run(model) else None
        self._layout = mesh_for(mesh, trained, jax.device_count())
        self._mesh = make_mesh(self._layout)
        if trained:
            run = load_run(model, ("params",), self._mesh)
            self.handle, self.params, self.text = run.model, run.params, run.tokenizer
        else:
            self.handle, self.params, self.text = load(model, mesh=self._mesh)
        rows = 8 if isinstance(batch_size, str) and not batch_size.isdigit() else int(batch_size)
        shards = document_shards(self._mesh)
        self.batch_size = -(-rows // shards) * shards
        self.max_length = max_length or self.handle.config.max_positions
        self._seed, self._name = seed, str(model)

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_ids[0] if self.text.eos_ids else self.text.pad_id

    @property
    def prefix_token_id(self) -> int:
        named = self.text.named_bos_id
        return self.eot_token_id if named is None else named

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokens of a text, after BOS where the model family expects it."""
        before = [] if self.text.bos_id is None or add_special_tokens is False else [self.text.bos_id]
        return before + self.text.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) the log-probability of the continuation, nats, and whether it is what
        greedy decoding would say."""
        rows = [((before + after)[-(self.max_length + 1) :], len(after)) for _, before, after in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, answer in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return answers

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        longest = max(len(tokens) - 1 for tokens, _ in rows)
        tokens_BT = np.zeros((self.batch_size, padded(longest) + 1), np.int32)
        for row, (tokens, _) in enumerate(rows):
            tokens_BT[row, : len(tokens)] = tokens
        with over(self._mesh):
            scores = _next_tokens(self.handle, self.params, place_batch(tokens_BT, self._mesh))
        logprob_BT, correct_BT = (np.asarray(x) for x in scores)
        answers = []
        for row, (tokens, scored) in enumerate(rows):
            part = slice(len(tokens) - 1 - scored, len(tokens) - 1)
            answers.append((float(logprob_BT[row, part].astype(np.float64).sum()), bool(correct_BT[row, part].all())))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (string,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            scored = self._loglikelihood_tokens([(None, *utils.make_disjoint_window(window)) for window in windows])
            totals.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_decoding(request.args[1]), []).append(i)
        key = jax.random.key(self._seed)
        for (stop, max_tokens, temperature), rows in groups.items():
            ends_SV = stop_table(self.text, self.handle.config.vocab_size, stop)
            prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - max_tokens) :] for i in rows]
            decoder = Decoder(
                self.handle, self.params, max_tokens, temperature or GREEDY, ends_SV, rows=self.batch_size,
                mesh=self._layout, shared=common(prompts),
            )  # fmt: skip
            ids = [stable_hash("prompt", requests[i].args[0]) >> 33 for i in rows]
            for i, (sampled,) in zip(rows, decode(decoder, prompts, ids, 1, key), strict=True):
                texts[i] = finish(self.text, sampled, stop)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts


def _decoding(settings: dict[str, Any]) -> tuple[tuple[str, ...], int, float]:
    """Stop strings, cap and temperature (0: greedy) of a request's generation settings."""
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    caps = (settings.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    max_tokens = next((int(cap) for cap in caps if cap is not None), DEFAULT_MAX_TOKENS)
    sampled = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
    return stop, max_tokens, float(settings.get("temperature", 1.0)) if sampled else 0.0


@functools.partial(jax.jit, static_argnums=0)
def _next_tokens(model, params, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of every token but the first given those before it, [B, T-1], and whether it is the likeliest."""
    hidden_BTD, _ = model.hidden(params, tokens_BT[:, :-1])
    scores = token_logprobs(model.unembedding(params), hidden_BTD, jnp.asarray(tokens_BT)[:, 1:])
    return scores.logprob, scores.correct
