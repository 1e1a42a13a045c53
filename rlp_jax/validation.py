# SPDX-License-Identifier: Apache-2.0
"""Settings that cannot work, found before anything is loaded."""

import importlib.util
import math
import re

from rlp_jax.config import RESPONDING, WITHOUT_THOUGHTS, Config, ConfigError, RLPConfig


def validate(config: Config) -> None:
    """Checks every setting that can be checked without model, data and devices.

    Raises:
      ConfigError: the first setting that cannot work.
    """
    rlp, data, evaluation, optimizer = config.rlp, config.data, config.eval, config.optimizer
    if rlp.group_size < 2:
        raise ConfigError(f"rlp.group_size is {rlp.group_size}: a group-relative advantage needs at least 2 thoughts")
    if config.report.group_size < 2:
        raise ConfigError(f"report.group_size is {config.report.group_size}: advantages need at least 2 thoughts")
    at_least_one = {
        "steps": config.steps,
        "batch_documents": config.batch_documents,
        "max_skipped": config.max_skipped,
        "rlp.positions": rlp.positions,
        "rlp.horizon": rlp.horizon,
        "rlp.thought_tokens": rlp.thought_tokens,
        "rlp.updates_per_batch": rlp.updates_per_batch,
        "rlp.minibatches": rlp.minibatches,
        "rlp.microbatches": rlp.microbatches,
        "cpt.sequence_tokens": config.cpt.sequence_tokens,
        "sft.sequence_tokens": config.sft.sequence_tokens,
        "rpt.rounds": config.rpt.rounds,
        "rpt.entropy_top": config.rpt.entropy_top,
        "data.document_tokens": data.document_tokens,
        "data.min_tokens": data.min_tokens,
        "data.heldout_documents": data.heldout_documents,
        "eval.documents": evaluation.documents,
        "eval.positions": evaluation.positions,
        "eval.group_size": evaluation.group_size,
        "eval.batch_documents": evaluation.batch_documents,
        "report.positions": config.report.positions,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    not_negative = {
        "seed": config.seed,
        "eval.every": evaluation.every,
        "report.documents": config.report.documents,
        "rlp.top_k": rlp.top_k,
        "rlp.slots": rlp.slots,
        "rlp.importance_cap": rlp.importance_cap,
        "rlp.clip_high": rlp.clip_high,
        "rlp.kl_coefficient": rlp.kl_coefficient,
        "rpt.entropy_threshold": config.rpt.entropy_threshold,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.warmup_steps": optimizer.warmup_steps,
        "checkpoint.keep_every": config.checkpoint.keep_every,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise ConfigError(f"{name} is {value}: it must not be negative")
    if config.checkpoint.keep_every % config.checkpoint.every:
        raise ConfigError(
            f"checkpoint.keep_every is {config.checkpoint.keep_every}: only multiples of checkpoint.every, "
            f"{config.checkpoint.every}, are saved"
        )
    positive = {
        "rlp.temperature": rlp.temperature,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.clip_norm": optimizer.clip_norm,
    }
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} is {value}: it must be positive and finite")
    below_one = {
        "rlp.clip_low": rlp.clip_low,
        "rlp.ema_decay": rlp.ema_decay,
        "rlp.min_p": rlp.min_p,
        "optimizer.beta1": optimizer.beta1,
        "optimizer.beta2": optimizer.beta2,
        "data.heldout_fraction": data.heldout_fraction,
    }
    for name, value in below_one.items():
        if not 0 <= value < 1 and not (name in ("rlp.clip_low", "rlp.ema_decay") and value == 1):
            raise ConfigError(f"{name} is {value}: it must be at least 0 and below 1")
    if rlp.rollout_dtype == "int8" and importlib.util.find_spec("qwix") is None:
        raise ConfigError("rlp.rollout_dtype is 'int8', which needs a library: pip install 'rlp_jax[int8]'")
    if not 0 < rlp.top_p <= 1:
        raise ConfigError(f"rlp.top_p is {rlp.top_p}: it must be above 0 and at most 1")
    if data.heldout_fraction == 0:
        raise ConfigError("data.heldout_fraction is 0: the run's evaluation needs held-out documents")
    if optimizer.final_learning_rate is not None and not optimizer.final_learning_rate >= 0:
        raise ConfigError(f"optimizer.final_learning_rate is {optimizer.final_learning_rate}: it must not be negative")
    updates = config.steps * config.updates
    if optimizer.warmup_steps >= updates:
        raise ConfigError(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}, the run has {updates} updates: make it smaller"
        )
    if rlp.horizon >= data.document_tokens:
        raise ConfigError(
            f"rlp.horizon is {rlp.horizon}, data.document_tokens {data.document_tokens}: a document cannot hold a "
            "prefix and the horizon"
        )
    if config.batch_documents % (rlp.microbatches * rlp.minibatches):
        raise ConfigError(
            f"batch_documents is {config.batch_documents}, not a multiple of rlp.microbatches {rlp.microbatches}"
            + (f" times rlp.minibatches {rlp.minibatches}" if rlp.minibatches > 1 else "")
        )
    if evaluation.batch_documents < 2 or evaluation.documents < 2:
        name = "eval.batch_documents" if evaluation.batch_documents < 2 else "eval.documents"
        raise ConfigError(f"{name} is 1: the shuffled control needs the thought of another document, so at least 2")
    if config.mesh.rollout_tensor < 0 or (config.mesh.rollout_tensor and config.mesh.rollout != "gathered"):
        raise ConfigError(
            f"mesh.rollout_tensor is {config.mesh.rollout_tensor}: it is 0, or devices that sample from weights "
            "gathered once, with mesh.rollout=gathered"
        )
    if config.algorithm in WITHOUT_THOUGHTS:
        _validate_without_thoughts(config)
    if config.algorithm in RESPONDING:
        _validate_responding(config)
    if not config.model:
        raise ConfigError("model is empty: give a preset, a Hugging Face directory or a GGUF file")
    if not data.sources:
        raise ConfigError("data.sources is empty: give files, datasets or a built-in generator")


