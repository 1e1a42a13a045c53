# SPDX-License-Identifier: Apache-2.0
"""A step of Tunix's GRPO learner (JAX on CPU, float32) with the information gain as its reward function.

As with TRL: the policy itself reads prompt, thought, closing tag and gives the log-probability of the next token, its
moving average reads the plain document, once for the group; both compiled. One optimizer step a batch, no KL term.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tunix_model
from flax import nnx
from protocol import Conversation
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

EMA_DECAY = 0.999


@nnx.jit
def next_logprob(model, sequences):
    """log p(last token | the tokens before it) of sequences of one length."""
    logits = tunix_model.logits(model, sequences[:, :-1])[:, -1]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), sequences[:, -1:], -1)[:, 0]


@nnx.jit(donate_argnums=0)
def follow(average, model):
    """The moving average after one more step."""
    old, new = nnx.state(average, nnx.Param), nnx.state(model, nnx.Param)
    nnx.update(average, jax.tree.map(lambda a, b: EMA_DECAY * a + (1 - EMA_DECAY) * b, old, new))


def load(job: dict):
    """A mesh of one device, and on it the policy and its moving average."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    return mesh, *(tunix_model.load(job["directory"], mesh)[0] for _ in range(2))


def make_optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, b2=0.95, weight_decay=0.0))


def make_cluster(job: dict, model, mesh, optimizer, prompts: int, prompt_tokens: int, end: int):
    """One optimizer step a batch of so many prompts, each at most `prompt_tokens` long; `end` ends a thought."""
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=10_000,
        max_steps=1_000,
        mini_batch_size=prompts,
        train_micro_batch_size=prompts // job["microbatches"],
        rollout_micro_batch_size=prompts,
        compute_logps_micro_batch_size=prompts,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=job["new"],
        max_prompt_length=prompt_tokens,
        kv_cache_size=prompt_tokens + job["new"],
        temperature=job["temperature"],
        top_p=1.0,
        eos_tokens=[end],
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT)
    return rl_cluster.RLCluster(
        actor=model,
        tokenizer=tunix_model.Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )


def main():
    conversation = Conversation()
    job = conversation.job
    mesh, model, average = load(job)
    documents, group = job["documents"], job["group"]
    prompts = [" ".join(map(str, document[:-1] + job["open"])) for document in documents]
    prompt_tokens, made = len(documents[0]) - 1 + len(job["open"]), 0
    optimizer = make_optimizer(job["learning_rate"])
    cluster = make_cluster(job, model, mesh, optimizer, len(documents), prompt_tokens, end=tunix_model.NEVER)
    policy = cluster.actor_trainer.model

    def information_gain(prompts, completions, document, **_):
        nonlocal made
        thoughts = [[int(token) for token in text.split()] for text in completions]
        made = sum(map(len, thoughts))
        thinking = [
            documents[b][:-1] + job["open"] + thought + job["close"] + documents[b][-1:]
            for thought, b in zip(thoughts, document, strict=True)
        ]
        baseline_B = next_logprob(average, jnp.asarray([documents[b] for b in document[::group]]))
        return np.asarray(next_logprob(policy, jnp.asarray(thinking)) - jnp.repeat(baseline_B, group)).tolist()

    settings = GRPOConfig(num_generations=group, beta=0.0)
    learner = GRPOLearner(rl_cluster=cluster, algo_config=settings, reward_fns=information_gain)

    def batches():
        while True:
            conversation.begin()
            yield {"prompts": np.array(prompts), "document": np.arange(len(documents))}
            follow(average, policy)
            jax.block_until_ready((nnx.state(policy), nnx.state(average)))
            conversation.end(made)

    baseline = next_logprob(average, jnp.asarray(documents)).tolist()
    conversation.ready({"baseline": baseline, "jax": jax.__version__})
    learner.train(batches())


if __name__ == "__main__":
    main()
