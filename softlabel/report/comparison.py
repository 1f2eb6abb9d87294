"""A student's answers beside the teacher's, batch by batch: sums and a few rows, whatever the size of the data.

Legend: B batch, K rows of it that have a row in the store, C classes, Q bins.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import MismatchError
from softlabel.inputs.base import IGNORE
from softlabel.loader import Batch
from softlabel.report.agreement import divide
from softlabel.report.figures import Example
from softlabel.report.probabilities import LabelReader
from softlabel.report.reliability import ReliabilityMeter
from softlabel.report.shortlist import Shortlist
from softlabel.report.student_figures import Comparison, Corner, CornerName
from softlabel.report.training_data import Overlap
from softlabel.store.reader import Store

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

JOINT_BINS = 20
ENTROPY_BINS = 10
CORNER_ROWS = 24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherAnswers:
    """What a store says about a batch, on the device of the students.

    Attributes:
        known: which samples have a row, bool (B,).
        log_p: log-probabilities at `LabelReader.judged`, float64 (K, C).
        log_p_store: at the temperature of the store, float64 (K, C).
        top: the most probable class, int64 (K,).
        entropy: at `LabelReader.judged`, in nats, float64 (K,).
        non_finite: rows that hold numbers which are not finite; here they are uniform.
    """

    known: Tensor
    log_p: Tensor
    log_p_store: Tensor
    top: Tensor
    entropy: Tensor
    non_finite: int


class Teacher:
    """Reads what a store says about the samples of a batch.

    Args:
        store: of a softmax over the classes, in an encoding that determines the most probable class.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._reader = store, LabelReader(store)
        self.temperature, self.judged = store.run.temperature, self._reader.judged

    def answer(self, batch: Batch, device: torch.device) -> TeacherAnswers:
        rows_B = batch.rows.numpy()
        known_B = rows_B >= 0
        stored = self._store.take(rows_B[known_B], self._reader.columns)
        log_p_KC = self._log_probs(stored.columns, self.judged).to(device)
        same = self.judged == self.temperature
        store_KC = log_p_KC if same else self._log_probs(stored.columns, self.temperature).to(device)
        broken_K = log_p_KC.isnan().any(dim=1) | store_KC.isnan().any(dim=1)
        if broken_K.any():
            log_p_KC[broken_K] = store_KC[broken_K] = -math.log(log_p_KC.shape[1])
        p_KC = log_p_KC.exp()
        return TeacherAnswers(
            known=torch.from_numpy(known_B).to(device),
            log_p=log_p_KC,
            log_p_store=store_KC,
            top=log_p_KC.argmax(dim=1),
            entropy=-torch.where(p_KC > 0, p_KC * log_p_KC, 0.0).sum(dim=1),
            non_finite=int(broken_K.sum()),
        )

    def _log_probs(self, columns: dict[str, Any], temperature: float) -> Tensor:
        log_p_KMC = F.log_softmax(self._reader.read_logits(columns, temperature).double(), dim=-1)
        if self._reader.members == 1:
            return log_p_KMC[:, 0]
        weights_M = torch.tensor(self._reader.weights, dtype=torch.float64)
        return torch.logsumexp(log_p_KMC + weights_M.log()[:, None], dim=1)


