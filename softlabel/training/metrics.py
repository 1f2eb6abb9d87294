"""What a student's run says about itself: one record an epoch, kept as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softlabel.training.run_folder import write_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochMetrics:
    """One epoch. What was not measured is None. Of language models, samples are positions that count, and the label of
    one is the next token.

    Attributes:
        epoch: from 1.
        step: optimiser steps done since the start of the run.
        lr: learning rate of the last step.
        loss: the weighted sum that was minimised, mean over samples.
        soft_loss: temperature^2 * KL(teacher || student), mean over samples that have soft labels.
        hard_loss: cross-entropy with the hard labels, mean over labelled samples.
        train_accuracy: on the augmented images, while the weights changed; of language models that learn from soft
            labels alone, at the positions that have one.
        seconds: wall time, evaluation included.
        images_per_second: of training alone; of language models tokens, without padding.
        eval_accuracy, eval_cross_entropy, eval_calibration_error: on the evaluation data.
        teacher_accuracy: of the soft labels, on the rows that were trained on and have a hard label too.
        teacher_agreement: rows where the student's most probable class, on the augmented image, is the teacher's.
        target_entropy: of the soft labels at the store's temperature, mean in nats.
        eval_map: mean average precision on the evaluation data, of students with independent outputs, whose
            `train_accuracy` is the share of known labels that are hit, mean over labelled samples.
        eval_perplexity: of the next tokens of the evaluation data, of language models.
        kept_share: of the soft labels of the store, those that `fix_labels` and `confidence` let a student follow.
        differing_share: of the soft labels beside a hard one, those with another most probable class, which
            `fix_labels` swaps or masks.
        embedding_loss: that of the student's embedding, mean over samples that have the teacher's.
        difference_loss: that of the differences of logits along noise, mean over samples that have the teacher's.
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
    teacher_accuracy: float | None = None
    teacher_agreement: float | None = None
    target_entropy: float | None = None
    eval_map: float | None = None
    eval_perplexity: float | None = None
    kept_share: float | None = None
    differing_share: float | None = None
    embedding_loss: float | None = None
    difference_loss: float | None = None

    @property
    def headline(self) -> tuple[str, float] | None:
        """Name and value of what evaluations are compared by: perplexity, accuracy or mAP."""
        named = (("perplexity", self.eval_perplexity), ("accuracy", self.eval_accuracy), ("mAP", self.eval_map))
        return next(((name, value) for name, value in named if value is not None), None)

    @property
    def score(self) -> float | None:
        """The same as a number of which more is better."""
        if self.headline is None:
            return None
        name, value = self.headline
        return -value if name == "perplexity" else value

    def line(self, epochs: int, unit: str = "img") -> str:
        """One line of the log; `unit` is that of the samples' kind."""
        parts = [f"epoch {self.epoch:>{len(str(epochs))}}/{epochs}", f"loss {self.loss:.4f}"]
        parts += [f"soft {self.soft_loss:.4f}"] if self.soft_loss is not None else []
        parts += [f"hard {self.hard_loss:.4f}"] if self.hard_loss is not None else []
        parts += [f"embedding {self.embedding_loss:.4g}"] if self.embedding_loss is not None else []
        parts += [f"difference {self.difference_loss:.4g}"] if self.difference_loss is not None else []
        parts += [f"train {self.train_accuracy:.4f}"] if self.train_accuracy is not None else []
        parts += [f"agreement {self.teacher_agreement:.4f}"] if self.teacher_agreement is not None else []
        parts += [f"soft labels kept {self.kept_share:.2%}"] if self.kept_share is not None else []
        parts += [f"not the hard label {self.differing_share:.2%}"] if self.differing_share is not None else []
        parts += [f"eval {self.eval_accuracy:.4f}"] if self.eval_accuracy is not None else []
        parts += [f"perplexity {self.eval_perplexity:.4f}"] if self.eval_perplexity is not None else []
        parts += [f"mAP {self.eval_map:.4f}"] if self.eval_map is not None else []
        return "  ".join(
            [*parts, f"lr {self.lr:.4g}", f"{self.images_per_second:,.0f} {unit}/s", f"{self.seconds:.1f} s"]
        )


