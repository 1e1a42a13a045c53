# SPDX-License-Identifier: Apache-2.0
"""Makes the study: `python -m experiments.paper.drive [--only PATTERN] [--workers 2] [--minutes M] [--list]`.

Data and bases are made where they are missing (a base that is kept in bases/ beside this file is copied), then every
run that has no result file, in the order of `study.py`: one `rlp train` on one core, then its examination, then its
result, written at once. The same command goes on where one stopped or was killed. A run that fails is reported, the
others go on, and the exit code is 1 at the end.

    WORK/data, bases/NAME, weights/NAME    the study's files, bases (the kept ones), and what runs ended with
    WORK/runs/NAME, logs/NAME.log          run directories, without checkpoints once the result is there
    WORK/cache                             compiled programs, shared by all runs

Result files whose settings, data or base weights are not those of the study as it is now are refused: exit code 2.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path

from experiments.paper import outcome
from experiments.paper import study as study_module
from experiments.paper.configs import DATA
from experiments.paper.prepare import copy_bases, make_data
from experiments.paper.pretrain import BASES
from experiments.paper.processes import Failed, Finished, Pool
from experiments.paper.study import Run, Study
from rlp_jax.config import Config, ConfigError, to_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results" / "paper"
WORK = ROOT / "runs" / "paper"
RECORDED = ROOT / "experiments" / "paper" / "recorded.py"
PLAN_SECONDS = 5.0  # between looks for what can be begun: a base may be there before its pretraining has ended


class Driver:
    """What is there and what is to be made.

    Args:
      study: all runs.
      work: everything but results; made where it is missing.
      results: folder of the result files.
    """

    def __init__(self, study: Study, work: Path, results: Path):
        self.study, self.work, self.folder = study, work.resolve(), results
        self.runs = {run.name: run for run in study.runs}
        self.sweeps = study.sweeps()
        self.results = {path.stem: outcome.read(path) for path in sorted(results.glob("*.json"))}
        unknown = sorted(self.results.keys() - self.runs.keys())
        if unknown:
            raise ConfigError(f"{self.path(unknown[0])}: the study has no run of this name: remove it")
        self.failed: dict[str, str] = {}
        self._fingerprints: dict[str, str] = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    # What references stand for.

    def best(self, sweep: str) -> Run | None:
        """The best run of a sweep, None while one of its results is missing."""
        runs = self.sweeps[sweep]
        if not all(run.name in self.results for run in runs):
            return None
        return study_module.best({run.name: self.results[run.name]["validation"] for run in runs}, runs)

    def target(self, reference: str) -> str | None:
        """The name of the base or run that a reference stands for, None where its sweep has no best run yet."""
        if reference not in self.sweeps:
            return reference
        best = self.best(reference)
        return best and best.name

    def weights(self, name: str) -> Path:
        """Of a base or a run, relative to the work directory."""
        return Path("bases" if name in self.study.bases else "weights") / name

    def made(self, name: str) -> bool:
        """Whether a base or a run has left what others need of it."""
        if not (self.work / self.weights(name) / "config.json").is_file():
            return False
        return name in self.study.bases or (self.work / "runs" / name / "summary.json").is_file()

    def references(self, run: Run) -> dict[str, str | None]:
        found = {name: getattr(run, name) for name in ("start", "match_run", "rival_run")}
        return {name: self.target(reference) for name, reference in found.items() if reference}

    def rate(self, run: Run) -> float | None:
        """The learning rate that a run's sweep has chosen, None where it has none or none yet."""
        best = self.best(run.rate_from) if run.rate_from else None
        return best and best.config.optimizer.learning_rate

    def settings(self, run: Run) -> tuple[Config | None, dict] | None:
        """A run's config and what its result has to say; None while a sweep that decides it is not complete."""
        references, rate = self.references(run), self.rate(run)
        if None in references.values() or (run.rate_from and rate is None):
            return None
        config = run.config and study_module.resolved(run, self.weights(references["start"]), rate)
        return config, outcome.settings(run, config, references, self.study.problems)

    # Checks.

    def fingerprint(self, place: Path) -> str:
        """Of the data, a base or a run's weights in the work directory; "" where there is none."""
        directory, name = self.work / place, place.as_posix()
        if name not in self._fingerprints and directory.is_dir():
            of = outcome.data_fingerprint if name == DATA else outcome.weights_fingerprint
            self._fingerprints[name] = of(directory)
        return self._fingerprints.get(name, "")

    def check(self) -> None:
        """Raises ConfigError for a result that is not of the study as it is now."""
        first: dict[Path, tuple[str, Path]] = {}
        for name, result in self.results.items():
            run = self.runs[name]
            settings = self.settings(run)
            if settings is not None and (names := outcome.differing(result, settings[1])):
                raise ConfigError(
                    f"{self.path(name)} was made with other settings than the study has now: {', '.join(names)}; "
                    "remove it to make it again"
                )
            for kind, place in (("data", Path(DATA)), ("base_weights", self.weights(run.base))):
                recorded, there = result["fingerprints"][kind], self.fingerprint(place)
                other = (there, self.work / place) if there else first.setdefault(place, (recorded, self.path(name)))
                if recorded != other[0]:
                    raise ConfigError(
                        f"{self.path(name)} was made with other {kind.replace('_', ' ')} than {other[1]}: remove it "
                        "to make it again, or restore what it was made with"
                    )

    # What to do next.

    def pending(self, selected: Iterable[Run]) -> list[str]:
        """Bases and runs that are to be made, in order: selected runs without a result, and what they need again."""
        wanted: dict[str, None] = {}

        def need(name: str) -> None:
            run = self.runs.get(name)
            if name in wanted or (run is not None and name not in self.results) or self.made(name):
                return
            if run is not None:
                for target in self.references(run).values():
                    need(target)
            wanted[name] = None

        for run in selected:
            if run.name not in self.results:
                for target in self.references(run).values():
                    if target is not None:
                        need(target)
                wanted[run.name] = None
        return list(wanted)

    def missing(self, name: str) -> list[str]:
        """What a pending base or run still waits for."""
        if name in self.study.bases:
            return []
        run = self.runs[name]
        waits = [one.name for one in self.sweeps.get(run.rate_from, ()) if one.name not in self.results]
        for reference in (run.start, run.match_run, run.rival_run):
            if reference in self.sweeps:
                waits += [one.name for one in self.sweeps[reference] if one.name not in self.results]
            target = self.target(reference) if reference else None
            if target and not (self.made(target) and (target in self.study.bases or target in self.results)):
                waits.append(target)
        return list(dict.fromkeys(waits))

    # Making it.

    def make_bases(self, names: list[str]) -> Generator[tuple, Finished, str]:
        done = yield ["-m", "experiments.paper.pretrain", *names, "--out", "bases"], names[0]
        for name in names:
            self._fingerprints.pop(self.weights(name).as_posix(), None)
        if missing := [name for name in names if not self.made(name)]:
            raise Failed(f"the pretraining has ended without {', '.join(missing)}")
        self.check()
        return f"made in {done.seconds:.0f} s"

    def make_run(self, run: Run) -> Generator[tuple, Finished, str]:
        """Trains, examines and writes the result, or, where it is there, only checks that the weights are the same."""
        config, wanted = self.settings(run)
        references = self.references(run)
        start, place = self.weights(references["start"]), Path("runs") / run.name
        compute, source = {}, start
        if config is not None:
            settings = self.work / "settings" / f"{run.name}.json"
            settings.write_text(to_json(config) + "\n", encoding="utf-8")
            arguments = ["-m", "rlp_jax", "train", str(RECORDED), "--with", f"settings=settings/{run.name}.json"]
            arguments += ["--run-dir", str(place)] + (["--match", run.match] if run.match else [])
            for option in ("match_run", "rival_run"):
                if option in references:
                    arguments += [f"--{option.replace('_', '-')}", f"runs/{references[option]}"]
            resumed = (self.work / place / "config.json").is_file()
            done = yield arguments, run.name
            compute = {"wall_seconds": done.seconds, "processor_seconds": done.processor_seconds, "resumed": resumed}
            source = place
        scores = self.work / "scores" / f"{run.name}.json"
        arguments = ["-m", "experiments.paper.examine", str(source), "--data", DATA, "--split", run.split]
        arguments += ["--problems", str(self.study.problems), "--out", str(scores)]
        if config is not None:
            arguments += ["--weights", str(self.weights(run.name))]
        done = yield arguments, run.name
        compute["examination_seconds"] = done.seconds
        where = {}
        if run.located and run.name not in self.results:
            file = self.work / "scores" / f"{run.name}.where.json"
            yield ["-m", "experiments.paper.locate", str(source), "--out", str(file)], run.name
            where = json.loads(file.read_text())
        own = start if config is None else self.weights(run.name)
        self._fingerprints.pop(own.as_posix(), None)
        fingerprints = {
            "data": self.fingerprint(Path(DATA)),
            "base_weights": self.fingerprint(self.weights(run.base)),
            "start": self.fingerprint(start),
            "weights": self.fingerprint(own),
        }
        if run.name in self.results:
            if self.results[run.name]["fingerprints"]["weights"] != fingerprints["weights"]:
                shutil.rmtree(self.work / own)
                raise Failed(f"made again, it has other weights than {self.path(run.name)}: remove that to go on here")
            text = "made again, as others start from it"
        else:
            given = self.work / place, json.loads(scores.read_text()), where, compute, fingerprints
            result = outcome.assemble(run, wanted, *given)
            self.folder.mkdir(parents=True, exist_ok=True)
            outcome.write(self.path(run.name), result)
            self.results[run.name] = result
            text = outcome.describe(result)
        shutil.rmtree(self.work / place / "checkpoints", ignore_errors=True)
        self.choose(run.sweep)
        return text

    def choose(self, sweep: str) -> None:
        """Marks the best run of a sweep that is complete."""
        best = self.best(sweep) if sweep else None
        if best is not None:
            for name in outcome.mark_chosen(self.results, list(self.sweeps[sweep]), best):
                outcome.write(self.path(name), self.results[name])
            say(f"{sweep}: the best rate is {best.config.optimizer.learning_rate:g}")


