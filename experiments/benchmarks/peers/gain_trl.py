# SPDX-License-Identifier: Apache-2.0
"""Training with TRL's GRPOTrainer (torch on CPU, float32) for `gain.py`, the information gain as its reward function.

As in step_trl.py, but thoughts end with the closing tag (the end token here), and prefixes differ in length. Advantages
are TRL's own: divided by the group's standard deviation.
"""

import pathlib

import torch
import trl
from datasets import Dataset
from protocol import Conversation
from step_trl import follow, load, numbers, settings_for, texts
from transformers import TrainerCallback


@torch.no_grad()
def next_logprob(model, sequences: list[list[int]]) -> torch.Tensor:
    """log p(last token | the tokens before it) of sequences of any lengths."""
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    tokens = torch.zeros(len(sequences), int(last.max()) + 1, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    rows = torch.arange(len(sequences))
    logits = model(tokens[:, :-1]).logits[rows, last - 1]  # padding comes after what is read
    return logits.log_softmax(-1)[rows, tokens[rows, last]]


class Turns(TrainerCallback):
    def __init__(self, conversation, model, average, made):
        self.conversation, self.model, self.average, self.made = conversation, model, average, made
        self.turn, self.out = conversation.job["turn"], pathlib.Path(conversation.job["out"])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.turn == 0:
            self.conversation.begin()
            self.made.clear()

    def on_step_end(self, args, state, control, **kwargs):
        follow(self.average, self.model)
        if state.global_step % self.turn == 0:
            self.conversation.end(sum(self.made))
            directory = self.out / str(state.global_step)
            self.model.save_pretrained(directory)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                source = pathlib.Path(self.conversation.job["directory"]) / name
                if source.exists():
                    (directory / name).write_bytes(source.read_bytes())


def main():
    conversation = Conversation()
    job = conversation.job
    model, average = load(job)
    group, (close,), made = job["group"], job["close"], []
    rows = [row for step in job["steps"] for row in step]

    def information_gain(completion_ids, row, **_):
        made.append(sum(map(len, completion_ids)))
        thinking = [
            rows[i]["prompt"] + list(thought) + [close] * (close not in thought) + [rows[i]["target"]]
            for thought, i in zip(completion_ids, row, strict=True)
        ]
        plain = [rows[i]["plain"] + [rows[i]["target"]] for i in row[::group]]
        baseline = next_logprob(average, plain).repeat_interleave(group)
        return (next_logprob(model, thinking) - baseline).tolist()

    tokenizer = numbers(model.config.vocab_size, end=close)
    settings = settings_for(job, len(job["steps"][0]), max_steps=len(job["steps"]))
    data = {"prompt": texts(tokenizer, [row["prompt"] for row in rows]), "row": list(range(len(rows)))}
    trainer = trl.GRPOTrainer(model, information_gain, settings, Dataset.from_dict(data), processing_class=tokenizer)
    trainer.add_callback(Turns(conversation, trainer.model, average, made))
    conversation.ready({"torch": torch.__version__, "trl": trl.__version__})
    trainer.train()


if __name__ == "__main__":
    main()
