# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run: frozen dataclasses, varied with `dataclasses.replace`.

The defaults are the paper's (RLP, arXiv 2510.01265, section 4) where it states one. Where it does not, the comment
beside the field says so and gives our reason. `experiments/*.py` hold one `def config() -> Config` each.
"""

import dataclasses
import json
from typing import Literal

Algorithm = Literal["rlp", "cpt", "sft", "rpt", "rlvr"]
PositionMode = Literal["uniform", "span", "entropy"]
Match = Literal["tokens", "flops", "counted"]
Dtype = Literal["float32", "bfloat16"]
RolloutDtype = Literal["float32", "bfloat16", "int8"]
RolloutLayout = Literal["same", "gathered"]
Reward = Literal["gain", "likelihood"]
Truncated = Literal["judged", "wrong", "masked"]
LengthNormalisation = Literal["response", "constant"]
Verifier = Literal["math", "choice", "exact", "reasoning_gym"]
OnMalformed = Literal["stop", "skip"]
Copies = Literal["keep", "drop"]
Long = Literal["cut", "drop"]
Remat = Literal["none", "elementwise", "layer"]


class ConfigError(ValueError):
    """A setting that cannot work: the message is one line naming the field, its value and what to do."""


@dataclasses.dataclass(frozen=True)
class Template:
    """How a thought is framed: instruction, document prefix, `open`, the thought, `close`, then the next tokens.

    The baseline never sees any of it: it reads the plain document. `open` must not be empty (its last token is
    what predicts the first thought token). A thought ends when it has sampled the tokens of `close`.

    Responses of "rpt" and "rlvr" hold thought and answer: they follow `open`, and end with `end` or at the cap.
    """

    # Before the document's prefix. The paper asks for brief thoughts and the same style, and gives no exact wording.
    instruction: str = (
        "Think briefly between <think> and </think> about what comes next in the text, "
        "then continue the text in the same style.\n\n"
    )
    open: str = "<think>"  # plain text, so that base models without special tokens can use it
    close: str = "</think>"  # sampled, it ends the thought; appended for scoring where the cap cut the thought
    end: str = ""  # of a response; "": the tokenizer's end-of-text token


@dataclasses.dataclass(frozen=True)
class RLPConfig:
    """The algorithm's settings."""

    group_size: int = 16  # G, thoughts a position
    positions: int = 1  # K, positions a document
    horizon: int = 1  # H, tokens scored after the thought; the paper scores one
    thought_tokens: int = 2048  # L, cap on sampled tokens of a thought, a sampled closing tag included
    temperature: float = 0.7  # sampling and the log-probabilities inside the ratio, so that the ratio starts at 1
    top_k: int = 0  # draw from the k likeliest tokens, 0: all; the log-probabilities of the learner follow
    top_p: float = 1.0  # draw from the fewest tokens with this much probability, 1: all
    min_p: float = 0.0  # draw from tokens at least this likely as a share of the likeliest, 0: all
    slots: int = 0  # thoughts of a document decoded at a time, the rest wait their turn; 0: all
    rollout_dtype: RolloutDtype | None = None  # of sampling; None: compute_dtype; int8: its weights alone
    importance_cap: float = 0.0  # truncates pi_trainer / pi_sampler, which then weighs a token's loss; 0: no weight
    # Where thoughts stand: "uniform" over the document as in the paper, "span": within data.span, "entropy": more often
    # where the plain prediction is unsure.
    position_mode: PositionMode = "uniform"
    # "likelihood" leaves out S_ema, which is the same for all thoughts of a position and so cancels in their advantage:
    # the update is the same, only the reported reward is another.
    reward: Reward = "gain"
    normalise: bool = False  # divide advantages by the group's standard deviation, as GRPO does; equation 7 does not
    clip_low: float = 0.2  # epsilon_l; not stated, TRL's default
    clip_high: float = 0.2  # epsilon_h; not stated, TRL's default
    kl_coefficient: float = 0.0  # beta
    ema_decay: float = 0.999  # tau
    updates_per_batch: int = 1  # passes over a rollout batch; not stated, on-policy is the safe reading
    minibatches: int = 1  # optimizer steps a pass, each on its share of the documents
    microbatches: int = 1  # a minibatch is split in this many parts whose gradients are summed: memory, not maths

    @property
    def updates(self) -> int:
        """Optimizer steps a rollout batch."""
        return self.updates_per_batch * self.minibatches


