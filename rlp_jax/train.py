# SPDX-License-Identifier: Apache-2.0
"""The loop around the step: data, sample, learn, log, evaluate, checkpoint.

A run is a function of its config alone: every key comes from (seed, step, purpose), and a checkpoint holds the place
in the data and in the log files beside the train state. So the same command continues a run that was killed, and what
it writes then is what it would have written without the interruption (timings apart).
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from rlp_jax.algorithms import ALGORITHMS, Decode, Step
from rlp_jax.baselines.rlvr import check_verifier
from rlp_jax.baselines.rpt import check_proxy
from rlp_jax.checkpoint import DIRECTORY, Checkpoints, Position, latest_step, truncate_logs
from rlp_jax.checkpoints_io.leaves import Target
from rlp_jax.checkpoints_io.load import open_model
from rlp_jax.config import RESPONDING, Config, ConfigError, to_json
from rlp_jax.data.filters import FILE as FILTERED
from rlp_jax.data.filters import Filtered
from rlp_jax.data.pipeline import Batch, TrainBatches, heldout_batches, load_documents, mixture, train_batches
from rlp_jax.data.template import TemplateTokens, check_lengths, template_tokens
from rlp_jax.distributed import Team, fetch, own_rows
from rlp_jax.evals.every_token import first_documents, rows_of
from rlp_jax.evals.likelihood import evaluate
from rlp_jax.goodput import CompileTime, first_start, goodput, productive
from rlp_jax.interrupt import StopSignals
from rlp_jax.models.transformer import LanguageModel
from rlp_jax.optimizer import make_optimizer, make_schedule
from rlp_jax.profiling import Profiler
from rlp_jax.report.page import write_report
from rlp_jax.rollout.selfcheck import check_sharing
from rlp_jax.rows import (
    Clock,
    Progress,
    appetite_message,
    not_finite_rows,
    skipped_message,
    thought_rows,
    throughput,
    watch,
)
from rlp_jax.settings import check_devices, check_same_run, fingerprint, from_json, validate
from rlp_jax.sharding import make_mesh, mesh_shape, place_batch, place_state, with_shardings
from rlp_jax.state import Purpose, TrainState, init_state, run_key, step_key
from rlp_jax.storage import retried
from rlp_jax.writers import FILES, NoLog, RunLog, printer, write_atomically

THOUGHTS_EVERY = 5  # steps between the rows of thoughts.jsonl
LOCK = ".lock"
BEFORE_CONFIG = {LOCK, ".config.json.tmp"}  # what a run may have written before it was killed


class TooManySkipped(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row."""


class Parts(NamedTuple):
    """Everything that a run is built from, checked to fit together.

    `params` are the weights to start from, on their devices, and given up to the state of a fresh run. None where a
    checkpoint will take their place, so that memory never holds both.
    """

    model: LanguageModel
    params: Any
    tokenizer: Any
    tokens: TemplateTokens
    batches: TrainBatches
    heldout: list[Batch]
    mesh: jax.sharding.Mesh | None
    filtered: Filtered


