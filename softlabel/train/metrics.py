"""What a run says about itself: one record an epoch, as CSV and for TensorBoard."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from softlabel.train.files import write_atomically

if TYPE_CHECKING:
    from torch.utils import tensorboard


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch. What was not measured is None.

    Attributes:
        epoch: from 1.
        step: optimiser steps done since the start of the run.
        lr: learning rate of the last step.
        loss: the weighted sum that was minimised, mean over samples.
        soft_loss: temperature^2 * KL(teacher || student), mean over samples that have soft labels.
        hard_loss: cross-entropy with the hard labels, mean over labelled samples.
        train_accuracy: on the augmented images, while the weights changed.
        seconds: wall time, evaluation included.
        images_per_second: of training alone.
        eval_accuracy, eval_cross_entropy, eval_calibration_error: on the evaluation data.
    """

    epoch: int
    step: int
    lr: float
    loss: float
    soft_loss: float | None
    hard_loss: float | None
    train_accuracy: float | None
    seconds: float
    images_per_second: float
    eval_accuracy: float | None = None
    eval_cross_entropy: float | None = None
    eval_calibration_error: float | None = None

    def line(self, epochs: int) -> str:
        """For people."""
        parts = [f"epoch {self.epoch:>{len(str(epochs))}}/{epochs}", f"loss {self.loss:.4f}"]
        parts += [f"soft {self.soft_loss:.4f}"] if self.soft_loss is not None else []
        parts += [f"hard {self.hard_loss:.4f}"] if self.hard_loss is not None else []
        parts += [f"train {self.train_accuracy:.4f}"] if self.train_accuracy is not None else []
        parts += [f"eval {self.eval_accuracy:.4f}"] if self.eval_accuracy is not None else []
        return "  ".join([*parts, f"lr {self.lr:.4g}", f"{self.images_per_second:,.0f} img/s", f"{self.seconds:.1f} s"])


class Sums:
    """Running totals of an epoch, on the device, so that a step waits for nothing."""

    NAMES = ("samples", "loss", "soft_samples", "soft", "labelled", "hard", "correct")

    def __init__(self, device: torch.device, values: Sequence[float] | None = None) -> None:
        self.values = torch.tensor(values or [0.0] * len(self.NAMES), dtype=torch.float64, device=device)

    def add(self, *values: float | Tensor) -> None:
        """One batch: its counts, and its sums over them, in the order of NAMES."""
        self.values += torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.values.device) for v in values])

    @property
    def finite(self) -> bool:
        """Whether every loss so far was a number."""
        return bool(self.values.isfinite().all())

    def means(self) -> dict[str, float | None]:
        """loss, soft_loss, hard_loss and train_accuracy."""
        total = dict(zip(self.NAMES, self.values.tolist(), strict=True))

        def mean(name: str, count: str) -> float | None:
            return total[name] / total[count] if total[count] else None

        return {
            "loss": mean("loss", "samples"),
            "soft_loss": mean("soft", "soft_samples"),
            "hard_loss": mean("hard", "labelled"),
            "train_accuracy": mean("correct", "labelled"),
        }


def write_csv(path: Path, history: Sequence[EpochMetrics]) -> None:
    """The whole history; the file is replaced, so that it never holds an epoch that a resumed run does again."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in asdict(epoch).items()} for epoch in history)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[EpochMetrics]:
    """The history that `write_csv` wrote."""
    with path.open(newline="") as file:
        return [
            EpochMetrics(
                **{name: _number(name, value) for name, value in row.items() if name in EpochMetrics.__slots__}
            )
            for row in csv.DictReader(file)
        ]


def _number(name: str, value: str) -> Any:
    if value == "":
        return None
    return int(value) if name in ("epoch", "step") else float(value)


class Board:
    """TensorBoard events of a run; does nothing when they are not wanted."""

    def __init__(self, folder: Path | None, *, resume_step: int) -> None:
        self._writer: tensorboard.SummaryWriter | None = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports

            # What a killed run wrote after its last checkpoint is hidden.
            self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def write(self, metrics: EpochMetrics) -> None:
        if self._writer is None:
            return
        for name, value in asdict(metrics).items():
            if name not in ("epoch", "step") and value is not None and math.isfinite(value):
                self._writer.add_scalar(name.replace("eval_", "eval/"), value, metrics.step)
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