WITHOUT_THOUGHTS: tuple[Algorithm, ...] = ("cpt", "sft")  # what samples nothing: one update a batch
RESPONDING: tuple[Algorithm, ...] = ("rpt", "rlvr")  # what samples responses, and has them judged


@dataclasses.dataclass(frozen=True)
class CPTConfig:
    """Continued pretraining on the same documents, RLP's rival."""

    sequence_tokens: int = 8192  # computed at a time on a device, whole documents in them: memory, not maths


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning. A document's span (data.span) is its response, what is before it the prompt."""

    sequence_tokens: int = 8192  # as cpt's
    answer_pattern: str = ""  # regular expression of a final answer; responses without one are dropped ("" = none)


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """What "rpt" and "rlvr" share. Sampling and clipping are the settings of `rlp`, where a thought is the response."""

    normalise: bool = True  # divide by the group's standard deviation, as GRPO does; false: RLP's advantage
    drop_equal: bool = True  # groups of equal rewards take no part; false: they count in the mean, with no gradient
    # Responses at the cap. "judged": like any other, so that the cap changes nothing silently; "wrong": reward 0
    # whatever they say; "masked": no loss, and no part in their group's mean, standard deviation and number.
    truncated: Truncated = "judged"
    # "response": a response's mean over its tokens, equation 8; "constant": its sum over rlp.thought_tokens, so that
    # long wrong responses are not punished less a token (Dr. GRPO, arXiv 2503.20783).
    length: LengthNormalisation = "response"
    answer_after: str = "</think>"  # answers stand after the first of these, without one there is none; "": anywhere
    answer_open: str = "\\boxed{"  # the last one opens the answer; "": all that follows answer_after, to answer_close
    answer_close: str = "}"  # ends the answer that answer_open began


@dataclasses.dataclass(frozen=True)
class RPTConfig(GRPOConfig):
    """Reinforcement pre-training, arXiv 2506.08007: G=8, T=0.8 (rlp.group_size, rlp.temperature), 256 positions."""

    proxy: str = ""  # model whose entropy chooses positions, as `model`; "": the moving average of the policy
    entropy_top: int = 16  # likeliest tokens that the entropy is taken over, renormalised (not stated)
    entropy_threshold: float = 1.0  # nats; 0.5, 1.0 and 1.5 are the paper's easy, medium and hard
    rounds: int = 4  # of sampling at most, until every position's rewards differ (DAPO); not stated