def train(
    config: Config,
    run_dir: str | Path,
    console: Console | None = None,
    team: Team | None = None,
    profile: range | None = None,
    wandb: str | None = None,
) -> Path:
    """Runs the config's algorithm, or continues the run in `run_dir`.

    Args:
      config: all settings.
      run_dir: made when config, model and data have been checked; see ARCHITECTURE.md for what it holds. Several
        processes share it.
      console: where to print.
      team: the processes of the run, as `distributed.join` gives them; all of them call this.
      profile: steps to trace.
      wandb: the Weights & Biases project that gets the run's numbers too; None: none.

    Returns:
      The path of report.html.

    Raises:
      ValueError: a setting, the model, the data or the run directory cannot work; nothing was written.
      SharingError: this backend computes shared prefixes wrong; nothing was written.
      TooManySkipped: `config.max_skipped` steps in a row were not finite.
      StorageError: the run directory could not be written to, again and again; the last checkpoint is as it was.
      Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
    """
    run_dir, team = Path(run_dir), team or Team()
    console = (console or Console()) if team.first else Console(quiet=True)
    say = printer(console)
    validate(config)
    saved = sorted(path.name for path in (run_dir / DIRECTORY).glob("*") if path.name.isdigit())
    team.same({"settings": to_json(config), "checkpoints": " ".join(saved), "jax version": jax.__version__})
    if finished(config, run_dir):
        report = run_dir / "report.html"
        say(f"{run_dir} is finished ({config.steps} steps)")
        return write_report(run_dir) if team.first and not report.is_file() else report
    parts = prepare(config, console, team, fresh=latest_step(run_dir) is None)
    with contextlib.ExitStack() as stack:
        if team.first:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_process(run_dir))
            (run_dir / "summary.json").unlink(missing_ok=True)
            write_atomically(run_dir / "config.json", to_json(config) + "\n")
            retried(lambda: parts.filtered.save(run_dir / FILTERED), run_dir / FILTERED, say)
        team.wait("run directory")
        if not (run_dir / "config.json").is_file():
            raise ConfigError(
                f"{run_dir} is not the directory that process 0 writes to: all processes have to share it"
            )
        checkpoints = stack.enter_context(Checkpoints(run_dir, config.checkpoint, say))
        stop = stack.enter_context(team.stop_signals())
        evaluations = loop(config, run_dir, parts, checkpoints, stop, console, team, profile, wandb)
    report = run_dir / "report.html"
    if team.first:
        summary = json.dumps(evaluations, indent=2) + "\n"
        retried(lambda: write_atomically(run_dir / "summary.json", summary), run_dir / "summary.json", say)
        retried(lambda: write_report(run_dir), report, say)
    return report


def prepare(config: Config, console: Console, team: Team, fresh: bool = True) -> Parts:
    """Model, data and mesh, checked to fit together. Raises ValueError where they do not.

    Args:
      config: all settings.
      console: where to print.
      team: the processes of the run.
      fresh: whether the run starts from the model's weights rather than from a checkpoint.
    """
    check_devices(config, mesh_shape(config.mesh, jax.device_count()))
    mesh = make_mesh(config.mesh)
    model, tokenizer, read = open_model(config.model, config.compute_dtype)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=config.remat))
    tokens = template_tokens(config.template, tokenizer)
    check_lengths(tokens, config, model.config.max_positions)
    with console.status("reading documents"):
        examples = config.sft if config.algorithm == "sft" else None
        questions = config.algorithm == "rlvr"
        splits = load_documents(
            config.data, tokenizer, config.seed, config.rlp.position_mode, examples=examples, questions=questions
        )
    shape = (config.data.document_tokens, tokenizer.pad_id)
    rows = own_rows(mesh, config.batch_documents)
    mixed, ahead = mixture(config.data, splits.parts), config.data.prefetch
    batches = train_batches(
        splits.train, config.batch_documents, *shape, config.seed, rows=rows, mixture=mixed, prefetch=ahead
    )
    heldout = heldout_batches(splits.heldout, config.eval.batch_documents, config.eval.documents, *shape)
    held = " ".join(str(document.id) for document in splits.heldout)
    team.same({"training documents": batches.get_state()["documents"], "held-out documents": held})
    if len(np.unique(heldout[0]["document_B"])) < 2:
        raise ConfigError(
            "only one held-out document: the shuffled control needs another one's thought, so raise eval.documents, "
            "eval.batch_documents or data.heldout_fraction, or add documents to data.sources"
        )
    if config.algorithm == "rpt":
        check_proxy(config, tokenizer)
    if config.algorithm == "rlvr":
        check_verifier(config.rlvr)
    counts = ", ".join(f"{name} {count}" for name, count in splits.report.items() if count)
    console.print(f"data: {counts}", markup=False, highlight=False, soft_wrap=True)
    params = read(Target(mesh)) if fresh or config.rlp.kl_coefficient > 0 else None
    if fresh:
        longest = int(np.argmax(heldout[0]["length_B"]))
        check_sharing(model, params, heldout[0]["tokens_BT"][longest, : heldout[0]["length_B"][longest]])
    return Parts(model, params, tokenizer, tokens, batches, heldout, mesh, splits.filtered)


