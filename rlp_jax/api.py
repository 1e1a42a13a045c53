# SPDX-License-Identifier: Apache-2.0
"""The public functions of `rlp_jax`: what the commands do, as calls. See the package's docstring for the list.

Each imports what it needs when it is called. Bad input is a ValueError (`ConfigError` where it is a setting) of one
line that names it.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rlp_jax.config import Config, ConfigError, SuiteConfig, Template

if TYPE_CHECKING:
    from rich.console import Console

    from rlp_jax.checkpoints_io.load import Loaded

    Model = str | os.PathLike[str] | Loaded


class Thought(NamedTuple):
    """One thought.

    Attributes:
      text: without its tags.
      gain: nats a scored token that it makes the text likelier than no thought does; None at the end of the text.
      token_gains: the same of each scored token; empty at the end of the text.
      tokens: sampled, a closing tag counted.
      stopped: whether it closed itself; else it was cut at the cap.
    """

    text: str
    gain: float | None
    token_gains: tuple[float, ...]
    tokens: int
    stopped: bool


class Thoughts(NamedTuple):
    """Thoughts at one position of a text.

    Attributes:
      position: the token they were thought before.
      prefix, target: the text before it, and the tokens after it that are scored ("" at the end of the text).
      baseline: mean log-probability of the target's tokens without a thought, nats; None at the end of the text.
      thoughts: in the order they were drawn.
    """

    position: int
    prefix: str
    target: str
    baseline: float | None
    thoughts: tuple[Thought, ...]

    @property
    def best(self) -> Thought:
        """The thought with the largest gain; the first one at the end of the text."""
        return max(self.thoughts, key=lambda thought: thought.gain or 0.0) if self.target else self.thoughts[0]


def experiment(name: str, /, *, overrides: Iterable[str] = (), **arguments: str) -> Config:
    """The settings of an experiment that comes with the package, or of a .py file with `config() -> Config`.

    Args:
      name: "quickstart", "smollm2", "pod/qwen3_1_7b", ...; or the path of a .py file.
      overrides: settings as on the command line, for instance ["rlp.group_size=8"].
      **arguments: what the experiment's `config` takes, for instance corpus="encyclopedia".

    Raises:
      ConfigError: no such experiment, argument or setting (with the nearest names), or a value of another type.
    """
    from rlp_jax.settings import load_experiment, override

    return override(load_experiment(name, [f"{key}={value}" for key, value in arguments.items()]), overrides)


def train(
    config: Config,
    run_dir: str | os.PathLike[str] | None = None,
    *,
    console: "Console | None" = None,
    profile: range | None = None,
    wandb: str | None = None,
) -> dict[str, Any]:
    """Trains, or continues the run in `run_dir`; a finished run is read.

    Args:
      config: all settings; which algorithm is `config.algorithm`.
      run_dir: where everything is written; None: runs/NAME.
      console: a rich Console to print on; None: standard output.
      profile: steps to trace for XProf, for instance range(5, 7).
      wandb: a Weights & Biases project that gets the numbers too (pip install 'rlp_jax[wandb]'); None: none.

    Returns:
      The run's summary: "before" and "after" training, each with the held-out gain in nats a scored token (`gain`,
      `gain_ci95`), its controls (`gain_empty`, `gain_shuffled`), `ce_think`, `ce_no_think`, `acc_think` and others.

    Raises:
      ValueError: a setting, the model, the data or the run directory cannot work; nothing was written.
      Interrupted: SIGINT or SIGTERM; a checkpoint was saved, and the same call goes on.
      TooManySkipped, SharingError, StorageError: as `rlp_jax.train.train` says.
    """
    import json

    from rlp_jax.train import train as run
    from rlp_jax.wandb_writer import check_wandb

    run_dir = Path("runs") / config.name if run_dir is None else Path(run_dir)
    if wandb is not None:
        check_wandb(wandb)
    run(config, run_dir, console, profile=profile, wandb=wandb)
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def sample(
    model: "Model",
    text: str,
    position: int | None = None,
    *,
    thoughts: int = 4,
    tokens: int | None = None,
    horizon: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    config: Config | None = None,
    template: Template | None = None,
) -> Thoughts:
    """Thinks before one token of a text, and says how much each thought helps to predict what follows it.

    Args:
      model: preset, Hugging Face directory, GGUF file or run directory; or (model, params, tokenizer) as `load` gives
        them, which reads the weights once for many calls.
      text: any.
      position: number of the token to think before; None: the end of the text, where no gain can be measured.
      thoughts: how many.
      tokens: cap on each, in tokens; None: the run's or experiment's, at most 256.
      horizon: tokens scored after a thought; None: the run's or experiment's.
      temperature: None: the run's or experiment's.
      seed: decides the thoughts.
      config: where template, cap, horizon and temperature come from; None: the run's own, or those of the experiment
        that trains this model, or the defaults.
      template: how thoughts are framed; None: the config's.

    Raises:
      ValueError: no such model or position, a number out of its range, or a text that does not fit the context.
    """
    import dataclasses

    from rlp_jax.evals.think import open_thinker

    if template is not None:
        config = dataclasses.replace(config or Config(), template=template)
    thinker = open_thinker(model, config)
    thinking = thinker.think(text, position, thoughts, tokens, temperature, horizon, seed)
    decode = thinker.tokenizer.decode
    found = []
    for g, thought in enumerate(thinking.thoughts):
        gain = None if thinking.gain_G is None else float(thinking.gain_G[g])
        gains = () if thinking.gain_GH is None else tuple(float(x) for x in thinking.gain_GH[g])
        found.append(Thought(decode(thought), gain, gains, int(thinking.length_G[g]), bool(thinking.stopped_G[g])))
    prefix = decode(thinking.tokens[: thinking.position])
    return Thoughts(thinking.position, prefix, decode(thinking.target), thinking.s_ema, tuple(found))


def evaluate(
    model: str | os.PathLike[str],
    tasks: str | Iterable[str],
    data: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    ema: bool = False,
    out: str | os.PathLike[str] | None = None,
    text: str | None = None,
    experiment: str | None = None,
    classes: str | os.PathLike[str] | None = None,
    mesh: str | None = None,
    settings: SuiteConfig | None = None,
    say: Any = None,
) -> dict[str, Any]:
    """Benchmarks, perplexity with and without thoughts, or where in text thoughts gain: what `rlp eval` does.

    The same call goes on where one was stopped: every response is a line of `out`/TASK.jsonl.

    Args:
      model: preset, Hugging Face directory, GGUF file or run directory.
      tasks: "gsm8k", "perplexity", "gain", ..., one or several.
      data: a .jsonl file, a directory of them, or a Hugging Face dataset as NAME:CONFIG:SPLIT; None: the task's own.
      limit: the first so many problems or documents.
      ema: of a run: the moving average instead of the policy.
      out: where the records go; None: beside the run, or evals/MODEL.
      text, experiment, classes, mesh: as the command's options.
      settings: shots, samples, temperature and so on; None: the defaults.
      say: called with lines that tell how far it is; None: silent.

    Returns:
      model, out, tasks (name to results) and the paper's averages.

    Raises:
      ConfigError: bad input. StorageError: records that cannot be written.
    """
    from rlp_jax.evals.command import Request
    from rlp_jax.evals.command import evaluate as run

    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    request = Request(
        os.fspath(model), names, None if data is None else os.fspath(data), settings or SuiteConfig(), limit, ema,
        experiment, text, _path(out), _path(classes), mesh,
    )  # fmt: skip
    return run(request, say or (lambda line: None))


def export(
    model: "Model",
    directory: str | os.PathLike[str],
    *,
    ema: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Writes a model as a Hugging Face directory that transformers loads: all of it or nothing.

    Args:
      model: run directory, preset, Hugging Face directory or GGUF file; or (model, params, tokenizer).
      directory: a new or an empty one.
      ema: of a run: the moving average instead of the policy.
      dtype: of the stored weights; "float32" is bit for bit.

    Returns:
      The directory.

    Raises:
      ValueError: no such model, a directory that is in use, or `ema` of what is no run.
    """
    from rlp_jax.checkpoints_io.load import load, save_hf
    from rlp_jax.settings import is_run

    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty directory: name a new one")
    run = not isinstance(model, tuple) and is_run(Path(model))
    if ema and not run:
        raise ConfigError(f"ema: {_named(model)} is not a run directory, it has no moving average")
    if isinstance(model, tuple):
        handle, params, tokenizer = model
    elif run:
        from rlp_jax.checkpoint import load_run

        name = "ema_params" if ema else "params"
        loaded = load_run(Path(model), (name,))
        handle, params, tokenizer = loaded.model, getattr(loaded, name), loaded.tokenizer
    else:
        handle, params, tokenizer = load(model, host=True)
    save_hf(directory, handle, params, tokenizer, dtype)
    return directory


def report(*run_dirs: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes a run's figures and page again, or a page that sets several runs side by side.

    Args:
      run_dirs: run directories.
      out: of several runs: the page's file.

    Returns:
      The path of the page: report.html of one run, `out` of several.

    Raises:
      ReportError: not a run directory. ConfigError: `out` is missing, or given for one run.
    """
    if (len(run_dirs) == 1) != (out is None) or not run_dirs:
        raise ConfigError(f"report of {len(run_dirs)} runs with out={out}: name one run, or several and out")
    from rlp_jax.report.page import write_comparison, write_report

    if out is None:
        return write_report(Path(run_dirs[0]))
    return write_comparison([Path(run_dir) for run_dir in run_dirs], Path(out))


def _named(model: Any) -> str:
    return "the loaded model" if isinstance(model, tuple) else os.fspath(model)


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return None if given is None else Path(given)
