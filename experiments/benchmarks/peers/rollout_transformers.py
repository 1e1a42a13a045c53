# SPDX-License-Identifier: Apache-2.0
"""Rollouts with `transformers` generate (torch on CPU, float32): the B x G prompts as one batch.

That is how its users sample G completions. Every sequence stops at its own length, which generate can use only once
the longest has finished: until then the finished ones are padded along.
"""

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Lengths(StoppingCriteria):
    """Sequence r is done after lengths[r] new tokens."""

    def __init__(self, prefix: int, lengths: torch.Tensor):
        self.prefix, self.lengths = prefix, lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prefix >= self.lengths


def prepare(job):
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=torch.float32)
    prompts = torch.tensor(job["documents"]).repeat_interleave(job["group"], 0)
    lengths = torch.tensor(job["lengths"]).flatten()
    prefix, new = prompts.shape[1], int(lengths.max())
    settings = {"do_sample": True, "temperature": job["temperature"], "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    settings |= {"eos_token_id": None, "max_new_tokens": new}
    stop = StoppingCriteriaList([Lengths(prefix, lengths)])
    mask = torch.ones_like(prompts)

    @torch.inference_mode()
    def run():
        out = model.generate(prompts, attention_mask=mask, stopping_criteria=stop, **settings)
        assert out.shape == (len(prompts), prefix + new)
        return int(lengths.sum())

    with torch.inference_mode():
        likeliest = model(prompts[:: job["group"]], logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return run, {"next": likeliest, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    serve(prepare)
