"""What all students of a pass share of one step: the images, normalised; how many rows count; what the teacher says.

Legend: B batch, C classes, H and W pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_transform import Preprocessing
from softlabel.loader import Batch
from softlabel.loss.signals import top_class_and_entropy

# Mean and standard deviation: students that agree on them share the normalised images.
Norm = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows of a batch: all that count, those with soft labels, those with a hard label."""

    rows: int
    soft: int
    hard: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """One step, ready for any student.

    Attributes:
        epoch, step: which one, from 0.
        batch: on the device; rows of weight 0 have neither a hard label nor soft labels.
        images: float32 (B, 3, H, W), channels last, for each way to normalise.
        parts: slices of the batch that go forward and backward one after the other, with what counts in each.
        whole: rows of the batch over all processes, by which means are taken.
        top: int64 (B,), the teacher's most probable class, -1 where there is none; None: unknown for all.
        told: sums over the rows with soft labels, float64 (4,): rows with `top`, such rows with a hard label, those
            where the two agree, and the entropy of the target in nats.
    """

    epoch: int
    step: int
    batch: Batch
    images: dict[Norm, Tensor]
    parts: tuple[tuple[slice, Counts], ...]
    whole: Counts
    top: Tensor | None
    told: Tensor | None


def norm_of(preprocessing: Preprocessing) -> Norm:
    return preprocessing.mean, preprocessing.std


def without_filler(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with rows of weight 0 masked everywhere, and which rows are not of weight 0, bool (B,)."""
    if batch.weight is None:
        return batch, torch.ones(len(batch), dtype=torch.bool)
    counts_B = batch.weight > 0
    has_target = batch.has_target
    if batch.target is not None:
        has_target = counts_B if has_target is None else counts_B & has_target
    labels_B = torch.where(counts_B, batch.labels, IGNORE)
    return replace(batch, labels=labels_B, has_target=has_target, weight=None), counts_B


def cut(batch: Batch, counts_B: Tensor, parts: int) -> tuple[tuple[slice, Counts], ...]:
    """A batch, without filler and on the CPU, in slices that are not empty, with what counts in each."""
    rows, found = len(batch), []
    for number in range(parts):
        part = slice(rows * number // parts, rows * (number + 1) // parts)
        if part.start == part.stop:
            continue
        counted = int(counts_B[part].sum())
        if batch.target is None:
            soft = 0
        else:
            soft = counted if batch.has_target is None else int(batch.has_target[part].sum())
        found.append((part, Counts(rows=counted, soft=soft, hard=int((batch.labels[part] != IGNORE).sum()))))
    return tuple(found)


def take(batch: Batch, part: slice) -> Batch:
    """Some rows of a batch without filler."""
    return Batch(
        images=batch.images[part],
        labels=batch.labels[part],
        keys=batch.keys[part],
        samples=batch.samples[part],
        rows=batch.rows[part],
        target=None if batch.target is None else batch.target.take(part),
        has_target=None if batch.has_target is None else batch.has_target[part],
    )


@torch.no_grad()
def prepare(
    batch: Batch,
    parts: tuple[tuple[slice, Counts], ...],
    whole: Counts,
    norms: Iterable[Preprocessing],
    *,
    epoch: int,
    step: int,
    listen: bool,
) -> Step:
    """Do once what all students need.

    Args:
        batch: on the device, without filler.
        parts, whole: see `Step`.
        norms: how the students normalise.
        listen: whether to ask what the teacher says.
    """
    images: dict[Norm, Tensor] = {}
    for preprocessing in norms:
        if norm_of(preprocessing) not in images:
            normal_BCHW = preprocessing.normalize(batch.images)
            # Channels last is how convolutions are fastest on both kinds of device.
            images[norm_of(preprocessing)] = normal_BCHW.contiguous(memory_format=torch.channels_last)
    top_B = told = None
    if listen and batch.target is not None:
        top_B, told = _listen(batch)
    return Step(epoch=epoch, step=step, batch=batch, images=images, parts=parts, whole=whole, top=top_B, told=told)


def _listen(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    assert batch.target is not None
    found = top_class_and_entropy(batch.target)
    if found is None:
        return None, None
    top_B, entropy_B = found
    if batch.has_target is not None:
        top_B, entropy_B = top_B.where(batch.has_target, -1), entropy_B.where(batch.has_target, 0.0)
    both_B = (top_B >= 0) & (batch.labels != IGNORE)
    sums = ((top_B >= 0).sum(), both_B.sum(), (both_B & (top_B == batch.labels)).sum(), entropy_B.double().sum())
    return top_B, torch.stack([value.double() for value in sums])
