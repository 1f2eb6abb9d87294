"""`tune`: search the settings of distillation on a part of the training data that is held out.

Each pass trains several students side by side, whose settings Optuna's sampler has drawn from what the passes before
have shown; the worst are ended on the way (successive halving). Labels come from the store, so that a search costs no
teacher.
"""

import contextlib
import csv
import fcntl
import io
import json
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.plots import TrialCurve, plot_trials
from softlabel.store.open import open_store
from softlabel.training import run_folder
from softlabel.training.config import GRID, TrainConfig
from softlabel.training.grid import StudentConfig, students_of
from softlabel.training.halving import HALVED, Halving
from softlabel.training.search_space import RANGES, SearchSpace
from softlabel.training.study import State, Study, Trial, require_optuna
from softlabel.training.summary import StudentResult
from softlabel.training.train import train_together
from softlabel.training.tune_config import TRAINING, TuneConfig, list_defaults, plan_search

log = logging.getLogger("softlabel")

JOURNAL, IDENTITY, TRIALS, BEST, PLOT = "study.journal", "tune.json", "trials.csv", "best.yaml", "tuning.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """What a search found.

    Attributes:
        out: its folder.
        trials: every student, in the order in which their settings were drawn.
        best: the one with the highest accuracy among those that were trained to the end.
        defaults: the one that came furthest of those that had the defaults of their loss; None where these lie outside
            of the ranges.
        command: `softlabel train` with the best settings, on all the data.
        already_done: nothing was left to do.
        seconds: wall time of this call.
    """

    out: str
    trials: tuple[Trial, ...]
    best: Trial
    defaults: Trial | None
    command: str
    already_done: bool
    seconds: float

    def table(self) -> str:
        """The trials that were trained to the end, best first, as text."""
        done = sorted((one for one in self.trials if one.state == "done"), key=lambda one: -(one.score or 0.0))
        columns = ["trial", "pass", "accuracy", *done[0].settings]
        rows = [
            [str(one.number), str(one.of_pass), f"{one.score:.4f}", *(_show(value) for value in one.settings.values())]
            for one in done
        ]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = (
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)
        )
        return "\n".join(line.rstrip() for line in lines)


def tune(config: TuneConfig, **training: Any) -> TuneResult:
    """Search settings, or go on with the search in `config.out`.

    Args:
        config: see `TuneConfig`.
        **training: options of `TrainConfig` (those of `TRAINING`), the same for all students.

    Raises:
        UsageError: a setting makes no sense, Optuna is not installed, or another process searches in `config.out`
            (MismatchError: `config.out` holds another search).
        DataError, StoreError: data or labels cannot be used.
        TrainingError: no student was trained to the end.
    """
    started = time.perf_counter()
    require_optuna()
    if odd := sorted(set(training) - set(TRAINING)):
        raise UsageError(f"{odd[0]}: expected an option of tune, such as {', '.join(TRAINING[:3])}; leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("tune: expected one process, found several (WORLD_SIZE); start it without torchrun")
    shared, space = plan_search(config, training)
    defaults = list_defaults(shared, config)
    folder = Path(config.out)
    with _hold(folder, _identify(config, shared, space)):
        study = Study(folder / JOURNAL, space, seed=shared.seed)
        worked = False
        for number in range(1, config.passes + 1):
            first = [one for one in defaults if space.has(one)] if number == 1 else []
            worked |= _run_pass(study, number, config, shared, first[: config.students])
        trials = tuple(trial for trial in study.list_trials() if trial.state != "open")
        best = _choose(trials, config)
        of_defaults = [one for one in trials if one.settings in defaults and one.scores]
        options = _list_options(config, shared, training, best)
        result = TuneResult(
            out=config.out,
            trials=trials,
            best=best,
            defaults=max(of_defaults, key=lambda one: (max(one.scores), one.score), default=None),
            command=_write_command(options),
            already_done=not worked,
            seconds=time.perf_counter() - started,
        )
        _write_files(folder, options, trials)
    return result


def _run_pass(study: Study, number: int, config: TuneConfig, shared: TrainConfig, first: list[dict[str, Any]]) -> bool:
    """Train the students of a pass that are not trained yet; return whether there were any."""
    trials = study.draw(number, config.students, first)
    if all(trial.state != "open" for trial in trials):
        return False
    halving = Halving(len(trials), shared.epochs, config.reduction)
    steps = ", ".join(f"{kept} after epoch {epoch}" for epoch, kept in halving.rungs.items())
    log.info("pass %d of %d: %d students, %s", number, config.passes, len(trials), steps or "all to the end")
    shared = replace(shared, out=str(Path(config.out) / f"pass-{number}"))
    results = train_together(shared, [_make_student(shared, trial) for trial in trials], halving)
    for trial, result in zip(trials, results, strict=True):
        scores = {one.epoch: one.score for one in result.history if one.score is not None}
        study.close(trial, _find_state(result), scores)
    done = [trial for trial in study.list_trials() if trial.state == "done"]
    if done:
        best = max(done, key=lambda trial: trial.score or 0.0)
        log.info("best so far: trial %d, accuracy %.4f, %s", best.number, best.score, describe_settings(best.settings))
    return True


def _make_student(shared: TrainConfig, trial: Trial) -> StudentConfig:
    (student,) = students_of(replace(shared, **trial.settings))
    name = f"trial-{trial.number}"
    return replace(student, name=name, out=str(Path(shared.out) / name), shared=shared)


def _find_state(result: StudentResult) -> State:
    if result.failure is None:
        return "done"
    return "halved" if result.failure.startswith(HALVED) else "failed"


def _choose(trials: tuple[Trial, ...], config: TuneConfig) -> Trial:
    done = [trial for trial in trials if trial.state == "done"]
    if not done:
        raise UsageError(f"{config.out}: no student was trained to the end; lower --lr, or give more --students")
    return max(done, key=lambda trial: trial.score or 0.0)


# ---- files ----


@contextlib.contextmanager
def _hold(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder of a search for one process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(f"{folder}: cannot be used as the folder of a search: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{folder}: another process is searching there; wait, or use another --out") from error
        path = folder / IDENTITY
        new = json.loads(json.dumps(identity))
        if not path.exists():
            if any(found.name != ".lock" for found in folder.iterdir()):
                raise UsageError(
                    f"{folder}: expected a new folder or that of a search, found other files; use another --out"
                )
            run_folder.write_atomically(path, json.dumps(new, indent=2).encode() + b"\n")
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); use another --out") from error
        if differences := run_folder.list_differences(earlier, new):
            raise MismatchError(f"{folder}: holds another search; {'; '.join(differences)}. Use another --out")
        yield


def _identify(config: TuneConfig, shared: TrainConfig, space: SearchSpace) -> dict[str, Any]:
    """Return what must be the same for a search to go on; `passes` may grow."""
    return {
        "labels": open_store(config.labels).manifest.store_id,
        "student": config.student,
        **space.to_dict(),
        **{name: getattr(config, name) for name in ("students", "reduction", "held_out")},
        **shared.shared_identity(),
        **{name: getattr(shared, name) for name in GRID if name not in ("student", "loss", *RANGES)},
    }


def _list_options(config: TuneConfig, shared: TrainConfig, training: Mapping[str, Any], best: Trial) -> dict[str, Any]:
    """Return the options of `softlabel train` with the best settings, but for its folder and defaults."""
    own = {one.name: one.default for one in fields(TrainConfig)}
    matters = {*shared.shared_identity(), *GRID}  # nor where and how fast it ran
    given = {name: value for name, value in training.items() if value != own[name] and name in matters}
    settings = {name: value for name, value in best.settings.items() if value is not None}
    return {"data": config.data, "labels": config.labels, "student": config.student, **settings, **given}


def _write_command(options: Mapping[str, Any]) -> str:
    words = ["softlabel", "train"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *(_show(one) for one in values)]
    return shlex.join([*words, "--out", "runs/tuned"])


def _write_files(folder: Path, options: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    run_folder.write_atomically(folder / BEST, yaml.safe_dump(dict(options), sort_keys=False).encode())
    text = io.StringIO()
    columns = ["trial", "pass", "state", "epochs", "score", "loss", *RANGES]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for one in trials:
        own = {"trial": one.number, "pass": one.of_pass, "state": one.state, "score": one.score}
        writer.writerow({**own, "epochs": max(one.scores, default=0), **one.settings})
    run_folder.write_atomically(folder / TRIALS, text.getvalue().encode())
    measured = [TrialCurve(settings=one.settings, scores=one.scores) for one in trials if one.scores]
    plot_trials(measured, folder / PLOT)


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Return settings in one line: loss kd, lr 0.1, ..."""
    return ", ".join(f"{name} {_show(value)}" for name, value in settings.items() if value is not None)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
