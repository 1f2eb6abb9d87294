"""What is measured of a model: accuracy, cross-entropy, calibration error, agreement with the teacher.

Legend: B batch, C classes, N samples, K bins.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import MismatchError
from softlabel.inputs.base import IGNORE
from softlabel.loader import Batch
from softlabel.loss.signals import teacher_log_probs, top_class
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, Target

BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was measured; None where there was nothing to measure it on.

    Attributes:
        samples: how many were measured.
        labelled: samples with a hard label, to which accuracy, cross_entropy and calibration_error refer.
        accuracy: share of samples whose most probable class is the label.
        cross_entropy: mean of -log p(label), in nats.
        calibration_error: expected calibration error, 15 bins of equal width (Guo et al. 2017).
        with_teacher: samples with a row in the store, to which the following refer.
        agreement: share of samples whose most probable class is the teacher's.
        teacher_kl: mean KL(teacher || model) in nats, both at the store's temperature.
        teacher_accuracy: of the teacher's labels, on the samples that have both.
        temperature: of the store.
        note: which figures about the teacher its labels cannot give, and why.
    """

    # What hard labels tell: of a store of views it is measured on the samples as they are.
    HARD: ClassVar[tuple[str, ...]] = ("samples", "labelled", "accuracy", "cross_entropy", "calibration_error")

    samples: int
    labelled: int
    accuracy: float | None
    cross_entropy: float | None
    calibration_error: float | None
    with_teacher: int = 0
    agreement: float | None = None
    teacher_kl: float | None = None
    teacher_accuracy: float | None = None
    temperature: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def figures(self) -> tuple[tuple[str, float | None], ...]:
        """What is printed, in this order, where it was measured."""
        return (
            ("accuracy", self.accuracy),
            ("cross-entropy", self.cross_entropy),
            (f"calibration error ({BINS} bins)", self.calibration_error),
            ("agreement with the teacher", self.agreement),
            (f"KL(teacher || model) at T = {self.temperature or 1:g}", self.teacher_kl),
            ("accuracy of the teacher", self.teacher_accuracy),
        )

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """What is printed before the figures."""
        labelled = (("labelled", self.labelled),) if self.labelled != self.samples else ()
        return (("samples", self.samples), *labelled)

    def __str__(self) -> str:
        lines = [(name, f"{value:,}") for name, value in self.counts]
        lines += [(name, f"{value:.4f}") for name, value in self.figures if value is not None]
        lines += [("teacher", self.note)] if self.note is not None else []
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def calibration_error(confidence_N: Tensor, correct_N: Tensor) -> float:
    """Expected calibration error: mean over samples of |accuracy - confidence| of the bin that a sample falls into.

    Args:
        confidence_N: probability of the predicted class, float (N,), above 0.
        correct_N: bool (N,).
    """
    return expected_calibration_error(*count_bins(confidence_N.double(), correct_N))


