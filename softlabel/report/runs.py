"""Run folders as `softlabel train` leaves them: settings, curves, and the grid that several of them form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from softlabel.errors import DataError, UsageError, one_line
from softlabel.report.student_figures import Grid, RunFacts
from softlabel.training.config import GRID, TrainConfig
from softlabel.training.losses import LOSSES
from softlabel.training.metrics import EpochMetrics, read_csv
from softlabel.training.run_folder import (
    CHECKPOINT,
    DATA_KEYS,
    METRICS,
    MODEL,
    is_finished,
    read_failure,
    recorded_config,
    recorded_identity,
    student_folders,
)

# Metrics that depend on the machine, or say where in the run an epoch is.
_NOT_METRICS = {"epoch", "step", "lr", "seconds", "images_per_second"}
_CURVES = tuple(field.name for field in fields(EpochMetrics) if field.name not in _NOT_METRICS)
# What every run shows; other settings only where runs differ.
_ALWAYS = ("student", "temperature", "soft_weight", "hard_weight", "lr", "epochs")
_WHERE = ("data", "labels", "eval_data")  # of config.yaml, as given
# What a run's identity has beside its settings: what the data and the store hold.
_CONTENT = {
    DATA_KEYS,
    "samples of each source",
    "hard labels (fingerprint)",
    "store",
    "samples of the store",
    "views of the store",
    "classes",
}
# Two of them become the axes of a grid, the first ones where several have as many values. One that follows from another
# one, as the default of the hard weight does, comes after it.
_AXES = (
    "loss",
    "temperature",
    "soft_weight",
    "student",
    "optimizer",
    "lr",
    "weight_decay",
    "label_smoothing",
    "soft_warmup",
    "hard_weight",
    "embedding_loss",
    "embedding_weight",
    "difference_weight",
)
assert set(_AXES) == set(GRID)
_GRID_METRICS = ("eval_accuracy", "eval_map", "train_accuracy")
# What runs of earlier versions did where they name no setting.
_DEFAULTS = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
# The folder's name of what the temperature is where none was given.
_OF_STORE = "the store's"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A run folder.

    Attributes:
        folder: as it was given, or as it was found below what was given.
        identity: what `run.json` says.
        config: what `config.yaml` says.
        history: its finished epochs.
    """

    folder: Path
    identity: Mapping[str, Any]
    config: Mapping[str, Any]
    history: tuple[EpochMetrics, ...]

    @property
    def is_finished(self) -> bool:
        return is_finished(self.folder)

    @property
    def kept(self) -> EpochMetrics | None:
        """The epoch whose weights the student has: the last one, or that of the best evaluation."""
        measured = [epoch for epoch in self.history if epoch.score is not None]
        if self.setting("select") == "best" and measured:
            return max(measured, key=lambda epoch: epoch.score or 0.0)
        return self.history[-1] if self.history else None

    def setting(self, name: str) -> Any:
        """A setting as it was used, with defaults filled in, or None."""
        value = self.identity.get(name, self.config.get(name, _DEFAULTS.get(name)))
        return tuple(value) if isinstance(value, list) else value

    def describe(self, name: str) -> str:
        """A setting in words."""
        value = self.setting(name)
        if name == "temperature" and value is None:
            if self.setting("soft_weight") and (fixed := LOSSES[self.setting("loss")].fixed):
                return _write_value(fixed)
            return _OF_STORE if self.setting("soft_weight") else "none"
        return _write_value(value)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run folders; the folder of several students, or of several runs, stands for all of them.

    Raises:
        UsageError: a folder is not there.
        DataError: a folder holds no run, or metrics that cannot be read (TrainingError: other files of it).
    """
    found: dict[Path, None] = {}
    for given in folders:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UsageError(f"runs: {given} is not a folder; expected what --out of 'softlabel train' was")
        below = find_run_folders(folder)
        if not below:
            raise DataError(
                f"{given}: expected the folder of a run of 'softlabel train', or of several students, found no "
                f"{METRICS}, {CHECKPOINT} or {MODEL[0]} in it or below it"
            )
        found |= dict.fromkeys(below)
    return [_read_run(folder) for folder in found]


def find_run_folders(folder: Path, depth: int = 2) -> list[Path]:
    """The folder of a run itself, or those of the runs in it, to some depth."""
    if any((folder / name).exists() for name in (METRICS, CHECKPOINT, *MODEL)) or read_failure(folder) is not None:
        return [folder]
    if not depth:
        return []
    inner = student_folders(folder) or sorted(one for one in folder.iterdir() if one.is_dir())
    return [run for one in inner for run in find_run_folders(one, depth - 1)]


def _read_run(folder: Path) -> Run:
    history: list[EpochMetrics] = []
    if (folder / METRICS).exists():
        try:
            history = read_csv(folder / METRICS)
        except (OSError, ValueError, TypeError, KeyError) as error:
            found = one_line(error, with_type=True)
            raise DataError(
                f"{folder / METRICS}: expected one row an epoch as 'softlabel train' writes them, found {found}; train "
                "the run again with --overwrite"
            ) from error
    return Run(
        folder=folder, identity=recorded_identity(folder), config=recorded_config(folder), history=tuple(history)
    )


def describe_runs(runs: Sequence[Run]) -> tuple[RunFacts, ...]:
    """Settings that matter or differ between the runs, the figures of each student, and curves."""
    names = dict.fromkeys(name for run in runs for name in (*_WHERE, *run.identity) if name not in _CONTENT)
    differing = [name for name in names if len({run.describe(name) for run in runs}) > 1]
    shown = [*_ALWAYS, *(name for name in differing if name not in _ALWAYS)]
    return tuple(
        RunFacts(
            run=str(run.folder),
            settings={name: run.describe(name) for name in shown},
            final=_measured(run.kept),
            curves=_curves(run.history),
        )
        for run in runs
    )


def find_unfinished(runs: Sequence[Run]) -> list[str]:
    """A sentence about each run that has no finished student, and why."""
    notes = []
    for run in runs:
        failure = read_failure(run.folder)
        if failure is not None:
            notes.append(f"{run.folder} was given up: {failure}")
        elif not run.is_finished:
            done, wanted = len(run.history), run.setting("epochs")
            of = f"{done} of {wanted}" if isinstance(wanted, int) else f"{done}"
            notes.append(
                f"{run.folder} is not finished ({of} epochs); the same 'softlabel train' command resumes it, and only "
                "then can it be compared with the teacher"
            )
    return notes


def _measured(epoch: EpochMetrics | None) -> dict[str, float]:
    if epoch is None:
        return {}
    return {name: float(value) for name in _CURVES if (value := getattr(epoch, name)) is not None}


def _curves(history: Sequence[EpochMetrics]) -> dict[str, tuple[tuple[float, float], ...]]:
    curves = {
        name: tuple((float(one.epoch), float(value)) for one in history if (value := getattr(one, name)) is not None)
        for name in _CURVES
    }
    return {name: points for name, points in curves.items() if points}


def make_grid(runs: Sequence[Run]) -> tuple[Grid | None, list[str]]:
    """The runs as a table over the two settings in which they differ, and notes on what it leaves out.

    None where they differ in fewer than two settings, or in one that is not a setting of a student (epochs, say).
    """
    shared = {_write_value(sorted((k, str(v)) for k, v in run.identity.items() if k not in GRID)) for run in runs}
    if len(runs) < 2 or len(shared) > 1 or not all(run.identity for run in runs):
        return None, []
    # Without a soft term there is no temperature: such a student stands for all of them.
    known = [_Place(run, {name: run.setting(name) for name in _AXES}) for run in runs]
    temperatures = dict.fromkeys(one.at["temperature"] for one in known if one.at["soft_weight"])
    places = [
        _Place(one.run, one.at | {"temperature": temperature})
        for one in known
        for temperature in (temperatures if temperatures and not one.at["soft_weight"] else [one.at["temperature"]])
    ]
    axes = _find_axes([one.at for one in places])
    if len(axes) < 2:
        return None, []
    # `sorted` keeps the order of `_AXES` among equals; the chosen two stay in that order.
    chosen = sorted(axes, key=lambda name: -len({one.at[name] for one in places}))[:2]
    row, column = (name for name in axes if name in chosen)
    metric = next((name for name in _GRID_METRICS if any(name in _measured(run.kept) for run in runs)), None)
    if metric is None:
        return None, ["the grid of the students is not shown: none of them has an accuracy; train with --eval-data"]
    rows, columns = (_order_values([one.at[name] for one in places]) for name in (row, column))
    best: dict[tuple[Any, Any], float] = {}
    for one in places:
        value = _measured(one.run.kept).get(metric)
        if value is not None:
            at = one.at[row], one.at[column]
            best[at] = max(value, best.get(at, -math.inf))
    notes = []
    if rest := [name for name in axes if name not in chosen]:
        notes.append(f"the grid shows the best student of each cell over {', '.join(rest)}")
    return (
        Grid(
            metric=metric,
            row_setting=row,
            rows=tuple(_write_axis(row, value) for value in rows),
            column_setting=column,
            columns=tuple(_write_axis(column, value) for value in columns),
            values=tuple(tuple(best.get((one, other)) for other in columns) for one in rows),
        ),
        notes,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    run: Run
    at: dict[str, Any]


def _find_axes(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings with several values that do not follow from a single other one."""
    counts = {name: len({place[name] for place in places}) for name in _AXES}

    def follows(name: str, other: str) -> bool:
        return len({(place[other], place[name]) for place in places}) == counts[other]

    axes: list[str] = []
    for name in _AXES:
        if counts[name] > 1 and not any(follows(name, other) for other in axes):
            # One that was found before may follow from this one, which has more values then.
            axes = [*(other for other in axes if not follows(other, name)), name]
    return axes


def _order_values(values: Sequence[Any]) -> list[Any]:
    """Numbers rising, before them None, which is a default; texts in the order of the runs."""
    known = list(dict.fromkeys(values))
    numbers = [value for value in known if isinstance(value, int | float)]
    others = [value for value in known if not isinstance(value, int | float)]
    return [*others, *sorted(numbers)]


def _write_axis(name: str, value: Any) -> str:
    return _OF_STORE if name == "temperature" and value is None else _write_value(value)


def _write_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_write_value(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
