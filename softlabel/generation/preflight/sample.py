"""Label a random sample of the dataset before the run, to measure time and check results.

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

from softlabel.common.activation import Activation
from softlabel.common.multi_hot import Labels, is_labelled, to_multi_hot
from softlabel.errors import DataError, TeacherError
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.job import Job
from softlabel.generation.labeller import Labeller, Lane
from softlabel.generation.pipeline import fit_batch
from softlabel.generation.token_lane import TokenLane
from softlabel.inputs.base import InputKind
from softlabel.inputs.image_decode import IMAGES
from softlabel.labels.combine import average_members
from softlabel.store.manifest import BadRow

BATCHES = 2  # one to warm up, one to time
_RUN = 16  # consecutive samples drawn together: a source reads whole row groups
_STRATA = 4096
# Images or rows are equal if no pixel or scaled logit is further than this from the sample's median. 12-bit images read
# as 16 bits have pixels of 0 to 15.
_SAME_PIXELS, _SAME_LOGITS = 15, 1e-3
_POSITIONS, _POSITION_BYTES = 512, 1 << 26  # of documents that encodings are measured on at most, and their logits
_COMPARED, _FEW, _NEARLY_ALL = 64, 8, 0.95  # images compared, minimal number, share of equal ones to refuse


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """What encodings are measured on: the answers to a sample, of language models at several positions of a document.

    Attributes:
        scaled_logits: float32 (R, C), or (R, M, C) if members are kept.
        labels: int64 (R,), -100 for none; of independent sigmoids int8 (R, C): 1, 0, or -1 if unknown.
        hidden: of language models what goes into the last layer, float32 (R, D); None of others.
    """

    scaled_logits: Tensor
    labels: Labels
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A labelled sample.

    Attributes:
        batches: the first `BATCHES` decoded batches.
        indices: of their samples, including bad ones.
        scaled_logits: float32 (R, C), or (R, M, C) if members are kept, of every decodable image.
        labels: as `Answers.labels`, of these.
        answers: these, or of language models those of more positions.
        sampled: number of images, including bad ones.
        bad: images that cannot be decoded.
        decoding: seconds per image, in one process.
        forward: seconds per decoded image, all teachers together.
    """

    batches: tuple[DecodedBatch, ...]
    indices: tuple[NDArray[np.int64], ...]
    scaled_logits: Tensor
    labels: Labels
    answers: Answers
    sampled: int
    bad: tuple[BadRow, ...]
    decoding: float
    forward: float

    def images_per_second(self, job: Job) -> float:
        """Estimate the throughput: with a GPU decoding and teachers overlap, on a CPU they share its cores."""
        if job.labeller.teachers[0].device.type == "cpu":
            return 1 / (self.decoding + self.forward)
        return 1 / max(self.decoding / max(1, job.workers), self.forward)

    @property
    def labelled(self) -> int:
        """How many answers have a hard label."""
        return int(is_labelled(self.answers.labels).sum())

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the answers with a hard label, of independent sigmoids on known labels; None if there are
        none."""
        labels, scaled = self.answers.labels, self.answers.scaled_logits
        known = labels >= 0
        if not known.any():
            return None
        activation: Activation = "softmax" if labels.ndim == 1 else "sigmoid"
        mixed_RC = average_members(scaled, activation) if scaled.dim() == 3 else scaled
        top = mixed_RC.argmax(dim=-1).numpy() if labels.ndim == 1 else mixed_RC.numpy() > 0
        return float((top == labels)[known].mean())


def sample_indices(samples: int, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of indices from all parts of the dataset, a function of size and seed, each sample once."""
    run = min(max(1, samples // _STRATA), _RUN, batch_size)
    starts = np.random.default_rng(seed).permutation(-(-samples // run)) * run
    each = batch_size // run
    for first in range(0, len(starts), each):
        indices = (np.sort(starts[first : first + each])[:, None] + np.arange(run)).reshape(-1)
        yield indices[indices < samples]


def label_sample(job: Job, *, seconds: float = 0.0, seed: int = 0) -> tuple[Job, Trial]:
    """Label at least `BATCHES` batches, and continue for `seconds`. Writes nothing.

    Returns:
        The job with a batch size that fits into memory, and the sample.

    Raises:
        DataError: no image of the sample can be decoded.
        TeacherError: a member's output is not (B, C) finite numbers.
    """
    labeller, trial = fit_batch(job.labeller, lambda labeller: _measure_sample(labeller, seconds, seed))
    return replace(job, labeller=labeller), trial


def _measure_sample(labeller: Labeller, seconds: float, seed: int) -> Trial:
    drawn = sample_indices(len(labeller.source), labeller.batch_size, seed)
    batches: list[DecodedBatch] = []
    indices: list[NDArray[np.int64]] = []
    scaled: list[Tensor] = []
    labels: list[Labels] = []
    bad: list[BadRow] = []
    sampled = timed = labelled = 0
    decoding = forward = 0.0
    for number, indices_B in enumerate(drawn):
        started = time.perf_counter()
        batch = labeller.reader.batch(indices_B.tolist())
        decoded = time.perf_counter()
        if batch.keys:
            scaled += [one.cpu() for one in labeller.lane.scaled_logits(batch)]
            sigmoid = labeller.run.activation == "sigmoid"
            found = labeller.lane.hard_labels(batch)
            labels.append(to_multi_hot(found, labeller.run.num_classes) if sigmoid else found)
        ended = time.perf_counter()
        sampled, bad = sampled + len(indices_B), [*bad, *batch.bad]
        alone = len(indices_B) == len(labeller.source)
        if alone and batch.keys:  # no second batch to time: time this one again
            again = time.perf_counter()
            labeller.lane.scaled_logits(batch)[0].cpu()
            ended = decoded + time.perf_counter() - again
        if number or alone:
            timed, labelled = timed + len(indices_B), labelled + len(batch.keys)
            share = labeller.lane.share_filled(batch) if batch.keys else 1.0
            decoding, forward = decoding + decoded - started, forward + share * (ended - decoded)
        if len(batches) < BATCHES:
            batches.append(batch)
            indices.append(indices_B)
        if number + 1 >= BATCHES and decoding + forward > seconds:
            break
    if not scaled:
        raise DataError(
            f"{labeller.source.name}: none of {sampled:,} {labeller.source.inputs.noun} that were tried can be "
            f"decoded; the first, {bad[0].key!r}: {bad[0].reason}"
        )
    scaled_logits, labels_R = torch.cat(scaled), np.concatenate(labels)
    return Trial(
        batches=tuple(batches),
        indices=tuple(indices),
        scaled_logits=scaled_logits,
        labels=labels_R,
        answers=_sample_positions(labeller.lane, batches) or Answers(scaled_logits=scaled_logits, labels=labels_R),
        sampled=sampled,
        bad=tuple(bad),
        decoding=decoding / timed,
        # Noisy copies of views cost as much as the views.
        forward=forward / max(1, labelled) * (1 + 2 * labeller.run.views.directions),
    )


def _sample_positions(lane: Lane, batches: Sequence[DecodedBatch]) -> Answers | None:
    """Answers of a language model at positions of the first batch with some; None of other teachers, or if no document
    has one."""
    if not isinstance(lane, TokenLane):
        return None
    fitting = max(1, _POSITION_BYTES // (4 * lane.run.num_classes * lane.run.members_stored))
    for batch in batches:
        if not batch.keys:
            continue
        most = max(1, min(_POSITIONS, fitting) // len(batch.keys))
        if found := [one for one, _ in lane.sample_positions(batch, most)]:
            return Answers(
                scaled_logits=torch.cat([lane.combine(one.logits).cpu() for one in found]),
                labels=torch.cat([one.following for one in found]).numpy(),
                hidden=torch.cat([one.hidden.cpu() for one in found]),
            )
    return None


def refuse_equal(trial: Trial, name: str, activation: Activation, kind: InputKind) -> None:
    """Check that the images and rows of a sample differ.

    Raises:
        DataError: nearly all decoded images are equal.
        TeacherError: nearly all rows are equal, but the images are not.
    """
    full = [batch.inputs[0].tensors for batch in trial.batches if batch.keys]
    count = sum(len(next(iter(tensors.values()))) for tensors in full)
    picked = np.unique(np.linspace(0, max(0, count - 1), _COMPARED).astype(np.int64))
    if len(picked) < _FEW:
        return
    # Of several inputs, the one that differs most counts.
    equal = min(_count_equal_inputs([tensors[input] for tensors in full], picked) for input in full[0])
    if equal >= _NEARLY_ALL * len(picked):
        bits = " (few of 16 bits in use: '?bits=12')" if kind == IMAGES else ""
        raise DataError(
            f"{name}: expected samples that differ, found {equal} of {len(picked)} nearly equal ones; check their "
            f"format{bits}, or give --no-preflight if they are right"
        )
    logits = trial.scaled_logits.numpy().reshape(len(trial.scaled_logits), -1, trial.scaled_logits.shape[-1])
    shifts = logits.max(axis=-1, keepdims=True) if activation == "softmax" else 0
    shifted = np.nan_to_num(logits - shifts, neginf=-1e4)
    equal = _count_equal(shifted.reshape(len(shifted), -1), _SAME_LOGITS)
    if len(shifted) >= _FEW and equal >= _NEARLY_ALL * len(shifted):
        raise TeacherError(
            f"{name}: expected labels that differ, found {equal} of {len(shifted)} nearly equal rows although the "
            "samples differ; check the teacher's checkpoint and preprocessing (mean, std), or give --no-preflight if "
            "they are right"
        )


def _count_equal_inputs(batches: Sequence[Tensor], picked: NDArray[np.int64]) -> int:
    """Count samples with nearly the same numbers as the others; 0 if their shapes differ."""
    samples = [sample for batch in batches for sample in batch]
    if len({samples[place].shape for place in picked}) > 1:
        return 0
    is_bytes = batches[0].dtype == torch.uint8
    flat_RN = np.stack([samples[place].numpy().reshape(-1) for place in picked])
    if not flat_RN.shape[1]:
        return 0
    return _count_equal(flat_RN.astype(np.int16 if is_bytes else np.float64), _SAME_PIXELS if is_bytes else 0.0)


def _count_equal(rows_RN: NDArray[Any], within: float) -> int:
    """Count rows whose values are all within `within` of the median row."""
    middle = len(rows_RN) // 2
    median_N = np.partition(rows_RN, middle, axis=0)[middle]
    return int((np.abs(rows_RN - median_N).max(axis=1) <= within).sum())