def drive(driver: Driver, selected: list[Run], pool: Pool, deadline: float) -> int:
    """Makes what is pending until nothing can be made, or no more may be begun. Returns the exit code."""
    begun: dict[str, None] = {}
    planned, ready = -math.inf, []
    while True:
        if pool.free and time.monotonic() - planned > PLAN_SECONDS:
            todo = [name for name in driver.pending(selected) if name not in begun and name not in driver.failed]
            planned, ready = time.monotonic(), [name for name in todo if not driver.missing(name)]
        while ready and pool.free and time.monotonic() < deadline:
            name = ready[0]
            names = [name]
            if name in driver.study.bases:  # those of one pretraining together
                names = [one for one in ready if one in driver.study.bases and BASES[one][0] == BASES[name][0]]
                job = driver.make_bases(names)
            else:
                job = driver.make_run(driver.runs[name])
            begun |= dict.fromkeys(names)
            ready = [one for one in ready if one not in names]
            say(f"{', '.join(names)}: begun")
            pool.begin(names[0], job)
        if not pool.busy:
            break
        for name, text, error in pool.turn():
            if error:
                driver.failed[name] = text
                say(f"{name}: failed: {text}")
                with (driver.work / "failures.jsonl").open("a") as file:
                    file.write(json.dumps({"name": name, "error": text}) + "\n")
            else:
                say(f"{name}: {text}")
            begun.pop(name, None)
            planned = -math.inf
    driver.check()
    left = [run.name for run in selected if run.name not in driver.results]
    say(f"{len(selected) - len(left)} of {len(selected)} runs have results in {driver.folder}")
    if driver.failed:
        say(f"failed: {', '.join(driver.failed)}")
    waiting = {name: waits for name in left if name not in driver.failed and (waits := driver.missing(name))}
    if waiting and time.monotonic() < deadline:
        name, waits = next(iter(waiting.items()))
        say(f"{len(waiting)} wait for others, {name} for {some(waits)}")
    return 1 if driver.failed else 0


