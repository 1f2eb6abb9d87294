"""Check that images and logits are repeatable: when read again, and in another batch.

Labels must not depend on batch size, shard size or the number of workers. A source with a random transform, a network
with active dropout, normalisation over the batch or dynamic quantisation violates this.

Legend: B batch, C classes, K images that are labelled again, M members.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.errors import DataError, TeacherError
from softlabel.generation.ensemble import AGREEMENT
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.labeller import Labeller
from softlabel.generation.pipeline import fit_batch
from softlabel.generation.preflight.sample import Trial
from softlabel.inputs.base import Inputs
from softlabel.models.teacher import Teacher

_REREAD = 32  # images
# Share of other top classes, and of one image's probability in other classes, above which a dependence on the batch is
# not rounding of a quantised network.
_MOST_CHANGED = 0.05
_MOST_MOVED = 0.1
# Outputs between 0 and 1 that are further apart are values of a sigmoid.
_SPREAD, _SPREAD_OF_RARE = 0.5, 0.05
_FEWEST_VALUES = 16  # outputs needed to judge their range


def check_repeatable(labeller: Labeller, trial: Trial) -> tuple[str, ...]:
    """Read some images of a sample again, and label some of them in another batch.

    Returns:
        Findings that are not severe enough to refuse a teacher.

    Raises:
        DataError: an image changes when it is read again.
        TeacherError: logits change from call to call, depend on the batch, or are not logits.
    """
    _check_reading(labeller, trial)
    _, remarks = fit_batch(labeller, lambda labeller: _check_answers(labeller, trial))
    return remarks


def _check_reading(labeller: Labeller, trial: Trial) -> None:
    """Raise DataError unless images are equal bit for bit when read again: only views are random, by key."""
    first = trial.batches[0]
    again = labeller.reader.batch(trial.indices[0][:_REREAD].tolist())
    place = {key: number for number, key in enumerate(first.keys)}
    for number, key in enumerate(again.keys):
        before = place.get(key)
        same = before is not None and all(
            # The two batches may be padded to different lengths.
            _equal(transform.cut(now[[number]]), transform.cut(then[[before]]))
            for transform, now, then in zip(labeller.reader.transforms, again.inputs, first.inputs, strict=False)
        )
        if not same:
            raise DataError(
                f"{labeller.source.name}: sample {key!r}: expected the same content whenever it is read, found another "
                "the second time; remove random transforms from the dataset: use --augment, whose views the student "
                "can reproduce"
            )


def _equal(a: Inputs, b: Inputs) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a.tensors.values(), b.tensors.values(), strict=True))


def _check_answers(labeller: Labeller, trial: Trial) -> tuple[str, ...]:
    full = [batch for batch in trial.batches if batch.keys]
    first, rows_K, other = _change_company(full, labeller.batch_size)
    (logits_MBC,) = labeller.lane.logits([other])
    activation = labeller.run.activation
    remarks = (
        []
        if not labeller.run.encoding.labels
        else [
            text for z, t in zip(logits_MBC, labeller.teachers, strict=True) if (text := _check_range(z, t, activation))
        ]
    )
    if len(rows_K) == 0:
        return tuple(remarks)
    asked_KC = labeller.lane.combine([logits_BC[-len(rows_K) :] for logits_BC in logits_MBC]).cpu()
    # The sample's labels begin with those of its first full batch.
    tolerance = 0.5 * min(AGREEMENT[teacher.precision] for teacher in labeller.teachers)
    if _relative_difference(asked_KC, trial.scaled_logits[rows_K]) <= tolerance:
        return tuple(remarks)
    (once_MBC,), (twice_MBC,) = labeller.lane.logits([first]), labeller.lane.logits([first])
    for teacher, *answers in zip(labeller.teachers, once_MBC, twice_MBC, logits_MBC, strict=True):
        once_KC, twice_KC, moved_KC = answers[0][rows_K], answers[1][rows_K], answers[2][-len(rows_K) :]
        limit = AGREEMENT[teacher.precision]
        if _relative_difference(once_KC, twice_KC) > limit:
            raise TeacherError(
                f"{teacher.spec.text}: expected the same logits for the same batch, found differences up to "
                f"{_max_difference(once_KC, twice_KC):.2g}: the network is random (active dropout?); give the teacher "
                "without it"
            )
        if _relative_difference(once_KC, moved_KC) > limit:
            changed = float((_decide(once_KC, activation) != _decide(moved_KC, activation)).float().mean())
            decisions = "have another top class" if activation == "softmax" else "of their classes change sides"
            text = (
                f"{teacher.spec.text}: its logits for a sample depend on the others in the batch: in another batch the "
                f"logits of {len(rows_K)} samples differ by up to {_max_difference(once_KC, moved_KC):.2g}, and "
                f"{changed:.0%} {decisions} (is it quantised dynamically, or does it normalise over the "
                "batch?)"
            )
            if changed > _MOST_CHANGED or _max_moved_probability(once_KC, moved_KC, activation) > _MOST_MOVED:
                raise TeacherError(
                    f"{text}; give a network that treats samples independently (quantised statically, in evaluation "
                    "mode), or label with --batch-size 1"
                )
            remarks.append(text)
    return tuple(remarks)


def _change_company(full: Sequence[DecodedBatch], batch_size: int) -> tuple[DecodedBatch, list[int], DecodedBatch]:
    """Return the first batch, the rows of it to label again, and a batch that ends with these rows.

    They follow images of the second batch, in reverse order. There are no rows if no other batch can be made.
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


