"""Estimate the time of a run and the cost of each encoding from a short timed sample.

Legend: R rows of the sample, C classes, D width of the teacher's last hidden layer.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from softlabel.dataset.tokenize import TokenizedSource
from softlabel.errors import UsageError
from softlabel.generation.documents import count_positions
from softlabel.generation.job import Job
from softlabel.generation.labeller import Lane, describe_last_layer
from softlabel.generation.preflight.sample import Trial, label_sample
from softlabel.labels.encodings import encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.encodings import Encoding
from softlabel.store.fidelity import Fidelity
from softlabel.store.manifest import Combine, Run

ROW_BYTES = 24  # a row's label, view, content hash and key offset
SECONDS = 5.0  # duration of the sample, without warm-up


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One encoding: its title, bytes per row and in all, and loss, with the number of rows that it was measured on.

    Of documents, bytes per labelled position, with everything else that a document has, and the loss of a position,
    which is None where the teacher itself gives the most probable tokens alone.
    """

    name: str
    row_bytes: int
    total_bytes: int
    fidelity: Fidelity | None
    measured: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Estimates of a run.

    Attributes:
        rows: samples times views.
        sampled: samples labelled for the estimate.
        images_per_second: decoding and all teachers, on the sample.
        seconds: for all rows at that rate.
        bad: samples tried that cannot be decoded.
        accuracy: of the labels on the labelled ones; of language models of next tokens; None if there are none.
        labelled: number of these samples, or positions.
        offers: every encoding, the most exact first.
        noun: what the samples are.
    """

    rows: int
    sampled: int
    images_per_second: float
    seconds: float
    bad: int
    accuracy: float | None
    labelled: int
    offers: tuple[Offer, ...]
    noun: str = "images"


def plan(job: Job, *, seconds: float = SECONDS) -> Plan:
    """Label a random sample for a few seconds and measure every encoding on it. Writes nothing.

    Raises:
        DataError: no sample that was tried can be decoded.
        TeacherError: as `softlabel.generate`.
    """
    job, trial = label_sample(job, seconds=seconds, seed=job.config.seed)
    run = job.run
    offers = tuple(_iter_offers(job, trial))
    rows, rate = run.dataset.rows * run.views.count, trial.images_per_second(job)
    return Plan(
        rows=rows,
        sampled=len(trial.labels),
        images_per_second=rate,
        seconds=rows / rate,
        bad=len(trial.bad),
        accuracy=trial.accuracy,
        labelled=trial.labelled,
        offers=offers,
        noun=job.labeller.source.inputs.noun,
    )


def offer(job: Job, trial: Trial, encoding: Encoding) -> Offer:
    """Measure the cost of an encoding on a sample of the run.

    Raises:
        UsageError: the encoding stores the hidden layer, but the teacher's output is not that of its last layer.
    """
    run = job.run
    rows = run.dataset.rows * run.views.count
    of_features = sum(column.row_bytes for column in run.feature_columns)
    if not encoding.labels:
        return Offer(
            name=encoding.name, row_bytes=of_features, total_bytes=of_features * rows, fidelity=None, measured=0
        )
    meter = FidelityMeter(temperature=run.temperature, encoding=encoding, activation=run.activation)
    scaled_logits_RC, hidden_RD, head = trial.answers.scaled_logits.reshape(-1, run.num_classes), None, None
    if encoding.from_hidden:
        lane = _make_head_lane(job, encoding)
        assert lane.head is not None
        head, hidden_RD = (lane.head.weight, lane.head.bias), trial.answers.hidden
        if hidden_RD is None:
            scaled_logits_RC, hidden_RD = lane.hidden(next(batch for batch in trial.batches if batch.keys))
        else:
            scaled_logits_RC, hidden_RD = (one.to(head[0].device) for one in (scaled_logits_RC, hidden_RD))
    seeds_R = torch.arange(len(scaled_logits_RC))
    encoded = encode(scaled_logits_RC, encoding, temperature=run.temperature, seeds_R=seeds_R, hidden_RD=hidden_RD)
    is_engine = job.labeller.teachers[0].is_engine
    if not is_engine:
        meter.add(scaled_logits_RC, encoded, head)
    columns = encoding.columns(num_classes=run.num_classes, members=1 if encoding.from_hidden else run.members_stored)
    row_bytes = sum(column.row_bytes for column in columns) + of_features
    fidelity = meter.result()
    assert is_engine or fidelity is not None
    total = row_bytes * rows
    if isinstance(source := job.labeller.source, TokenizedSource) and run.tokens is not None:
        positions = count_positions(source, run.tokens.positions, last=not is_engine) * run.views.count
        tokens = int(source.lengths.sum(dtype=np.int64)) * run.views.count
        beside = {per: sum(one.row_bytes for one in run.columns if one.per == per) for per in ("token", "row")}
        of_rows = beside["row"] + ROW_BYTES + estimate_key_bytes(trial)
        total = row_bytes * positions + beside["token"] * tokens + of_rows * rows
        row_bytes = round(total / max(1, positions))
    return Offer(
        name=encoding.name_for(run.num_classes),
        row_bytes=row_bytes,
        total_bytes=total,
        fidelity=fidelity,
        measured=0 if is_engine else len(scaled_logits_RC) // (1 if encoding.from_hidden else run.members_stored),
    )


def estimate_key_bytes(trial: Trial) -> int:
    """Bytes of a key, of the sample's in the mean."""
    keys = [key for batch in trial.batches for key in batch.keys]
    return -(-sum(len(key.encode()) for key in keys) // len(keys))


def _iter_offers(job: Job, trial: Trial) -> Iterator[Offer]:
    """Yield the cost of every encoding that fits the teachers."""
    run, teachers = job.run, job.labeller.teachers
    calibration = run.members[0].calibration
    if teachers[0].is_engine:
        yield offer(job, trial, run.encoding)
        return
    for kind in Encoding.kinds.values():
        if (kind.from_hidden and (len(teachers) > 1 or _holds_last_input(run))) or (
            run.activation == "sigmoid" and not kind.sigmoid
        ):
            continue
        for encoding in kind.offers(num_classes=run.num_classes, temperature=run.temperature):
            try:
                full = encoding.fit(
                    temperature=run.temperature, layer=lambda: describe_last_layer(teachers[0], calibration)
                )
                yield offer(job, trial, full)
            except UsageError:  # no last linear layer, or its output is not the teacher's
                if not kind.from_hidden:
                    raise


def _holds_last_input(run: Run) -> bool:
    """Whether rows have what enters the last linear layer beside their logits: encoding head is refused there."""
    embedding = None if run.features is None else run.features.embedding
    return embedding is not None and any(tap.side == "input" for tap in embedding.taps)


def _make_head_lane(job: Job, encoding: Encoding) -> Lane:
    lane = job.labeller.lane
    if job.run.encoding == encoding:
        return lane
    run = dataclasses.replace(job.run, encoding=encoding, combine=Combine(rule="logits", weights=(1.0,)))
    return type(lane).of(run, lane.members, batch_size=lane.batch_size)