class ComparisonMeter:
    """Sums over the samples that one student answers.

    Args:
        classes: C.
        temperature: of the store, None without one.
        judged: at which p(label) of both is taken: 1, or the store's.
    """

    def __init__(self, classes: int, *, temperature: float | None, judged: float) -> None:
        self.classes, self.temperature, self.judged = classes, temperature, judged
        self.samples = self.with_teacher = self.agreed = self.non_finite = self.teacher_non_finite = 0
        self.nats = 0.0
        self.student, self.teacher = ReliabilityMeter(), ReliabilityMeter()
        self.joint = np.zeros((JOINT_BINS, JOINT_BINS), np.int64)
        self.by_entropy = _GroupSums(ENTROPY_BINS)
        # By hard label, and by the teacher's most probable class in case there are no hard labels.
        self.by_label, self.by_top = _GroupSums(classes), _GroupSums(classes)
        self.corners = {name: Shortlist(CORNER_ROWS) for name in get_args(CornerName)}
        self.counts = dict.fromkeys(get_args(CornerName), 0)

    def add(self, logits_BC: Tensor, batch: Batch, teacher: TeacherAnswers | None) -> None:
        """Take in a batch; batches come in the order of the data.

        Raises:
            MismatchError: a label, or the store, is of other classes than the student.
        """
        if logits_BC.shape[1] != self.classes:
            raise MismatchError(f"expected logits of {self.classes} classes, found {logits_BC.shape[1]}")
        if len(batch) and (highest := int(batch.labels.max())) >= self.classes:
            raise MismatchError(f"has {self.classes} classes, the data has label {highest}")
        logits_BC = logits_BC.double()
        labels_B = batch.labels
        number_B = np.arange(self.samples, self.samples + len(batch))
        self.samples += len(batch)
        log_q_BC = F.log_softmax(logits_BC, dim=1)
        broken_B = log_q_BC.isnan().any(dim=1)
        if count := int(broken_B.sum()):
            self.non_finite += count
            logits_BC[broken_B] = 0.0  # what follows is not shown then
            log_q_BC = F.log_softmax(logits_BC, dim=1)
        self.student.add(log_q_BC, labels_B)
        if teacher is None:
            return
        assert self.temperature is not None
        known_B = teacher.known
        self.teacher_non_finite += teacher.non_finite
        student_KC, labels_K = logits_BC[known_B], labels_B[known_B]
        top_K, teacher_top_K = student_KC.argmax(dim=1), teacher.top
        agreed_K = _to_numpy(top_K == teacher_top_K).astype(np.float64)
        p_KC = teacher.log_p_store.exp()
        log_q_KC = F.log_softmax(student_KC / self.temperature, dim=1)
        nats_K = _to_numpy(torch.where(p_KC > 0, p_KC * (teacher.log_p_store - log_q_KC), 0.0).sum(dim=1))
        self.with_teacher += len(agreed_K)
        self.agreed += int(agreed_K.sum())
        self.nats += float(nats_K.sum())
        self.teacher.add(teacher.log_p, labels_K)
        entropy_K = _to_numpy(teacher.entropy) / max(math.log(self.classes), 1e-12)
        self.by_entropy.add(_bin(entropy_K, ENTROPY_BINS), agreed_K, nats_K)
        self.by_top.add(_to_numpy(teacher_top_K), agreed_K, nats_K)
        labelled_K = _to_numpy(labels_K != IGNORE)
        self.by_label.add(_to_numpy(labels_K)[labelled_K], agreed_K[labelled_K], nats_K[labelled_K])
        chosen = torch.from_numpy(np.flatnonzero(labelled_K)).to(logits_BC.device)
        self._add_corners(
            number_B[_to_numpy(known_B)][labelled_K],
            labels_K[chosen],
            teacher.log_p[chosen].exp(),
            F.softmax(student_KC[chosen] / self.judged, dim=1),
        )

    def _add_corners(self, number_K: I64, labels_K: Tensor, p_KC: Tensor, q_KC: Tensor) -> None:
        """Of samples that have a label and a row: `p_KC` of the teacher, `q_KC` of the student."""
        p_label_K, q_label_K = (_to_numpy(one.gather(1, labels_K[:, None])[:, 0]) for one in (p_KC, q_KC))
        np.add.at(self.joint, (_bin(p_label_K, JOINT_BINS), _bin(q_label_K, JOINT_BINS)), 1)
        p_top, top = (_to_numpy(one) for one in p_KC.max(dim=1))
        student_top, labels = _to_numpy(q_KC.argmax(dim=1)), _to_numpy(labels_K)
        teacher_right, student_right = top == labels, student_top == labels
        inside = {
            "both right": teacher_right & student_right,
            "teacher alone right": teacher_right & ~student_right,
            "student alone right": ~teacher_right & student_right,
            "both wrong": ~teacher_right & ~student_right,
        }
        score = -np.abs(p_label_K - q_label_K)
        values = {
            "label": labels,
            "suggestion": top,
            "p_label": p_label_K,
            "p_suggestion": p_top,
            "student": student_top,
            "p_student": q_label_K,
        }
        for name, here in inside.items():
            self.counts[name] += int(here.sum())
            if here.any():
                self.corners[name].add(score[here], number_K[here], **{key: one[here] for key, one in values.items()})

    def result(
        self, *, run: str, data: str, overlap: Overlap, of_eval_data: bool, keys: Callable[[I64], Sequence[str]]
    ) -> Comparison:
        """The comparison.

        Args:
            overlap: with the training data of the student.
            keys: of samples by their place in the data, in the order in which they were added.
        """
        known = self.with_teacher
        groups = self.by_label if self.by_label.count.any() else self.by_top
        student, teacher = self.student.result(), self.teacher.result()
        found = Comparison(
            run=run,
            data=data,
            held_out=None if overlap.trained is None else not overlap.trained,
            trained_on=overlap.trained,
            by_keys=overlap.by_keys,
            of_eval_data=of_eval_data,
            samples=self.samples,
            non_finite=self.non_finite,
            with_teacher=known,
            accuracy=self.student.accuracy,
            teacher_accuracy=self.teacher.accuracy,
            agreement=self.agreed / known if known else None,
            divergence=self.nats / known if known else None,
            joint=tuple(tuple(row) for row in self.joint.tolist()) if teacher is not None else None,
            class_agreement=groups.agreement,
            class_divergence=groups.divergence,
            divergence_by_entropy=self.by_entropy.divergence,
            student=student,
            # Confidence at a high temperature is low on purpose.
            teacher=teacher if self.judged == 1 else None,
            corners=self._list_corners(keys) if teacher is not None else (),
        )
        return self._blank(found) if self.non_finite or self.teacher_non_finite else found

    def _blank(self, found: Comparison) -> Comparison:
        """Without what follows from numbers that are not finite."""
        none_C = (None,) * self.classes
        found = replace(
            found,
            agreement=None if found.agreement is None else math.nan,
            divergence=None if found.divergence is None else math.nan,
            joint=None,
            class_agreement=none_C,
            class_divergence=none_C,
            divergence_by_entropy=(None,) * ENTROPY_BINS,
            corners=(),
        )
        if self.non_finite:
            found = replace(found, accuracy=None if found.accuracy is None else math.nan, student=None)
        if self.teacher_non_finite:
            found = replace(found, teacher_accuracy=None if found.teacher_accuracy is None else math.nan, teacher=None)
        return found

    def _list_corners(self, keys: Callable[[I64], Sequence[str]]) -> tuple[Corner, ...]:
        return tuple(
            Corner(name=name, count=self.counts[name], examples=_list_examples(self.corners[name], keys))
            for name in get_args(CornerName)
        )


