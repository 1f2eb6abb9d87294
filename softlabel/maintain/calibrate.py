"""Fit a temperature to each teacher on labelled samples.

Legend: B batch, C classes, M members, N samples.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from softlabel.common.activation import Activation
from softlabel.common.arguments import check_arguments
from softlabel.common.multi_hot import is_labelled, to_multi_hot
from softlabel.common.spec import parse_spec
from softlabel.dataset import ReorderedSource, Source, open_source
from softlabel.errors import DataError, UsageError
from softlabel.evaluation.metrics import calibration_error
from softlabel.generation.config import GenerateConfig
from softlabel.generation.job import Job, load_job
from softlabel.generation.token_lane import TokenLane
from softlabel.labels.calibration import CHUNK, Calibrated, Calibration, fit_temperature, write_calibration
from softlabel.models.runs import names_language_model

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_POSITIONS = 16  # of a document at most
_TOGETHER = 64  # batches of samples of several lengths, which are regrouped by it


@check_arguments
def calibrate(
    data: "str | Path | Source | Dataset[Any]",
    *,
    teachers: Sequence[str],
    activation: Activation = "softmax",
    out: str | Path | None = None,
    samples: int | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    workers: int | None = None,
    seed: int = 0,
    device: str = "auto",
    key_fn: Callable[[int], str | int] | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Fit a temperature to each teacher by the likelihood of the labels (Guo et al. 2017).

    All logits are held in memory: 4 bytes x samples x classes x teachers. Language models are calibrated by the next
    tokens at up to 16 positions of each document.

    Args:
        data: labelled samples, or documents, that the teachers were not trained on: a SOURCE, or a map-style dataset.
        teachers: SPECs.
        activation: what their outputs are logits of: a softmax over the classes, or a sigmoid of each class by itself,
            which may have several labels at once.
        out: JSON file to write for `generate(calibration=...)`; None: none.
        samples: number of samples to draw; None: all.
        batch_size: samples per forward pass.
        precision: of the forward pass.
        workers: decoding processes; None: chosen for the machine.
        seed: of the draw, and of random factories of teachers.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        key_fn: index -> key, for a map-style dataset; None: the decimal index.
        progress: show a bar; None: if standard error is a terminal.

    Raises:
        UsageError: an argument is wrong.
        DataError: there are no labels, or no temperature fits them.
        TeacherError: a teacher's output is not (B, C) finite numbers.
        StoreError: the file cannot be written.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"samples: expected at least 1, found {samples}")
    config = GenerateConfig(
        activation=activation,
        combine="keep",
        temperature=1.0,
        encoding="float32",
        shard_rows=batch_size,
        batch_size=batch_size,
        precision=precision,
        workers=workers,
        seed=seed,
        device=device,
    )
    choose = (
        _choose_samples if any(names_language_model(parse_spec(teacher)) for teacher in teachers) else _choose_labelled
    )
    job = load_job(choose(open_source(data, key_fn=key_fn), samples, seed), teachers, config)
    logits_MNC, labels = _compute_logits(job, progress)
    found = Calibration(
        data=job.labeller.source.name,
        fingerprint=job.run.dataset.fingerprint,
        samples=len(labels),
        activation=activation,
        members=tuple(
            _calibrate_member(job, number, logits_NC, labels) for number, logits_NC in enumerate(logits_MNC.unbind())
        ),
    )
    if out is not None:
        write_calibration(out, found)
    return found


def _choose_labelled(source: Source, samples: int | None, seed: int) -> Source:
    """Choose labelled samples, in order."""
    chosen_N = np.flatnonzero(is_labelled(source.labels()))
    if not len(chosen_N):
        raise DataError(f"{source.name}: expected labelled samples to calibrate on, found none")
    return _draw(source, chosen_N, samples, seed)


def _choose_samples(source: Source, samples: int | None, seed: int) -> Source:
    """Choose documents, in order: the labels of language models are the next tokens."""
    return _draw(source, np.arange(len(source)), samples, seed)


def _draw(source: Source, chosen_N: NDArray[np.int64], samples: int | None, seed: int) -> Source:
    if samples is not None and samples < len(chosen_N):
        chosen_N = np.sort(np.random.default_rng(seed).choice(chosen_N, size=samples, replace=False))
    return source if len(chosen_N) == len(source) else ReorderedSource(source, chosen_N)


def _compute_logits(job: Job, progress: bool | None) -> tuple[Tensor, Tensor]:
    """Return logits float32 (M, N, C), of a softmax up to a constant per row, and labels int64 (N,) or int8 (N, C)."""
    labeller, run = job.labeller, job.run
    spans = (span for number in range(run.shard_count) for span in labeller.spans(run.shard(number)))
    batches = labeller.reader.stream(spans, workers=job.workers)
    logits, labels = [], []
    off = None if progress is None else not progress
    with tqdm(
        total=len(labeller.source), unit=labeller.source.inputs.unit, unit_scale=True, desc="calibrating", disable=off
    ) as bar:
        while window := list(itertools.islice(batches, _TOGETHER if labeller.members.has_buckets else 1)):
            full = [batch for batch in window if batch.keys]
            if isinstance(lane := labeller.lane, TokenLane):
                for found in (found for batch in full for found, _ in lane.sample_positions(batch, _POSITIONS)):
                    known_P = torch.nonzero(found.following >= 0).reshape(-1)
                    logits.append(lane.combine(found.logits).transpose(0, 1).cpu()[:, known_P])
                    labels.append(found.following[known_P])
                full = []
            for batch, scaled in zip(full, labeller.lane.scaled_logits(*full), strict=True):
                logits.append(scaled.transpose(0, 1).cpu())
                sigmoid = run.activation == "sigmoid"
                hard = to_multi_hot(batch.labels, run.num_classes) if sigmoid else batch.labels
                labels.append(torch.from_numpy(hard))
            bar.update(sum(len(batch.keys) + len(batch.bad) for batch in window))
    if not logits:
        raise DataError(f"{labeller.source.name}: none of its {len(labeller.source):,} labelled samples can be decoded")
    return torch.cat(logits, dim=1), torch.cat(labels)


def _calibrate_member(job: Job, number: int, logits_NC: Tensor, labels: Tensor) -> Calibrated:
    member = job.run.members[number]
    try:
        temperature = fit_temperature(logits_NC, labels)
    except DataError as error:
        raise DataError(f"{member.spec} on {job.labeller.source.name}: {error}") from error
    (nll_before, ece_before), (nll_after, ece_after) = (
        _measure_quality(logits_NC, labels, at) for at in (1.0, temperature)
    )
    return Calibrated(
        spec=member.spec,
        sha256=member.sha256,
        preprocessing=member.preprocessing,
        precision=member.precision,
        temperature=temperature,
        nll_before=nll_before,
        nll_after=nll_after,
        ece_before=ece_before,
        ece_after=ece_after,
    )


def _measure_quality(logits_NC: Tensor, labels_N: Tensor, temperature: float) -> tuple[float, float]:
    """Return the mean of -log p(label), and the expected calibration error."""
    if labels_N.dim() == 2:
        known_NC = labels_N >= 0
        z, y = logits_NC[known_NC].double() / temperature, labels_N[known_NC].double()
        return float(F.binary_cross_entropy_with_logits(z, y)), calibration_error(z.sigmoid(), y > 0)
    nats, confidences, correct = 0.0, [], []
    for logits_BC, labels_B in zip(torch.split(logits_NC, CHUNK), torch.split(labels_N, CHUNK), strict=True):
        log_probs_BC = F.log_softmax(logits_BC.double() / temperature, dim=1)
        nats += float(F.nll_loss(log_probs_BC, labels_B, reduction="sum"))
        best = log_probs_BC.max(dim=1)
        confidences.append(best.values.exp())
        correct.append(best.indices == labels_B)
    return nats / len(labels_N), calibration_error(torch.cat(confidences), torch.cat(correct))