def finished(config: Config, run_dir: Path) -> bool:
    """Whether this very run has ended already.

    Raises:
      ConfigError: the directory cannot be this run's.
    """
    if re.search(r"\[.+\]", str(run_dir.resolve())):  # Orbax takes it for a pattern, and its saves are incomplete
        raise ConfigError(
            f"{run_dir.resolve()} has [...] in its name: no checkpoint could be read from it, choose another"
        )
    if not run_dir.exists():
        return False
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is a file: choose another --run-dir")
    recorded = run_dir / "config.json"
    if not recorded.is_file():
        if any(path.name not in BEFORE_CONFIG for path in run_dir.iterdir()):
            raise ConfigError(f"{run_dir} holds other files and no config.json: choose another --run-dir")
        return False
    before = from_json(recorded.read_text(), str(recorded))
    check_same_run(config, before, run_dir)
    return before.steps == config.steps and (run_dir / "summary.json").is_file()


@contextlib.contextmanager
def only_process(run_dir: Path):
    """Holds the run directory's lock; the system lets go of it when the process ends, however it ends.

    Raises:
      ConfigError: another process holds it.
    """
    with open(run_dir / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"{run_dir} is in use by another process: wait for it or choose another --run-dir"
            raise ConfigError(message) from None
        yield


def loop(
    config: Config,
    run_dir: Path,
    parts: Parts,
    checkpoints: Checkpoints,
    stop: StopSignals,
    console: Console,
    team: Team,
    profile: range | None,
    wandb: str | None = None,
):
    """From the latest checkpoint (or the start) to the last step. Returns {"before": ..., "after": ...}."""
    model, tokens, mesh, decode = parts.model, parts.tokens, parts.mesh, parts.tokenizer.decode
    updates = config.steps * config.updates
    optimizer, schedule = make_optimizer(config.optimizer, updates), make_schedule(config.optimizer, updates)
    reference = parts.params if config.rlp.kl_coefficient > 0 else None
    step = ALGORITHMS[config.algorithm](model, optimizer, tokens, config, reference, mesh)
    batches, heldout = parts.batches, [place_batch(batch, mesh) for batch in parts.heldout]
    closing = 0 if config.algorithm in RESPONDING else len(tokens.close)  # responses are shown whole
    state, progress = start_or_resume(config, run_dir, parts, optimizer, checkpoints, team)
    learn = in_place(step.learn, state, mesh)
    begun = n = int(state.step)
    started = first_start(run_dir) if team.first else time.time()
    log = RunLog(run_dir, config.steps, n, console, wandb, dataclasses.asdict(config)) if team.first else NoLog()
    with log, CompileTime() as compiling, Profiler(run_dir, profile if team.first else None) as profiler:
        if checkpoints.latest_step() is not None:
            log.message(f"resuming {run_dir} after step {n}")

        def save(wait=True):
            where = (batches.get_state(), log.positions(), dataclasses.asdict(progress), fingerprint(config))
            checkpoints.save(state, Position(*where), wait)

        while True:
            if stop.requested:
                save()
                stop.check()
            if evaluation_due(config, n) and progress.evaluated < n:
                key = step_key(config.seed, 0, Purpose.EVALUATION)  # the same draws before and after
                with stop.at_once(save):
                    held = stop.between(heldout)
                    result = evaluate(model, state.params, state.ema_params, held, tokens, config, key)
                    shown = documents(config, parts, state, key, stop) if n in (0, config.steps) else []
                log.evaluation({"step": n} | result)
                log.documents([{"step": n} | row for row in shown])
                progress.evaluated = n
                progress.evaluations["after" if progress.evaluations else "before"] = result
            last = n == config.steps
            if last or (n and n % config.checkpoint.every == 0):
                save(wait=last)
            if last:
                return progress.evaluations

            compiling.lap()
            profiler.before(n + 1)
            clock = Clock(team)
            batch = place_batch(next(batches), mesh, config.batch_documents)
            clock.lap("data")
            sample = functools.partial(step.sample, state.params, state.ema_params, batch, run_key(config.seed, n))
            samples = sample()
            clock.lap("sample", samples)
            if step.judge is not None:
                samples = place_batch(judged(step, batch, samples, sample, decode), mesh)
                clock.lap("judge")
            state, metrics, scores = learn(state, batch, samples)
            clock.lap("learn", metrics)

            n += 1
            if profiler.after(n):
                log.message(f"trace up to step {n} written to {profiler.directory}")
            progress.productive += productive(sum(clock.seconds.values()), compiling.lap())
            row = {"step": n} | {name: float(value) for name, value in fetch(metrics).items()}
            row["learning_rate"] = float(schedule((n - 1 - progress.skipped) * config.updates))
            row |= clock.row() | throughput(config, batch, samples, clock) | clock.appetite(config.batch_documents)
            row["goodput"] = goodput(progress.productive, started, time.time())
            row |= watch(progress, row, closing, log)
            if n == begun + 2:  # the first step of a start compiles
                log.message(appetite_message(row, config.data.prefetch))
            log.step(row)
            if row["finite"] != 1.0:
                log.not_finite(rows := not_finite_rows(n, batch, samples, scores, decode))
                if progress.skipped_in_a_row >= config.max_skipped:
                    file = str(run_dir / "nonfinite.jsonl")
                    raise TooManySkipped(skipped_message(progress.skipped_in_a_row, rows, file))
            if n % THOUGHTS_EVERY == 0 or n == 1:
                log.thoughts(thought_rows(n, batch, samples, scores, decode, closing))


def documents(config: Config, parts: Parts, state: TrainState, key: jax.Array, stop: StopSignals) -> list[dict]:
    """The first few held-out documents with the gain at every token, for the report."""
    place = functools.partial(place_batch, mesh=parts.mesh)
    given = parts.tokenizer, parts.tokens, config, key, place
    shown = stop.between(list(first_documents(parts.heldout, config.report.documents)))
    return [row for batch in shown for row in rows_of(parts.model, state.params, state.ema_params, batch, *given)]


def judged(step: Step, batch: Batch, samples: Any, sample: Callable, decode: Decode) -> Any:
    """The samples with the judge's verdicts, on the host; `sample` samples the batch once more."""

    def again(*more):
        return fetch(sample(*more))

    return step.judge(*fetch((batch, samples)), decode, again)


def start_or_resume(
    config: Config, run_dir: Path, parts: Parts, optimizer, checkpoints: Checkpoints, team: Team
) -> tuple[TrainState, Progress]:
    """The state to go on from; puts the data iterator and the log files where they were then."""
    if checkpoints.latest_step() is None:
        if team.first:
            truncate_logs(run_dir, dict.fromkeys(FILES, 0))
        kept = config.rlp.kl_coefficient > 0  # as the reference
        state = init_state(parts.params, optimizer, consume=not kept)
        return place_state(state, parts.mesh), Progress()
    abstract = jax.eval_shape(lambda: init_state(parts.model.init(jax.random.key(0)), optimizer))
    state, position = checkpoints.restore(with_shardings(abstract, parts.mesh), fingerprint(config))
    if team.first:
        truncate_logs(run_dir, position.logs)
    parts.batches.set_state(position.data)
    return state, Progress.from_json(position.progress)


def in_place(learn: Callable, state: TrainState, mesh: jax.sharding.Mesh | None) -> Callable:
    """The learner with its state kept where it is: the compiler must not move it from one step to the next."""
    if mesh is None:
        return learn
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(learn, donate_argnums=0, out_shardings=(shardings, None, None))


def evaluation_due(config: Config, n: int) -> bool:
    return n in (0, config.steps) or (config.eval.every > 0 and n % config.eval.every == 0)
