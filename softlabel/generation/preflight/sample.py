"""A sample of a run, labelled before the run: what it costs and what comes out of it.

The sample is drawn over the whole dataset and depends on its size and the seed alone.

Legend: B batch, C classes, M members, R rows of the sample.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import DataError, TeacherError
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.job import Job
from softlabel.generation.labeller import Labeller
from softlabel.generation.pipeline import fitting
from softlabel.inputs.base import IGNORE
from softlabel.store.manifest import BadRow

BATCHES = 2  # one to warm up, one to be timed
_RUN = 16  # neighbours that are drawn together: a source reads whole row groups
_STRATA = 4096
# Images or rows count as equal where no pixel, no scaled logit, is further than this from the sample's median. Of
# images of 12 bits, a shift by 8 leaves 0 to 15.
_SAME_PIXELS, _SAME_LOGITS = 15, 1e-3
_COMPARED, _FEW, _NEARLY_ALL = 64, 8, 0.95  # images compared; fewer say nothing; the share that must be equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The sample's first batches and what became of all of it.

    Attributes:
        batches: decoded, the first `BATCHES` of them.
        indices: of the samples that these batches were asked for, bad ones too.
        scaled_logits: float32 (R, C), or (R, M, C) where members are kept, of every image that can be decoded.
        labels: int64 (R,), -100 for none.
        sampled: images, with the bad ones.
        bad: those that cannot be decoded.
        decoding: seconds an image, in one process.
        forward: seconds an image, all teachers, combined; images at hand already.
    """

    batches: tuple[DecodedBatch, ...]
    indices: tuple[NDArray[np.int64], ...]
    scaled_logits: Tensor
    labels: NDArray[np.int64]
    sampled: int
    bad: tuple[BadRow, ...]
    decoding: float
    forward: float

    def images_per_second(self, job: Job) -> float:
        """Beside a GPU, decoding and the teachers overlap; on a CPU they share its cores."""
        if job.labeller.teachers[0].device.type == "cpu":
            return 1 / (self.decoding + self.forward)
        return 1 / max(self.decoding / max(1, job.workers), self.forward)

    @property
    def top(self) -> NDArray[np.int64]:
        """The labels' most probable class, int64 (R,)."""
        mixed_RC = self.scaled_logits.mean(dim=1) if self.scaled_logits.dim() == 3 else self.scaled_logits
        top_R: NDArray[np.int64] = mixed_RC.argmax(dim=-1).numpy()
        return top_R

    @property
    def labelled(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def accuracy(self) -> float | None:
        """Of the soft labels, where there are hard ones."""
        known_R = self.labels != IGNORE
        return float((self.top == self.labels)[known_R].mean()) if known_R.any() else None


def sample_indices(samples: int, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Batches of indices, each from all parts of the dataset, until every sample was drawn once."""
    run = min(max(1, samples // _STRATA), _RUN, batch_size)
    starts = np.random.default_rng(seed).permutation(-(-samples // run)) * run
    each = batch_size // run
    for first in range(0, len(starts), each):
        indices = (np.sort(starts[first : first + each])[:, None] + np.arange(run)).reshape(-1)
        yield indices[indices < samples]


def label_sample(job: Job, *, seconds: float = 0.0, seed: int = 0) -> tuple[Job, Trial]:
    """Label `BATCHES` batches at least, and go on for so many seconds. Writes nothing.

    Returns:
        The job with a batch size that fits into memory, and what became of the sample.

    Raises:
        DataError: no image of the sample can be decoded.
        TeacherError: a member's output is not (B, C) finite numbers.
    """
    labeller, trial = fitting(job.labeller, lambda labeller: _label_sample(labeller, seconds, seed))
    return replace(job, labeller=labeller), trial


def _label_sample(labeller: Labeller, seconds: float, seed: int) -> Trial:
    drawn = sample_indices(len(labeller.source), labeller.batch_size, seed)
    batches: list[DecodedBatch] = []
    indices: list[NDArray[np.int64]] = []
    scaled: list[Tensor] = []
    labels: list[NDArray[np.int64]] = []
    bad: list[BadRow] = []
    sampled = timed = labelled = 0
    decoding = forward = 0.0
    for number, indices_B in enumerate(drawn):
        started = time.perf_counter()
        batch = labeller.reader.batch(indices_B.tolist())
        decoded = time.perf_counter()
        if batch.keys:
            scaled.append(labeller.lane.scaled_logits(batch).cpu())
            labels.append(batch.labels)
        ended = time.perf_counter()
        sampled, bad = sampled + len(indices_B), [*bad, *batch.bad]
        alone = len(indices_B) == len(labeller.source)
        if alone and batch.keys:  # there is no second batch to be timed: this one once more
            again = time.perf_counter()
            labeller.lane.scaled_logits(batch).cpu()
            ended = decoded + time.perf_counter() - again
        if number or alone:
            timed, labelled = timed + len(indices_B), labelled + len(batch.keys)
            decoding, forward = decoding + decoded - started, forward + ended - decoded
        if len(batches) < BATCHES:
            batches.append(batch)
            indices.append(indices_B)
        if number + 1 >= BATCHES and decoding + forward > seconds:
            break
    if not scaled:
        raise DataError(
            f"{labeller.source.name}: no image of a sample of {sampled:,} can be decoded; the first, {bad[0].key!r}: "
            f"{bad[0].reason}"
        )
    return Trial(
        batches=tuple(batches),
        indices=tuple(indices),
        scaled_logits=torch.cat(scaled),
        labels=np.concatenate(labels),
        sampled=sampled,
        bad=tuple(bad),
        decoding=decoding / timed,
        forward=forward / max(1, labelled),
    )


def refuse_equal(trial: Trial, name: str) -> None:
    """Stop where the images of a sample, or the rows of its teachers, are all or nearly all the same.

    Raises:
        DataError: the decoded images are.
        TeacherError: the rows are, and the images are not.
    """
    full = [batch.inputs[0].tensors for batch in trial.batches if batch.keys]
    count = sum(len(next(iter(tensors.values()))) for tensors in full)
    picked = np.unique(np.linspace(0, max(0, count - 1), _COMPARED).astype(np.int64))
    if len(picked) < _FEW:
        return
    # The input that differs most speaks for a sample with several.
    equal = min(_count_equal_inputs([tensors[input] for tensors in full], picked) for input in full[0])
    if equal >= _NEARLY_ALL * len(picked):
        raise DataError(
            f"{name}: expected samples that differ, found {equal} of {len(picked)} that are (nearly) the same once "
            "decoded; look at how they are kept (few bits of 16: '?bits=12'), or give --no-preflight if they are right"
        )
    logits = trial.scaled_logits.numpy().reshape(len(trial.scaled_logits), -1, trial.scaled_logits.shape[-1])
    shifted = np.nan_to_num(logits - logits.max(axis=-1, keepdims=True), neginf=-1e4)
    equal = _count_equal(shifted.reshape(len(shifted), -1), _SAME_LOGITS)
    if len(shifted) >= _FEW and equal >= _NEARLY_ALL * len(shifted):
        raise TeacherError(
            f"{name}: expected labels that differ, found {equal} rows of a sample of {len(shifted)} that are (nearly) "
            "the same although the images are not; check the teacher's checkpoint and its preprocessing (mean, std) or "
            "say --no-preflight if that is how it answers"
        )


def _count_equal_inputs(batches: Sequence[Tensor], picked: NDArray[np.int64]) -> int:
    """How many of these samples have nearly the same numbers as the others; 0 where their shapes differ."""
    samples = [sample for batch in batches for sample in batch]
    if len({samples[place].shape for place in picked}) > 1:
        return 0
    is_bytes = batches[0].dtype == torch.uint8
    flat_RN = np.stack([samples[place].numpy().reshape(-1) for place in picked])
    if not flat_RN.shape[1]:
        return 0
    return _count_equal(flat_RN.astype(np.int16 if is_bytes else np.float64), _SAME_PIXELS if is_bytes else 0.0)


def _count_equal(rows_RN: NDArray[Any], within: float) -> int:
    """How many rows are nowhere further than `within` from the median of all."""
    middle = len(rows_RN) // 2
    median_N = np.partition(rows_RN, middle, axis=0)[middle]
    return int((np.abs(rows_RN - median_N).max(axis=1) <= within).sum())