def _validate_without_thoughts(config: Config) -> None:
    if config.rlp.kl_coefficient > 0:
        raise ConfigError(
            f"rlp.kl_coefficient is {config.rlp.kl_coefficient}, and algorithm {config.algorithm} samples no thoughts "
            "that it could hold back: set it to 0"
        )
    sequence_tokens = getattr(config, config.algorithm).sequence_tokens
    if sequence_tokens < config.data.document_tokens:
        raise ConfigError(
            f"{config.algorithm}.sequence_tokens is {sequence_tokens}, data.document_tokens "
            f"{config.data.document_tokens}: a sequence has to hold the longest document"
        )
    try:
        re.compile(config.sft.answer_pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"sft.answer_pattern is {config.sft.answer_pattern!r}, no regular expression: {error}"
        ) from None


def _validate_responding(config: Config) -> None:
    name, settings = config.algorithm, getattr(config, config.algorithm)
    if not settings.answer_close:
        raise ConfigError(f"{name}.answer_close is empty: give the text that ends an answer")
    if name == "rlvr" and config.rlp.positions != 1:
        raise ConfigError(f"rlp.positions is {config.rlp.positions}: algorithm rlvr responds to a document once, set 1")
    if config.rlp.reward != RLPConfig().reward:
        raise ConfigError(f"rlp.reward is {config.rlp.reward!r}: algorithm {name} has a judge's, leave it as it is")


def check_devices(config: Config, mesh_shape: tuple[int, int, int, int]) -> None:
    """The batch must split over the mesh, and the mesh over what samples.

    Args:
      config: the run's.
      mesh_shape: slices, and devices along data, fsdp, tensor.

    Raises:
      ConfigError: a microbatch (batch_documents / minibatches / microbatches) does not divide over the first three, or
        see `check_sampling`.
    """
    ways = math.prod(mesh_shape[:3])
    part = config.batch_documents // (config.rlp.microbatches * config.rlp.minibatches)
    if part % ways:
        raise ConfigError(
            f"a microbatch has {part} documents, not a multiple of the {ways} devices along the mesh's "
            "slices, data and fsdp axes"
        )
    check_sampling(config.mesh.rollout_tensor, *mesh_shape[2:])


def check_sampling(sampling: int, fsdp: int, tensor: int) -> None:
    """Raises ConfigError where `mesh.rollout_tensor` does not divide the devices along fsdp and tensor."""
    if sampling and (sampling % tensor or fsdp % (sampling // tensor)):
        raise ConfigError(
            f"mesh.rollout_tensor is {sampling}: with fsdp={fsdp} and tensor={tensor} it must be a multiple of "
            f"{tensor} that divides {fsdp * tensor}"
        )
