# SPDX-License-Identifier: Apache-2.0
"""Training with Tunix's GRPO learner (JAX on CPU, float32) for `gain.py`, the information gain as its reward function.

As in step_tunix.py, but thoughts end with the closing tag (the end token here), and prefixes differ in length.
Advantages are Tunix's own: divided by the group's standard deviation.
"""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tunix_model
from flax import nnx
from protocol import Conversation
from safetensors.numpy import load_file, save_file
from step_tunix import follow, load, make_cluster, make_optimizer
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner


@nnx.jit
def _next_logprob(model, tokens, last):
    logits = tunix_model.logits(model, tokens[:, :-1])
    rows = jnp.arange(len(tokens))
    return jax.nn.log_softmax(logits[rows, last - 1])[rows, tokens[rows, last]]  # padding comes after what is read


def next_logprob(model, sequences: list[list[int]], length: int) -> jax.Array:
    """log p(last token | the tokens before it) of sequences of any lengths, padded to one length (one compilation)."""
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return _next_logprob(model, tokens, np.array([len(sequence) - 1 for sequence in sequences]))


def save(model, source: pathlib.Path, directory: pathlib.Path) -> None:
    """A copy of the directory that was loaded, with the model's weights in the places of that one's."""
    shutil.copytree(source, directory)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    own = {}

    def put(name: str, value: jax.Array):
        assert value.shape == tensors[name].shape, (name, value.shape, tensors[name].shape)
        own[name] = np.ascontiguousarray(value, np.float32)

    put("model.embed_tokens.weight", model.embedder.input_embedding.value)
    put("model.norm.weight", model.final_norm.w.value)
    for i, layer in enumerate(model.layers):
        at, attention, mlp = f"model.layers.{i}.", layer.attn, layer.mlp
        put(at + "input_layernorm.weight", layer.input_layernorm.w.value)
        put(at + "post_attention_layernorm.weight", layer.post_attention_layernorm.w.value)
        for name in ("q", "k", "v"):  # [D, N, E] here, [N E, D] there
            kernel = getattr(attention, f"{name}_proj").w.value
            put(at + f"self_attn.{name}_proj.weight", kernel.reshape(kernel.shape[0], -1).T)
        kernel = attention.o_proj.w.value  # [N, E, D]
        put(at + "self_attn.o_proj.weight", kernel.reshape(-1, kernel.shape[-1]).T)
        for name in ("gate", "up", "down"):
            put(at + f"mlp.{name}_proj.weight", getattr(mlp, f"{name}_proj").kernel.value.T)
    assert set(own) == set(tensors), set(tensors) ^ set(own)
    save_file(own, file)


def biases(params):
    """True where tunix_model's biases of zero are, which the model that is compared does not have."""
    return jax.tree.map_with_path(lambda path, _: "_bias" in jax.tree_util.keystr(path), params)


def main():
    conversation = Conversation()
    job = conversation.job
    mesh, model, average = load(job)
    rows = [row for step in job["steps"] for row in step]
    positions, group, new, (close,) = len(job["steps"][0]), job["group"], job["new"], job["close"]
    prompt_tokens = max(len(row["prompt"]) for row in rows)
    optimizer = optax.chain(optax.masked(optax.set_to_zero(), biases), make_optimizer(job["learning_rate"]))
    cluster = make_cluster(job, model, mesh, optimizer, positions, prompt_tokens, end=close)
    policy, made = cluster.actor_trainer.model, 0

    def information_gain(prompts, completions, row, **_):
        nonlocal made
        thoughts = [[int(token) for token in text.split()] for text in completions]
        made += sum(map(len, thoughts))
        thinking = [
            rows[i]["prompt"] + thought + [close] * (close not in thought) + [rows[i]["target"]]
            for thought, i in zip(thoughts, row, strict=True)
        ]
        plain = [rows[i]["plain"] + [rows[i]["target"]] for i in row[::group]]
        baseline_B = next_logprob(average, plain, prompt_tokens + 1)
        return np.asarray(
            next_logprob(policy, thinking, prompt_tokens + new + 2) - jnp.repeat(baseline_B, group)
        ).tolist()

    learner = GRPOLearner(
        rl_cluster=cluster, algo_config=GRPOConfig(num_generations=group, beta=0.0), reward_fns=information_gain
    )

    def batches():
        nonlocal made
        for n, step in enumerate(job["steps"]):
            if n % job["turn"] == 0:
                conversation.begin()
                made = 0
            prompts = [" ".join(map(str, row["prompt"])) for row in step]
            yield {"prompts": np.array(prompts), "row": n * positions + np.arange(positions)}
            follow(average, policy)
            jax.block_until_ready((nnx.state(policy), nnx.state(average)))
            if (n + 1) % job["turn"] == 0:
                conversation.end(made)
                save(policy, pathlib.Path(job["directory"]), pathlib.Path(job["out"]) / str(n + 1))

    conversation.ready({"jax": jax.__version__})
    learner.train(batches())
    conversation.begin()  # waits until there are no more turns


if __name__ == "__main__":
    main()
