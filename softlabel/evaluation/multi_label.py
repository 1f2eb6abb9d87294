"""What is measured of a model with independent outputs: mAP, AUROC, F1, calibration, distance from the teacher.

The measures of ranking and of decisions are scikit-learn's. They need the answers to all samples at once, which are
held in memory: 9 bytes a sample and class.

Legend: B batch, C classes, N samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.multi_hot import UNKNOWN, to_multi_hot
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.metrics import BINS, Evaluation, calibration_error
from softlabel.loader import Batch
from softlabel.loss.sigmoid import binary_divergence
from softlabel.loss.targets import SigmoidTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiLabelEvaluation(Evaluation):
    """What was measured of independent outputs. Every known label of a class counts by itself, unknown ones do not.

    `accuracy` and `teacher_accuracy` are None: with several classes at once no one of them is the right answer.
    `cross_entropy` is binary, `calibration_error` that of each class's probability, both over all known labels;
    `teacher_kl` is the mean over the classes, `agreement` the share of classes that both call more, or less, probable
    than not.

    Attributes:
        classes: how many there are.
        mean_average_precision: of the `map_classes` classes that have a positive label (scikit-learn's
            `average_precision_score`).
        auroc: mean over the `auroc_classes` classes that have a positive and a negative label (`roc_auc_score`).
        f1_micro: at probability 0.5, over all known labels (`f1_score`).
        f1_macro: mean over the classes that have a known label; one without positive labels and answers counts 0.
    """

    HARD: ClassVar[tuple[str, ...]] = (
        *("samples", "labelled", "cross_entropy", "calibration_error", "mean_average_precision", "map_classes"),
        *("auroc", "auroc_classes", "f1_micro", "f1_macro"),
    )

    classes: int = 0
    mean_average_precision: float | None = None
    map_classes: int = 0
    auroc: float | None = None
    auroc_classes: int = 0
    f1_micro: float | None = None
    f1_macro: float | None = None

    @property
    def figures(self) -> tuple[tuple[str, float | None], ...]:
        return (
            (f"mAP ({self.map_classes} of {self.classes} classes)", self.mean_average_precision),
            (f"AUROC ({self.auroc_classes} of {self.classes} classes)", self.auroc),
            ("F1 (micro, at 0.5)", self.f1_micro),
            ("F1 (macro, at 0.5)", self.f1_macro),
            ("binary cross-entropy", self.cross_entropy),
            (f"calibration error ({BINS} bins)", self.calibration_error),
            ("agreement with the teacher", self.agreement),
            (f"KL(teacher || model) at T = {self.temperature or 1:g}", self.teacher_kl),
        )


class MultiLabelTotals:
    """The answers and labels of all samples so far.

    Args:
        samples: how many the data has; a batch says which of them it holds.

    Raises:
        UsageError: scikit-learn is not installed.
    """

    def __init__(self, samples: int) -> None:
        _import_metrics()  # before anything is measured
        self._samples = samples
        self._logits_NC: NDArray[np.float32] | None = None
        self._labels_NC: NDArray[np.int8] = np.zeros((0, 0), np.int8)
        self._seen_N = np.zeros(samples, np.bool_)
        self._sums = torch.zeros(3, dtype=torch.float64)  # rows with a target, agreeing classes a row, nats
        self._temperature: float | None = None

    def add(self, logits_BC: Tensor, batch: Batch) -> None:
        """Take in a batch; rows of weight 0 do not count."""
        classes = logits_BC.shape[1]
        labels_BC = to_multi_hot(batch.labels.cpu().numpy(), classes)
        if labels_BC.shape[1] != classes or int(labels_BC.max(initial=0)) > 1:
            raise MismatchError(
                f"model: has {classes} outputs, the data has labels of "
                f"{labels_BC.shape[1] if classes > 1 else int(labels_BC.max()) + 1} classes"
            )
        if self._logits_NC is None:
            self._logits_NC = np.zeros((self._samples, classes), np.float32)
            self._labels_NC = np.full((self._samples, classes), UNKNOWN, np.int8)
        counts_B = np.ones(len(batch), np.bool_) if batch.weight is None else batch.weight.cpu().numpy() > 0
        samples = batch.samples.numpy()[counts_B]
        self._logits_NC[samples] = logits_BC.float().cpu().numpy()[counts_B]
        self._labels_NC[samples] = labels_BC[counts_B]
        self._seen_N[samples] = True
        if batch.target is not None:
            known_B = torch.from_numpy(counts_B).to(logits_BC.device)
            known_B = known_B if batch.has_target is None else known_B & batch.has_target
            self._add_teacher(logits_BC[known_B], batch.target.take(known_B))

    def _add_teacher(self, logits_BC: Tensor, target: object) -> None:
        if not isinstance(target, SigmoidTarget):
            raise MismatchError("model: has independent outputs, the store holds a softmax over the classes")
        if target.num_classes != logits_BC.shape[1]:
            raise MismatchError(f"model: has {logits_BC.shape[1]} outputs, the store has {target.num_classes}")
        self._temperature = target.temperature
        teacher_BC = target.scaled_logits.double()
        agreed = ((teacher_BC > 0) == (logits_BC > 0)).double().mean(dim=1).sum()
        nats = binary_divergence(teacher_BC, logits_BC.double() / target.temperature).sum()
        self._sums += torch.stack([torch.tensor(float(len(teacher_BC))), agreed.cpu(), nats.cpu()])

    def result(self, reduce: Callable[[Tensor], Tensor] | None) -> MultiLabelEvaluation:
        """The figures; `reduce` adds up a tensor over processes, each of which has other samples."""
        assert self._logits_NC is not None, "no batch"
        logits_NC, labels_NC, seen_N, sums = self._logits_NC, self._labels_NC, self._seen_N, self._sums
        if reduce is not None:
            shape = logits_NC.shape
            parts: list[NDArray[Any]] = [logits_NC.ravel(), (labels_NC - UNKNOWN).ravel(), seen_N, sums.numpy()]
            flat = reduce(torch.from_numpy(np.concatenate([part.astype(np.float64) for part in parts]))).numpy()
            size = logits_NC.size
            logits_NC = flat[:size].reshape(shape).astype(np.float32)
            labels_NC = (flat[size : 2 * size].reshape(shape) + UNKNOWN).astype(np.int8)
            seen_N, sums = flat[2 * size : -3] > 0, torch.from_numpy(flat[-3:])
        rows, agreed, nats = sums.tolist()
        return MultiLabelEvaluation(
            samples=int(seen_N.sum()),
            labelled=int((labels_NC >= 0).any(axis=1).sum()),
            accuracy=None,
            with_teacher=int(rows),
            agreement=agreed / rows if rows else None,
            teacher_kl=nats / rows if rows else None,
            temperature=self._temperature,
            classes=labels_NC.shape[1],
            **_measure_labels(logits_NC, labels_NC),  # type: ignore[arg-type]
        )


def _measure_labels(logits_NC: NDArray[np.float32], labels_NC: NDArray[np.int8]) -> dict[str, float | int | None]:
    """What the labels tell; None where there is nothing to measure it on."""
    metrics = _import_metrics()
    known_NC = labels_NC >= 0
    if not known_NC.any():
        return {"cross_entropy": None, "calibration_error": None}
    if np.isnan(logits_NC[known_NC]).any():  # of a run that diverged: scikit-learn refuses it
        named = ("cross_entropy", "calibration_error", "mean_average_precision", "auroc", "f1_micro", "f1_macro")
        return dict.fromkeys(named, math.nan)
    precisions, areas, scores = [], [], []
    for known_N, logits_N, labels_N in zip(known_NC.T, logits_NC.T, labels_NC.T, strict=True):
        y, z = labels_N[known_N], logits_N[known_N]
        if not len(y):
            continue
        if y.any():
            precisions.append(float(metrics.average_precision_score(y, z)))
            if not y.all():
                areas.append(float(metrics.roc_auc_score(y, z)))
        scores.append(float(metrics.f1_score(y, z > 0, zero_division=0)))
    y, z = torch.from_numpy(labels_NC[known_NC]).double(), torch.from_numpy(logits_NC[known_NC]).double()
    return {
        "cross_entropy": float(F.binary_cross_entropy_with_logits(z, y)),
        "calibration_error": calibration_error(z.sigmoid(), y > 0),
        "mean_average_precision": float(np.mean(precisions)) if precisions else None,
        "map_classes": len(precisions),
        "auroc": float(np.mean(areas)) if areas else None,
        "auroc_classes": len(areas),
        "f1_micro": float(metrics.f1_score(y.numpy(), z.numpy() > 0, zero_division=0)),
        "f1_macro": float(np.mean(scores)),
    }


def _import_metrics() -> ModuleType:
    try:
        import sklearn.metrics
    except ImportError as error:
        raise UsageError(
            "evaluation of several labels at once needs scikit-learn; pip install 'softlabel[multilabel]'"
        ) from error
    metrics: ModuleType = sklearn.metrics
    return metrics