class Totals:
    """Sums over batches, float64."""

    NAMES: ClassVar[tuple[str, ...]] = (
        *("samples", "labelled", "correct", "nats"),
        *("known", "agreed", "known_labelled", "known_correct", "comparable", "teacher_nats"),
    )

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.NAMES, 0.0)
        self.bins_3K = torch.zeros(3, BINS, dtype=torch.float64)
        self.temperature: float | None = None
        self.unknown = 0.0  # samples whose soft labels do not determine a most probable class

    def add(self, logits_BC: Tensor, batch: Batch) -> None:
        """Take in a batch; rows of weight 0 do not count."""
        counts_B = torch.ones_like(batch.labels, dtype=torch.bool) if batch.weight is None else batch.weight > 0
        known_B = counts_B if batch.has_target is None else counts_B & batch.has_target
        self._add_rows(logits_BC, batch.labels, counts_B, batch.target, known_B)

    def _add_rows(
        self, logits_BC: Tensor, all_labels_B: Tensor, counts_B: Tensor, target: Target | None, known_B: Tensor
    ) -> Tensor | None:
        """Take in the rows that count; those that are known have a target, and their KL(teacher || model) is returned
        where it is known."""
        labelled_B = (all_labels_B != IGNORE) & counts_B
        labels_B = all_labels_B[labelled_B]
        if len(labels_B) and int(labels_B.max()) >= logits_BC.shape[1]:
            raise MismatchError(f"model: has {logits_BC.shape[1]} classes, the data has label {int(labels_B.max())}")
        log_probs_BC = F.log_softmax(logits_BC, dim=1)
        best_B = log_probs_BC.argmax(dim=1)
        correct_B = best_B[labelled_B] == labels_B
        confidence_B = log_probs_BC.amax(dim=1).exp()[labelled_B]
        self.bins_3K += torch.stack(count_bins(confidence_B, correct_B)).cpu()
        self._sum(
            samples=counts_B.sum(),
            labelled=len(labels_B),
            correct=correct_B.sum(),
            nats=F.nll_loss(log_probs_BC[labelled_B], labels_B, reduction="sum"),
        )
        if target is None:
            return None
        return self._add_teacher(logits_BC[known_B], best_B[known_B], target.take(known_B), all_labels_B[known_B])

    def _add_teacher(self, logits_BC: Tensor, best_B: Tensor, target: Target, labels_B: Tensor) -> Tensor | None:
        if target.num_classes != logits_BC.shape[1]:
            raise MismatchError(f"model: has {logits_BC.shape[1]} classes, the store has {target.num_classes}")
        self.temperature = target.temperature
        teacher_B = top_class(target)
        if teacher_B is None:
            self.unknown += len(best_B)
            return None
        labelled_B = labels_B != IGNORE
        self._sum(
            known=len(best_B),
            agreed=(best_B == teacher_B).sum(),
            known_labelled=labelled_B.sum(),
            known_correct=(teacher_B == labels_B)[labelled_B].sum(),
        )
        nats_B = self._measure_divergence(logits_BC, target)
        if nats_B is not None:
            self._sum(comparable=len(best_B), teacher_nats=nats_B.sum())
        return nats_B

    def _measure_divergence(self, logits_BC: Tensor, target: Target) -> Tensor | None:
        """KL(teacher || model) of each row at the target's temperature; None where the target does not say it."""
        if not isinstance(target, DenseTarget | Int8Target | HeadTarget):
            return None
        log_p_BC = teacher_log_probs(target, torch.float64)
        log_q_BC = F.log_softmax(logits_BC / target.temperature, dim=1)
        p_BC = log_p_BC.exp()
        return torch.where(p_BC > 0, p_BC * (log_p_BC - log_q_BC), 0.0).sum(dim=1)

    def _sum(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += float(value)

    def result(self, reduce: Callable[[Tensor], Tensor] | None) -> Evaluation:
        """The figures; `reduce` adds up a tensor over processes, each of which has other samples."""
        return Evaluation(**self._summarize(reduce)[0])

    def _summarize(self, reduce: Callable[[Tensor], Tensor] | None) -> tuple[dict[str, Any], dict[str, float]]:
        """The fields of an `Evaluation`, and the sums that they follow from."""
        sums, bins_3K, unknown = self.sums, self.bins_3K, self.unknown
        if reduce is not None:
            flat = torch.tensor([*sums.values(), unknown], dtype=torch.float64)
            flat = reduce(torch.cat([flat, bins_3K.ravel()]))
            *totals, unknown = flat[: len(sums) + 1].tolist()
            sums, bins_3K = dict(zip(sums, totals, strict=True)), flat[len(sums) + 1 :].reshape(3, BINS)

        def mean(name: str, count: str) -> float | None:
            return sums[name] / sums[count] if sums[count] else None

        note = None
        if unknown:
            note = "the store holds classes drawn from the teacher, which do not determine its most probable one"
        elif sums["known"] and not sums["comparable"]:
            note = "the store holds the teacher's largest classes alone: no KL divergence over all of them"
        figures = {
            "samples": int(sums["samples"]),
            "labelled": int(sums["labelled"]),
            "accuracy": mean("correct", "labelled"),
            "cross_entropy": mean("nats", "labelled"),
            "calibration_error": expected_calibration_error(*bins_3K) if sums["labelled"] else None,
            "with_teacher": int(sums["known"]),
            "agreement": mean("agreed", "known"),
            "teacher_kl": mean("teacher_nats", "comparable"),
            "teacher_accuracy": mean("known_correct", "known_labelled"),
            "temperature": self.temperature,
            "note": note,
        }
        return figures, sums


def count_bins(confidence_N: Tensor, correct_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, summed confidence and correct answers of each bin (lower, upper], float64 (BINS,)."""
    bin_N = (confidence_N * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    zeros_K = torch.zeros(BINS, dtype=torch.float64, device=confidence_N.device)
    return (
        zeros_K.index_add(0, bin_N, torch.ones_like(confidence_N)),
        zeros_K.index_add(0, bin_N, confidence_N),
        zeros_K.index_add(0, bin_N, correct_N.double()),
    )


def expected_calibration_error(samples_K: Tensor, confidence_K: Tensor, correct_K: Tensor) -> float:
    # Counts cancel: count / N * |correct / count - confidence / count|.
    return float((correct_K - confidence_K).abs().sum() / samples_K.sum())
