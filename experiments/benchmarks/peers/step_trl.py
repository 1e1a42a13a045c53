# SPDX-License-Identifier: Apache-2.0
"""A step of TRL's GRPOTrainer (torch on CPU, float32) with the information gain as its reward function.

The reward is what a user would write: the model itself, under no_grad, reads prompt, thought, closing tag and gives the
log-probability of the next token; its moving average reads the plain document, once for the group. The average follows
after each step. One optimizer step a batch, no KL term, no gradient checkpointing (which was slower).
"""

import copy

import tokenizers
import torch
import trl
from datasets import Dataset
from protocol import Conversation
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

EMA_DECAY = 0.999


def text_of(tokens: list[int]) -> str:
    """What `numbers` reads as these tokens. Brackets: a special token is found inside other words too, 2 in 21."""
    return " ".join(f"<{token}>" for token in tokens)


def numbers(vocab_size: int, end: int = 2) -> PreTrainedTokenizerFast:
    """A tokenizer whose text is the token numbers themselves, so that every side reads the same tokens."""
    vocabulary = {text_of([token]): token for token in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=text_of([end]), pad_token=text_of([0]))


def texts(tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]]) -> list[str]:
    """The prompts as the trainer wants them; it must read them as these very tokens."""
    written = [text_of(prompt) for prompt in prompts]
    assert tokenizer(written)["input_ids"] == prompts
    return written


@torch.no_grad()
def next_logprob(model, sequences: list[list[int]]) -> torch.Tensor:
    """log p(last token | the tokens before it) of sequences of one length."""
    tokens = torch.tensor(sequences)
    logits = model(tokens[:, :-1], logits_to_keep=1).logits[:, -1]
    return logits.log_softmax(-1).gather(-1, tokens[:, -1:])[:, 0]


def load(job: dict):
    """The policy and its moving average."""
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=torch.float32)
    return model, copy.deepcopy(model).requires_grad_(False).eval()


def settings_for(job: dict, prompts: int, **more) -> trl.GRPOConfig:
    """One optimizer step a batch of so many prompts, no KL term, no gradient checkpointing."""
    return trl.GRPOConfig(
        job["directory"] + "-trl",  # nothing is written
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=prompts * job["group"] // job["microbatches"],
        gradient_accumulation_steps=job["microbatches"],
        steps_per_generation=job["microbatches"],
        num_generations=job["group"],
        max_completion_length=job["new"],
        temperature=job["temperature"],
        beta=0.0,
        loss_type="grpo",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **more,
    )


@torch.no_grad()
def follow(average, model) -> None:
    """The moving average after one more step."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - EMA_DECAY)


class OneStepATurn(TrainerCallback):
    def __init__(self, conversation, trainer, average):
        self.conversation, self.trainer, self.average = conversation, trainer, average

    def on_step_begin(self, *args, **kwargs):
        self.conversation.begin()

    def on_step_end(self, *args, **kwargs):
        follow(self.average, self.trainer.model)
        self.conversation.end(int(self.trainer._metrics["train"]["thought_tokens"][-1]))


def main():
    conversation = Conversation()
    job = conversation.job
    model, average = load(job)
    documents, group, close = job["documents"], job["group"], job["close"]
    asked, tokenizer = [document[:-1] + job["open"] for document in documents], numbers(model.config.vocab_size)

    def information_gain(completion_ids, document, log_metric, **_):
        thinking = [
            [*asked[b], *thought, *close, documents[b][-1]] for thought, b in zip(completion_ids, document, strict=True)
        ]
        log_metric("thought_tokens", sum(map(len, completion_ids)))
        baseline = next_logprob(average, [documents[b] for b in document[::group]]).repeat_interleave(group)
        return (next_logprob(model, thinking) - baseline).tolist()

    rows = {"prompt": texts(tokenizer, asked), "document": list(range(len(documents)))}
    settings = settings_for(
        job,
        len(documents),
        generation_kwargs={"min_new_tokens": job["new"]},  # no thought ends early
        max_steps=1_000,
    )
    trainer = trl.GRPOTrainer(model, information_gain, settings, Dataset.from_dict(rows), processing_class=tokenizer)
    trainer.add_callback(OneStepATurn(conversation, trainer, average))
    baseline = next_logprob(average, documents).tolist()
    conversation.ready({"baseline": baseline, "torch": torch.__version__, "trl": trl.__version__})
    trainer.train()


if __name__ == "__main__":
    main()