@dataclasses.dataclass(frozen=True)
class RLVRConfig(GRPOConfig):
    """Post-training on questions with verifiable answers: the document up to its span is the question, data.answer (""
    = the span's text) the answer."""

    verifier: Verifier = "math"  # "math" and "reasoning_gym" need a package each


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The paper gives RLP's learning rate and schedule, and AdamW's settings for its CPT baseline only."""

    learning_rate: float = 1e-6  # per optimizer step; the paper's for RLP
    final_learning_rate: float | None = None  # None: constant; else cosine from learning_rate to it over the run
    warmup_steps: int = 0  # of linear warm-up; 0: none, the paper's rate is constant
    beta1: float = 0.9  # decay of the gradient's average; the paper's for CPT
    beta2: float = 0.95  # decay of the squares' average; the paper's for CPT
    weight_decay: float = 0.0  # decoupled; the paper's CPT has 0.1, for RLP it is not stated
    clip_norm: float = 1.0  # largest norm of the whole gradient; not stated, a common value


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Documents. `sources` are files (.jsonl, .txt, .parquet, .array_record; .gz and .zst), directories, patterns,
    URLs, datasets ("hf:NAME:CONFIG:SPLIT", "tfds:NAME:SPLIT") or built-in generators ("compose"); data/sources.py."""

    sources: tuple[str, ...] = ()  # at least one, read in this order
    weights: tuple[float, ...] = ()  # one a source, its share of every batch; (): every document once an epoch
    documents: int = 0  # read at most so many of each source, the first; 0: all
    text: str = "{text}"  # str.format over a jsonl record's fields
    span: str = ""  # likewise; the part of the text that positions of mode "span" come from ("" = all of it)
    answer: str = ""  # likewise; what "rlvr" checks responses against ("" = the document's first span)
    span_pattern: str = ""  # regular expression: only its matches within the spans count ("" = all of a span)
    document_tokens: int = 2048  # longer documents are cut into consecutive pieces
    long: Long = "cut"  # "drop": documents longer than document_tokens are dropped instead
    min_tokens: int = 8  # shorter pieces are dropped
    copies: Copies = "keep"  # documents whose text came before; they are counted either way
    malformed: OnMalformed = "stop"  # records that cannot be used; "skip": they are left out. Dropped is listed, always
    heldout_fraction: float = 0.05  # by hash of the document's text
    heldout_documents: int = 256  # at most this many are evaluated
    # How fast and where, never what: these may differ from start to start of a run.
    workers: int = 0  # processes that read and tokenise; 0: this one
    prefetch: int = 0  # batches made ahead of the step, in a thread
    cache: str = ""  # directory that keeps tokens, read from there instead of held in memory; "": none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation, before, during (`every`) and after training."""

    every: int = 0  # steps; 0: before and after only
    documents: int = 64  # held out, evaluated each time: more narrow the interval
    positions: int = 1  # scored a document
    group_size: int = 4  # thoughts a position, averaged; fewer than in training, for time
    batch_documents: int = 16  # evaluated at a time: memory and speed


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What the report's viewer shows of held-out documents, recorded before and after training. Changes no number."""

    documents: int = 4  # 0: none
    positions: int = 64  # of a document at most; all its tokens where there are no more
    group_size: int = 4  # thoughts at each


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 on one axis takes what is left."""

    slices: int = 1  # of a TPU pod with slower links between them: weights are replicated, documents split over them
    data: int = -1  # devices; documents are split over them, weights replicated
    fsdp: int = 1  # devices; documents and parameters are split over them
    tensor: int = 1  # devices; heads, features and vocabulary are split over them
    rollout: RolloutLayout = "same"  # weights while sampling: "gathered" over fsdp once a batch, or as the learner's
    rollout_tensor: int = 0  # devices along tensor while sampling, the more taken from fsdp; 0: as in the learner


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 20  # steps
    keep: int = 2  # the newest
    keep_every: int = 0  # steps; those of every such step are kept for good as well, 0: none


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run's steps were chosen to match: written by `rlp train --match` (aot/matching.py), read by nothing.

    Tokens and operations are those of whole runs; operations of a rival that samples are not counted, and 0. RLP's
    thoughts have the mean length of `run`, else the cap.
    """

    match: Match | None = None  # what is equal; None: nothing was matched
    run: str = ""  # directory of the RLP run whose thoughts' length counts
    document_tokens: float = 0.0  # mean
    thought_tokens: float = 0.0  # mean of a thought
    rlp_steps: int = 0  # steps of the RLP run that is matched
    rlp_input_tokens: float = 0.0  # tokens of its documents
    rlp_thought_tokens: float = 0.0  # tokens that it samples
    rlp_flops: float = 0.0  # operations of its whole run
    input_tokens: float = 0.0  # tokens of this run's documents
    flops: float = 0.0  # operations of this whole run
    sampled_tokens: float = 0.0  # of a rival that samples, by what it sampled in rival_run
    rival_run: str = ""  # directory of the run that tells how much a rival samples


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "run"  # default directory: runs/NAME
    model: str = ""  # preset name, Hugging Face directory or GGUF file
    steps: int = 100  # batches, each with `updates` optimizer steps; what an experiment is expected to set
    batch_documents: int = 512  # B
    seed: int = 0  # of everything random: with the settings it decides the run
    algorithm: Algorithm = "rlp"  # algorithms.py; every one is evaluated alike
    compute_dtype: Dtype = "float32"  # masters are float32 always
    remat: Remat = "layer"  # what the backward pass computes again: nothing, all but products, or a whole layer
    max_skipped: int = 5  # this many non-finite steps in a row end the run
    template: Template = Template()
    rlp: RLPConfig = RLPConfig()
    cpt: CPTConfig = CPTConfig()
    sft: SFTConfig = SFTConfig()
    rpt: RPTConfig = RPTConfig()
    rlvr: RLVRConfig = RLVRConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    budget: Budget = Budget()

    @property
    def updates(self) -> int:
        """Optimizer steps a batch."""
        return 1 if self.algorithm in WITHOUT_THOUGHTS else self.rlp.updates