def select(study: Study, pattern: str) -> list[Run]:
    """Runs whose name, or a part of it between "--", matches.

    Raises:
      ConfigError: none does.
    """
    runs = [
        run
        for run in study.runs
        if any(fnmatch.fnmatchcase(part, pattern) for part in (run.name, *run.name.split("--")))
    ]
    if not runs:
        raise ConfigError(f"--only {pattern}: no run matches; --list shows their names")
    return runs


def some(names: list[str], shown: int = 2) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def listing(driver: Driver, runs: list[Run]) -> str:
    lines = []
    for run in runs:
        waits = [] if run.name in driver.results else driver.missing(run.name)
        state = "done" if run.name in driver.results else f"waits for {some(waits)}" if waits else "ready"
        lines.append(f"{run.name:45s} {state}")
    return "\n".join(lines)


@contextlib.contextmanager
def only_driver(work: Path):
    """Raises ConfigError where another driver works in the same directory."""
    for folder in ("settings", "scores", "logs", "runs", "weights", "bases"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{work} is in use by another driver: wait for it or choose another --work") from None
        yield


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(arguments: list[str] | None = None, study: Study | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs whose name or a part of it matches")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--work", type=Path, default=WORK, help="where everything but results is kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="show the runs and make none")
    args = parser.parse_args(arguments)
    study = study or study_module.study()
    try:
        if args.workers < 1:
            raise ConfigError(f"--workers is {args.workers}: it must be at least 1")
        selected = select(study, args.only)
        driver = Driver(study, args.work, args.results)
        driver.check()
        if args.list:
            print(listing(driver, selected))
            return 0
        deadline = time.monotonic() + 60 * args.minutes
        with only_driver(driver.work), Pool(args.workers, driver.work, ROOT) as pool:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            make_data(driver.work, pool, driver.check)
            copy_bases(study.bases, driver.work / "bases")
            return drive(driver, selected, pool, deadline)
    except KeyboardInterrupt:
        return 130
    except Failed as error:
        print(f"drive: data: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"drive: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