class Sums:
    """Running totals of an epoch, on the device, so that a step waits for nothing."""

    NAMES = ("units", "samples", "loss", "soft_samples", "soft", "labelled", "hard", "correct", "agreed")
    TEACHER = ("with_top", "with_top_labelled", "teacher_correct", "entropy")  # what `RowStep.teacher_sums` holds
    FILTER = ("stored", "kept", "comparable", "differ")  # of `LabelFilter`; checkpoints of earlier versions have none
    EMBEDDING = ("embedded", "embedding")  # rows that have the teacher's, and the sum of the loss over them; likewise
    DIFFERENCE = ("differing", "difference")  # the same of differences along noise

    def __init__(self, device: torch.device, values: Sequence[float] | None = None) -> None:
        given = list(values or [])
        given += [0.0] * (len(self._names()) - len(given))
        self.values = torch.tensor(given, dtype=torch.float64, device=device)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return (*cls.NAMES, *cls.TEACHER, *cls.FILTER, *cls.EMBEDDING, *cls.DIFFERENCE)

    def _find_places(self, group: tuple[str, ...]) -> slice:
        first = self._names().index(group[0])
        return slice(first, first + len(group))

    def add(
        self, *values: float | Tensor, teacher_sums: Tensor | None = None, filtered: Sequence[int] | None = None
    ) -> None:
        """One batch: its counts, and its sums over them, in the order of NAMES; what the teacher said; and what a
        filter of labels found, in the order of FILTER."""
        device = self.values.device
        # Filled there: a copy of a number to a device makes the host wait.
        new = torch.stack(
            [
                value.to(device, torch.float64)
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=torch.float64, device=device)
                for value in values
            ]
        )
        self.values[: len(self.NAMES)] += new
        if teacher_sums is not None:
            self.values[self._find_places(self.TEACHER)] += teacher_sums
        if filtered is not None:
            found = torch.tensor(filtered, dtype=torch.float64, device=device)
            self.values[self._find_places(self.FILTER)] += found

    @torch.no_grad()
    def add_term(self, group: tuple[str, ...], rows: int, mean: Tensor) -> None:
        """A term beside the soft and the hard one of some rows, in the order of EMBEDDING or DIFFERENCE."""
        count, total = self.values[self._find_places(group)]
        count += rows
        total += mean * rows

    def clear(self) -> None:
        """Begin an epoch, in the tensor that there is."""
        self.values.zero_()

    @property
    def units(self) -> float:
        """What the log counts by the second."""
        return float(self.values[0])

    def means(self, *, soft: bool) -> dict[str, float | None]:
        """The means of `EpochMetrics`; without a soft term none of the soft loss."""
        total = dict(zip(self._names(), self.values.tolist(), strict=True))

        def mean(name: str, count: str) -> float | None:
            return total[name] / total[count] if total[count] else None

        return {
            "loss": mean("loss", "samples"),
            "soft_loss": mean("soft", "soft_samples") if soft else None,
            "hard_loss": mean("hard", "labelled"),
            "train_accuracy": mean("correct", "labelled"),
            "teacher_accuracy": mean("teacher_correct", "with_top_labelled"),
            "teacher_agreement": mean("agreed", "with_top"),
            "target_entropy": mean("entropy", "with_top"),
            "kept_share": mean("kept", "stored") if soft else None,
            "differing_share": mean("differ", "comparable") if soft else None,
            "embedding_loss": mean("embedding", "embedded"),
            "difference_loss": mean("difference", "differing"),
        }


def write_csv(path: Path, history: Sequence[EpochMetrics]) -> None:
    """The whole history; the file is replaced, so that it never holds an epoch that a resumed run does again."""
    text = io.StringIO()
    names = [field.name for field in fields(EpochMetrics)]
    for name in ("eval_map", "eval_perplexity", "kept_share", "differing_share", "embedding_loss", "difference_loss"):
        if all(getattr(epoch, name) is None for epoch in history):
            names.remove(name)  # of other students than those that have it
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _cell(getattr(epoch, k)) for k in names} for epoch in history)
    write_atomically(path, text.getvalue().encode())


def _cell(value: Any) -> Any:
    return "" if value is None else value


def read_csv(path: Path) -> list[EpochMetrics]:
    """The history that `write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
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