def with_algorithm(config: Config, algorithm: Algorithm) -> Config:
    """The same run with another algorithm, under a name of its own; without thoughts there is no KL to measure."""
    if algorithm == config.algorithm:
        return config
    rlp = config.rlp
    if algorithm in WITHOUT_THOUGHTS:
        rlp = dataclasses.replace(rlp, kl_coefficient=0.0)
    return dataclasses.replace(config, name=f"{config.name}_{algorithm}", algorithm=algorithm, rlp=rlp)


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """Settings of `rlp eval`: of benchmarks (evals/suite.py), perplexity and gain (evals/perplexity.py, where.py)."""

    shots: int | None = None  # worked examples before a question, 0: an instruction instead; None: the task's usual
    max_tokens: int = 512  # cap on a response; not stated, enough for worked solutions of grade-school problems
    samples: int = 0  # k sampled responses a problem, beside the greedy one; the paper: 8 in mathematics, 4 in science
    temperature: float | None = None  # of samples and thoughts; not stated. None: that of the run, else 0.7
    think: bool = False  # a thought before each response
    thought_tokens: int | None = None  # cap on such a thought; None: that of the run or experiment, else 256
    positions: int = 8  # of a document, of perplexity and gain; the paper does not say
    position_mode: PositionMode | None = None  # how they are drawn; None: as rlp.position_mode says
    seed: int = 0  # of the samples
    batch: int = 16  # responses decoded at a time: memory and speed, not the responses


# What a run may change and stay the same run: `data.*` how fast and where it is read, never what.
FREE = ("report", "data.workers", "data.prefetch", "data.cache")
# What came after the first runs, whose checkpoints know nothing of it.
LATER = ("data.weights", "data.documents", "data.long", "data.copies", "data.malformed", "rlp.normalise")


def uncounted(config: Config) -> tuple[str, ...]:
    """Settings that a run's fingerprint leaves out: those that change no number, and those that came later and are not
    used, so that the checkpoints of earlier runs stay good."""
    ours, default = dataclasses.asdict(config), dataclasses.asdict(Config())
    unused = [name for name in LATER if _at(ours, name) == _at(default, name)]
    return (*FREE, *unused)


def _at(tree: dict, name: str):
    for part in name.split("."):
        tree = tree[part]
    return tree


def to_json(config: Config, without: tuple[str, ...] = ()) -> str:
    """The config as indented JSON, keys in order of definition; without these settings, by dotted names."""
    tree = dataclasses.asdict(config)
    for name in without:
        group, _, field = name.rpartition(".")
        del (_at(tree, group) if group else tree)[field]
    return json.dumps(tree, indent=2)
