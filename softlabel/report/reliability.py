"""Calibration of a stream of answers: bins of confidence and what the labels say.

Legend: B batch, C classes, K bins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.evaluation.metrics import BINS, count_bins, expected_calibration_error
from softlabel.inputs.base import IGNORE
from softlabel.report.figures import Reliability


class ReliabilityMeter:
    """Sums over the rows that have a hard label, in float64."""

    def __init__(self) -> None:
        self.labelled = self.correct = 0
        self.nats = 0.0
        self._bins_3K = torch.zeros(3, BINS, dtype=torch.float64)

    def add(self, log_probs_BC: Tensor, labels_B: Tensor) -> None:
        """Take in answers; a label of -100 is none."""
        labelled_B = labels_B != IGNORE
        log_probs, labels = log_probs_BC[labelled_B], labels_B[labelled_B]
        if not len(labels):
            return
        highest, top = log_probs.max(dim=1)
        correct = top == labels
        self.labelled += len(labels)
        self.correct += int(correct.sum())
        self.nats += float(F.nll_loss(log_probs, labels, reduction="sum"))
        self._bins_3K += torch.stack(count_bins(highest.exp(), correct)).cpu()

    def add_sigmoids(self, logits_BC: Tensor, labels_BC: Tensor) -> None:
        """Take in answers of independent outputs; each known label counts by itself, 1 or 0; -1 is unknown."""
        known_BC = labels_BC >= 0
        logits, present = logits_BC[known_BC], labels_BC[known_BC] > 0
        if not len(logits):
            return
        self.labelled += len(logits)
        self.correct += int(((logits > 0) == present).sum())
        self.nats += float(F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="sum"))
        self._bins_3K += torch.stack(count_bins(logits.sigmoid(), present)).cpu()

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.labelled if self.labelled else None

    def result(self) -> Reliability | None:
        """None without a labelled row."""
        if not self.labelled:
            return None
        count_K, confidence_K, correct_K = (one.tolist() for one in self._bins_3K)
        return Reliability(
            counts=tuple(int(count) for count in count_K),
            confidence=tuple(s / n if n else None for s, n in zip(confidence_K, count_K, strict=True)),
            accuracy=tuple(s / n if n else None for s, n in zip(correct_K, count_K, strict=True)),
            calibration_error=expected_calibration_error(*self._bins_3K),
            cross_entropy=self.nats / self.labelled,
        )