class _GroupSums:
    """Agreement and divergence of rows by group."""

    def __init__(self, groups: int) -> None:
        self.count, self.agreed, self.nats = (np.zeros(groups) for _ in range(3))

    def add(self, group_K: I64, agreed_K: F64, nats_K: F64) -> None:
        size = len(self.count)
        self.count += np.bincount(group_K, minlength=size)
        self.agreed += np.bincount(group_K, agreed_K, minlength=size)
        self.nats += np.bincount(group_K, nats_K, minlength=size)

    @property
    def agreement(self) -> tuple[float | None, ...]:
        return divide(self.agreed, self.count)

    @property
    def divergence(self) -> tuple[float | None, ...]:
        return divide(self.nats, self.count)


def _list_examples(found: Shortlist, keys: Callable[[I64], Sequence[str]]) -> tuple[Example, ...]:
    rows = found.rows
    if not rows:
        return ()
    return tuple(
        Example(
            key=key,
            view=0,
            label=int(rows["label"][place]),
            suggestion=int(rows["suggestion"][place]),
            p_label=float(rows["p_label"][place]),
            p_suggestion=float(rows["p_suggestion"][place]),
            score=float(rows["score"][place]),
            student=int(rows["student"][place]),
            p_student=float(rows["p_student"][place]),
        )
        for place, key in enumerate(keys(rows["number"]))
    )


def _bin(share_K: F64, bins: int) -> I64:
    """Bins of equal width over 0 to 1, the last one with both edges."""
    return np.clip((share_K * bins).astype(np.int64), 0, bins - 1)


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
