"""What all students of a pass share of one step: its inputs, normalised; how many rows count; what the teacher says.

Rows are samples, or positions of documents.

Legend: B batch, C classes, D width of the teacher's embedding, K negatives.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from softlabel.common.multi_hot import UNKNOWN
from softlabel.inputs.base import IGNORE, Inputs, InputTransform
from softlabel.loader import Batch
from softlabel.loader.batch import RARE
from softlabel.loss.signals import top_class_and_entropy
from softlabel.loss.targets import Target
from softlabel.training.label_filter import Filtered


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows of a batch: all that count, those with soft labels, those with a hard label, those with both; the units that
    the log counts by the second, which are samples, or tokens; what a `LabelFilter` found, 0 without one; and rows with
    the teacher's embedding."""

    rows: int
    soft: int
    hard: int
    both: int
    units: int
    stored: int = 0
    comparable: int = 0
    differ: int = 0
    embedded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One step, ready for any student.

    Attributes:
        epoch, step: which one, from 0.
        parts: what of the batch goes forward and backward one after the other, with what counts in each.
        whole: rows of the batch over all processes, by which means are taken.
    """

    epoch: int
    step: int
    parts: tuple[tuple[Any, Counts], ...]
    whole: Counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Negatives:
    """Samples that the embeddings of a step are contrasted with, the same for all of its rows.

    Attributes:
        samples: int64 (K,), of the source.
        labels: int64 (K,), -100 where there is none.
        embedding: float32 (K, D), the teacher's.
        total: samples that they are drawn from.
    """

    samples: Tensor
    labels: Tensor
    embedding: Tensor
    total: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowStep(Step):
    """One step of samples that have one label each; its parts are slices of the batch.

    Attributes:
        batch: on the device; rows of weight 0 have neither a hard label nor soft labels.
        inputs: what a network takes, for each way to normalise (`InputTransform.norm`).
        top: int64 (B,), the teacher's most probable class, -1 where there is none; None: unknown for all.
        negatives: what embeddings are contrasted with, for a loss that does.
        copies: like `inputs`, of the noisy copies of the samples, those of one sample after another; empty without any.
        teacher_sums: sums over the rows with soft labels, float64 (4,): rows with `top`, such rows with a hard
            label, those where the two agree, and the entropy of the target in nats.
    """

    batch: Batch
    inputs: dict[Hashable, Inputs]
    top: Tensor | None
    teacher_sums: Tensor | None
    negatives: Negatives | None = None
    copies: dict[Hashable, Inputs] = field(default_factory=dict)

    @property
    def count_copies(self) -> int:
        """How many noisy copies a sample has."""
        return 0 if self.batch.copies is None else self.batch.copies.shape[1]


def without_filler(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with rows of weight 0 masked everywhere, and which rows are not of weight 0, bool (B,)."""
    if batch.weight is None:
        return batch, torch.ones(len(batch), dtype=torch.bool)
    counts_B = batch.weight > 0
    has_target = batch.has_target
    if batch.target is not None:
        has_target = counts_B if has_target is None else counts_B & has_target
    if batch.labels.dim() == 1:
        labels = torch.where(counts_B, batch.labels, IGNORE)
    else:
        labels = torch.where(counts_B[:, None], batch.labels, UNKNOWN)
    rows = torch.where(counts_B, batch.rows, -1)
    return replace(batch, labels=labels, has_target=has_target, weight=None, rows=rows), counts_B


def has_features(batch: Batch) -> bool:
    """Whether something of the teacher comes with the rows beside labels."""
    return any(one is not None for one in (batch.embedding, batch.attention, batch.difference))


def labelled_rows(labels: Tensor) -> Tensor:
    """Which rows have a hard label, bool (B,)."""
    return labels != IGNORE if labels.dim() == 1 else (labels >= 0).any(dim=1)


def cut(
    batch: Batch, counts_B: Tensor, parts: int, filtered: Filtered | None = None
) -> tuple[tuple[slice, Counts], ...]:
    """A batch, without filler and on the CPU, in slices that are not empty, with what counts in each."""
    rows, found = len(batch), []
    for number in range(parts):
        part = slice(rows * number // parts, rows * (number + 1) // parts)
        if part.start == part.stop:
            continue
        counted = int(counts_B[part].sum())
        labelled_B = labelled_rows(batch.labels[part])
        hard = int(labelled_B.sum())
        if batch.target is None:
            soft = both = 0
        elif batch.has_target is None:
            soft, both = counted, hard
        else:
            soft, both = int(batch.has_target[part].sum()), int((labelled_B & batch.has_target[part]).sum())
        embedded = int((batch.rows[part] >= 0).sum()) if has_features(batch) else 0
        counts = Counts(rows=counted, soft=soft, hard=hard, both=both, units=counted, embedded=embedded)
        found.append((part, counts if filtered is None else replace(counts, **filtered.count(part))))
    return tuple(found)


def take(batch: Batch, part: slice) -> Batch:
    """Some rows of a batch without filler."""
    return Batch(
        inputs=Inputs.of(batch.inputs)[part].plain,
        labels=batch.labels[part],
        keys=batch.keys[part],
        samples=batch.samples[part],
        rows=batch.rows[part],
        target=None if batch.target is None else batch.target.take(part),
        has_target=None if batch.has_target is None else batch.has_target[part],
        **{name: one[part] for name in RARE if (one := getattr(batch, name)) is not None},
    )


@torch.no_grad()
def prepare(
    batch: Batch,
    parts: tuple[tuple[slice, Counts], ...],
    whole: Counts,
    transforms: Sequence[InputTransform],
    *,
    epoch: int,
    step: int,
    with_teacher: bool,
    negatives: Negatives | None = None,
) -> RowStep:
    """Do once what all students need.

    Args:
        batch: on the device, without filler.
        parts, whole: see `RowStep`.
        transforms: those of the students.
        with_teacher: whether to look at the teacher's classes too.
        negatives: see `RowStep`.
    """
    inputs: dict[Hashable, Inputs] = {}
    for transform in transforms:
        if transform.norm not in inputs:
            inputs[transform.norm] = transform.finish(Inputs.of(batch.inputs))
    copies: dict[Hashable, Inputs] = {}
    if batch.copies is not None:
        each = Inputs.single(batch.copies.flatten(0, 1))
        copies = {transform.norm: transform.finish(each) for transform in transforms}
    top_B = teacher_sums = None
    if with_teacher and batch.target is not None:
        top_B, teacher_sums = sum_teacher(batch.target, batch.has_target, batch.labels) or (None, None)
    return RowStep(
        epoch=epoch,
        step=step,
        batch=batch,
        inputs=inputs,
        parts=parts,
        whole=whole,
        top=top_B,
        teacher_sums=teacher_sums,
        negatives=negatives,
        copies=copies,
    )


def sum_teacher(target: Target, has_target_B: Tensor | None, labels_B: Tensor) -> tuple[Tensor, Tensor] | None:
    """The most probable class of each row, -1 without a target, int64 (B,), and the sums that `Sums.TEACHER` names;
    None where a target does not determine them."""
    found = top_class_and_entropy(target)
    if found is None:
        return None
    top_B, entropy_B = found
    if has_target_B is not None:
        top_B, entropy_B = top_B.where(has_target_B, -1), entropy_B.where(has_target_B, 0.0)
    both_B = (top_B >= 0) & (labels_B != IGNORE)
    sums = ((top_B >= 0).sum(), both_B.sum(), (both_B & (top_B == labels_B)).sum(), entropy_B.double().sum())
    return top_B, torch.stack([value.double() for value in sums])
