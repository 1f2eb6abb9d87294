"""Whether a run gives the same answer twice: the same image when it is read again, the same logits in other company.

Labels must not depend on batch size, shard size or the number of workers. A source with a random transform in it, a
network with an active dropout, one that normalises over its batch or is quantised by the batch's range breaks that.

Legend: B batch, C classes, K images that are asked again, M members.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softlabel.errors import DataError, TeacherError
from softlabel.generation.ensemble import AGREEMENT
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.labeller import Labeller
from softlabel.generation.pipeline import fitting
from softlabel.generation.preflight.sample import Trial
from softlabel.inputs.base import Inputs
from softlabel.models.teacher import Teacher

_READ_AGAIN = 32  # images
# Above this share of other top classes, or of one image's probability that lies elsewhere, an answer by the batch is no
# rounding of a quantised network any more.
_MOST_CHANGED = 0.05
_MOST_MOVED = 0.1
_FEWEST_VALUES = 16  # of outputs, below which nothing is concluded from their range


def check_repeatable(labeller: Labeller, trial: Trial) -> tuple[str, ...]:
    """Read some images of a sample again, and ask the teachers about some of them in other company.

    Returns:
        What is odd about a teacher and not bad enough to refuse it.

    Raises:
        DataError: an image is another one when it is read again.
        TeacherError: answers change from call to call, depend on the batch, or are not logits.
    """
    _read_again(labeller, trial)
    _, remarks = fitting(labeller, lambda labeller: _ask_again(labeller, trial))
    return remarks


def _read_again(labeller: Labeller, trial: Trial) -> None:
    """Bitwise: nothing before a teacher may be drawn at random, but for views, which depend on the key."""
    first = trial.batches[0]
    again = labeller.reader.batch(trial.indices[0][:_READ_AGAIN].tolist())
    place = {key: number for number, key in enumerate(first.keys)}
    for number, key in enumerate(again.keys):
        before = place.get(key)
        same = before is not None and all(
            torch.equal(now[number], then[before])
            for now_inputs, then_inputs in zip(again.inputs, first.inputs, strict=True)
            for now, then in zip(now_inputs.tensors.values(), then_inputs.tensors.values(), strict=True)
        )
        if not same:
            raise DataError(
                f"{labeller.source.name}: image {key!r}: expected the same pixels whenever it is read, found others "
                "the second time; take random transforms out of the dataset: augmented views are made by --augment, so "
                "that the student sees what was labelled"
            )


def _ask_again(labeller: Labeller, trial: Trial) -> tuple[str, ...]:
    full = [batch for batch in trial.batches if batch.keys]
    first, rows_K, other = _in_other_company(full, labeller.batch_size)
    (logits_MBC,) = labeller.lane.logits([other])
    remarks = [text for z, t in zip(logits_MBC, labeller.teachers, strict=True) if (text := _range(z, t))]
    if len(rows_K) == 0:
        return tuple(remarks)
    asked_KC = labeller.lane.combine([logits_BC[-len(rows_K) :] for logits_BC in logits_MBC]).cpu()
    # The sample's labels begin with those of its first full batch.
    if _apart(asked_KC, trial.scaled_logits[rows_K]) <= 0.5 * min(AGREEMENT[t.precision] for t in labeller.teachers):
        return tuple(remarks)
    (once_MBC,), (twice_MBC,) = labeller.lane.logits([first]), labeller.lane.logits([first])
    for teacher, *answers in zip(labeller.teachers, once_MBC, twice_MBC, logits_MBC, strict=True):
        once_KC, twice_KC, moved_KC = answers[0][rows_K], answers[1][rows_K], answers[2][-len(rows_K) :]
        limit = AGREEMENT[teacher.precision]
        if _apart(once_KC, twice_KC) > limit:
            raise TeacherError(
                f"{teacher.spec.text}: expected one answer to an image, found logits that differ by up to "
                f"{_farthest(once_KC, twice_KC):.2g} when the same batch is asked twice: something in it is drawn at "
                "random (a dropout that is always on?); give the teacher without it"
            )
        if _apart(once_KC, moved_KC) > limit:
            changed = float((once_KC.argmax(dim=-1) != moved_KC.argmax(dim=-1)).float().mean())
            text = (
                f"{teacher.spec.text}: its answer to an image depends on the others in its batch: in other company the "
                f"logits of {len(rows_K)} images differ by up to {_farthest(once_KC, moved_KC):.2g}, and "
                f"{changed:.0%} have another top class (is it quantised dynamically, or does it normalise over the "
                "batch?)"
            )
            if changed > _MOST_CHANGED or _moved(once_KC, moved_KC) > _MOST_MOVED:
                raise TeacherError(
                    f"{text}; give a network that sees images one by one (quantised statically, in evaluation mode), "
                    "or label with --batch-size 1"
                )
            remarks.append(text)
    return tuple(remarks)


def _in_other_company(full: Sequence[DecodedBatch], batch_size: int) -> tuple[DecodedBatch, list[int], DecodedBatch]:
    """The first batch, the places in it of the images that are asked again, and the batch that ends with these.

    They come behind images of the second batch, backwards. No places where there is no other company.
    """
    first = full[0]
    count = -(-len(first.keys) // 2)
    rows_K = list(range(count))[::-1]
    second = full[1] if len(full) > 1 else None
    alike = second is not None and all(a.shapes == b.shapes for a, b in zip(first.inputs, second.inputs, strict=True))
    before = min(len(second.keys), batch_size - count) if second is not None and alike else 0
    if before == 0 and count == len(first.keys):
        return first, [], first
    inputs = tuple(
        Inputs.join([*([second.inputs[place][:before]] if second is not None and before else []), own[rows_K]])
        for place, own in enumerate(first.inputs)
    )
    keys = [*(second.keys[:before] if second is not None else []), *(first.keys[row] for row in rows_K)]
    none = np.zeros(len(keys), np.int64)
    other = DecodedBatch(keys=keys, labels=none, content=none.astype(np.uint64), inputs=inputs, bad=())
    return first, rows_K, other


def _farthest(a: Tensor, b: Tensor) -> float:
    """The largest difference between answers that are numbers on both sides; -inf masks a class."""
    differences = (a.float() - b.float()).abs()
    return float(torch.where(a.isfinite() & b.isfinite(), differences, 0.0).max())


def _apart(a: Tensor, b: Tensor) -> float:
    """The same as a share of the largest value."""
    largest = float(torch.where(a.isfinite(), a.float().abs(), 0.0).max())
    return _farthest(a, b) / (1 + largest)


def _moved(a: Tensor, b: Tensor) -> float:
    """The largest share of an image's probability that lies in other classes (total variation)."""
    return float((torch.softmax(a.float(), dim=-1) - torch.softmax(b.float(), dim=-1)).abs().sum(dim=-1).max() / 2)


def _range(logits_BC: Tensor, teacher: Teacher) -> str | None:
    """Whether the range of a network's output says that it is none of logits.

    Raises:
        TeacherError: values of a sigmoid.
    """
    if logits_BC.numel() < _FEWEST_VALUES or not bool((logits_BC >= 0).all()):
        return None
    lowest, highest = float(logits_BC.min()), float(logits_BC.max())
    found = f"{teacher.spec.text}: expected logits, found values from {lowest:.3g} to {highest:.3g}, none below 0"
    if highest <= 1 and highest - lowest > 0.5:
        raise TeacherError(f"{found} and none above 1, as a sigmoid gives; return what goes into the sigmoid")
    return f"{found} (percentages, probabilities, or the output of a ReLU?)"
