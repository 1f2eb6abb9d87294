"""Pictures of runs: the curves of several `metrics.csv` side by side, and what a search has found."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabel.errors import DataError

# What is drawn, in this order, where at least one run has it.
_PANELS = (
    ("loss", "training loss"),
    ("soft_loss", "soft loss"),
    ("hard_loss", "hard loss"),
    ("train_accuracy", "training accuracy"),
    ("eval_accuracy", "evaluation accuracy"),
    ("eval_calibration_error", "calibration error"),
)


def plot_runs(runs: Mapping[str, str | Path], out: str | Path, *, title: str = "") -> Path:
    """Draw the curves of several runs into one PNG.

    Args:
        runs: legend -> run folder (or a metrics.csv).
        out: the PNG to write.
        title: above the panels.

    Returns:
        The path of the PNG.

    Raises:
        DataError: a run without metrics.
    """
    # Slow to import, and the pyplot interface would look for a screen: the figure is drawn without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not runs:
        raise DataError("plot: expected at least one run, found none")
    curves = {name: _read(Path(folder)) for name, folder in runs.items()}
    panels = [(key, label) for key, label in _PANELS if any(key in curve for curve in curves.values())]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (key, label) in zip(axes, panels, strict=False):
        for number, (name, curve) in enumerate(curves.items()):
            if key in curve:
                epochs, values = zip(*curve[key], strict=True)
                # A run keeps its colour in every panel, also where another is missing.
                axis.plot(epochs, values, marker=".", label=name, color=f"C{number}")
        axis.set_title(label)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    if title:
        figure.suptitle(title)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialCurve:
    """A student of a search: its settings, and epoch -> score."""

    settings: Mapping[str, Any]
    scores: Mapping[int, float]


def plot_trials(trials: Sequence[TrialCurve], out: str | Path) -> Path:
    """Draw the scores of a search into one PNG: over epochs, and over every setting that has several values.

    Students that were ended on the way are grey, where they ended.

    Args:
        trials: with at least one score each.
        out: the PNG to write.

    Returns:
        The path of the PNG.

    Raises:
        DataError: no trial.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not trials:
        raise DataError("plot: expected at least one student with a score, found none")
    last = max(max(one.scores) for one in trials)
    names = list(trials[0].settings)
    names = [name for name in names if len({one.settings[name] for one in trials}) > 1]
    columns = min(3, len(names) + 1)
    figure = Figure(figsize=(4.2 * columns, 3.2 * -(-(len(names) + 1) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(-(-(len(names) + 1) // columns), columns, squeeze=False).ravel()
    for one in sorted(trials, key=lambda one: max(one.scores)):
        colour = "C0" if max(one.scores) == last else "0.6"
        axes[0].plot(list(one.scores), list(one.scores.values()), marker=".", color=colour)
    axes[0].set_xlabel("epoch")
    axes[0].set_ylabel("on the samples held out")
    for axis, name in zip(axes[1:], names, strict=False):
        for one in trials:
            if one.settings[name] is not None:
                colour = "C0" if max(one.scores) == last else "0.6"
                axis.plot([one.settings[name]], [one.scores[max(one.scores)]], marker="o", color=colour)
        values = [one.settings[name] for one in trials if one.settings[name] is not None]
        if all(isinstance(value, float) and value > 0 for value in values) and max(values) > 10 * min(values):
            axis.set_xscale("log")
        axis.set_xlabel(name.replace("_", " "))
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[len(names) + 1 :]:
        axis.set_visible(False)
    out = Path(out)
    figure.savefig(out, dpi=120)
    return out


def _read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Column -> (epoch, value), without columns that are empty."""
    path = path if path.suffix == ".csv" else path / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: expected the metrics of a run: {error}") from error
    if not rows:
        raise DataError(f"{path}: no epoch is finished yet")
    columns = {key: [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key)] for key, _ in _PANELS}
    return {key: curve for key, curve in columns.items() if curve}