def _max_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference between values that are finite in both; -inf masks a class."""
    differences = (a.float() - b.float()).abs()
    return float(torch.where(a.isfinite() & b.isfinite(), differences, 0.0).max())


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    largest = float(torch.where(a.isfinite(), a.float().abs(), 0.0).max())
    return _max_difference(a, b) / (1 + largest)


def _decide(logits_KC: Tensor, activation: Activation) -> Tensor:
    """Return the top class (K,), or which classes are more probable than not (K, C)."""
    return logits_KC.argmax(dim=-1) if activation == "softmax" else logits_KC > 0


def _max_moved_probability(a: Tensor, b: Tensor, activation: Activation) -> float:
    """Return the largest total variation between the distributions of an image, or difference of one class's
    probability."""
    if activation == "sigmoid":
        return float((a.float().sigmoid() - b.float().sigmoid()).abs().max())
    return float((torch.softmax(a.float(), dim=-1) - torch.softmax(b.float(), dim=-1)).abs().sum(dim=-1).max() / 2)


def _check_range(logits_BC: Tensor, teacher: Teacher, activation: Activation) -> str | None:
    """Return a finding if the range of a network's output is not that of logits; raise TeacherError for a sigmoid."""
    if logits_BC.numel() < _FEWEST_VALUES or not bool((logits_BC >= 0).all()):
        return None
    lowest, highest = float(logits_BC.min()), float(logits_BC.max())
    found = f"{teacher.spec.text}: expected logits, found values from {lowest:.3g} to {highest:.3g}, none below 0"
    # Of several classes at once most are rare: their logits are below 0, and all probabilities may be small.
    if highest <= 1 and highest - lowest > (_SPREAD if activation == "softmax" else _SPREAD_OF_RARE):
        # The logits of one or two outputs may all lie there, in a network that has hardly learnt.
        if logits_BC.shape[1] <= (2 if activation == "softmax" else 1):
            return f"{found} and none above 1 (values of a sigmoid?)"
        raise TeacherError(
            f"{found} and none above 1, as of a sigmoid; return the input of the sigmoid (of an .onnx file, "
            "'?probabilities=true'), or give --no-preflight if they are logits"
        )
    return f"{found} (percentages, probabilities, or the output of a ReLU?)"
