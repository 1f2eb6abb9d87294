"""Pictures of runs: the curves of several `metrics.csv` side by side."""

import csv
from collections.abc import Mapping
from pathlib import Path

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
