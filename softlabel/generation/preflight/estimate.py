"""What a run would take and what each encoding would cost, from a short timed sample, before anything is spent.

Legend: R rows of the sample, C classes.
"""

import contextlib
import dataclasses
from dataclasses import dataclass

import torch

from softlabel.errors import UsageError
from softlabel.generation.job import Job
from softlabel.generation.labeller import Lane
from softlabel.generation.preflight.sample import Trial, label_sample
from softlabel.labels.encode import FidelityMeter, encode, encode_hidden
from softlabel.models.head import Head
from softlabel.store.columns import Encoding
from softlabel.store.manifest import Combine, Fidelity

SECONDS = 5.0  # how long the sample is labelled for, warm-up aside
ENCODINGS = ("float32", "float16", "int8", "topk", "sampled", "head")
KEPT = (10, 50)  # classes of the top-k rows that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One encoding: what it is called, bytes a row and in all, and what it loses (`Fidelity`)."""

    name: str
    row_bytes: int
    total_bytes: int
    fidelity: Fidelity


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What labelling would take.

    Attributes:
        rows: samples times views.
        sampled: images that were labelled to find out.
        images_per_second: decoding and every teacher, on the sample.
        seconds: for all rows at that rate.
        bad: images of the sample that cannot be decoded.
        accuracy: of the labels on the sample's labelled images; None without any.
        offers: every encoding, the most exact first.
    """

    rows: int
    sampled: int
    images_per_second: float
    seconds: float
    bad: int
    accuracy: float | None
    offers: tuple[Offer, ...]


def plan(job: Job, *, seconds: float = SECONDS) -> Plan:
    """Label a random sample for a few seconds and measure every encoding on it. Writes nothing.

    Raises:
        DataError: no image of the sample can be decoded.
        TeacherError: see `generate`.
    """
    job, trial = label_sample(job, seconds=seconds, seed=job.config.seed)
    run = job.run
    offers = [
        dataclasses.replace(offer(job, trial, encoding), name=name)
        for name, encoding in _encodings(run.num_classes, run.temperature)
    ]
    if (head := _possible_head(job)) is not None:
        with contextlib.suppress(UsageError):  # of a last layer that does not explain the output
            offers.append(offer(job, trial, head))
    rows, rate = run.dataset.rows * run.views.count, trial.images_per_second(job)
    return Plan(
        rows=rows,
        sampled=len(trial.labels),
        images_per_second=rate,
        seconds=rows / rate,
        bad=len(trial.bad),
        accuracy=trial.accuracy,
        offers=tuple(offers),
    )


def offer(job: Job, trial: Trial, encoding: Encoding) -> Offer:
    """What an encoding costs, measured on a sample of the run.

    Raises:
        UsageError: encoding ``head``, for a teacher whose output is not that of its last layer.
    """
    run = job.run
    meter = FidelityMeter(temperature=run.temperature, encoding=encoding)
    if encoding.name == "head":
        lane = _head_lane(job, encoding)
        assert lane.head is not None
        scaled_logits_BC, hidden_BD = lane.hidden(next(batch for batch in trial.batches if batch.keys))
        weights = (lane.head.weight, lane.head.bias)
        meter.add(scaled_logits_BC, encode_hidden(hidden_BD, encoding), weights)
    else:
        scaled_logits_RC = trial.scaled_logits.reshape(-1, run.num_classes)
        seeds_R = torch.arange(len(scaled_logits_RC))
        meter.add(scaled_logits_RC, encode(scaled_logits_RC, encoding, temperature=run.temperature, seeds_R=seeds_R))
    columns = encoding.columns(
        num_classes=run.num_classes, members=1 if encoding.name == "head" else run.members_stored
    )
    row_bytes = sum(column.row_bytes for column in columns)
    fidelity = meter.result()
    assert fidelity is not None
    rows = run.dataset.rows * run.views.count
    return Offer(name=encoding.name, row_bytes=row_bytes, total_bytes=row_bytes * rows, fidelity=fidelity)


def _encodings(num_classes: int, temperature: float) -> list[tuple[str, Encoding]]:
    declared = tuple(sorted({1.0, temperature}))
    found = [("float32", Encoding(name="float32")), ("float16", Encoding()), ("int8", Encoding(name="int8"))]
    for k in KEPT:
        if k < num_classes:
            found.append((f"topk {k}", Encoding(name="topk", k=k, temperatures=declared)))
            found.append((f"sampled {k}", Encoding(name="sampled", samples=k)))
    return found


def _possible_head(job: Job) -> Encoding | None:
    """The head encoding where there is one teacher and it has a last linear layer."""
    teachers = job.labeller.teachers
    if len(teachers) > 1:
        return None
    try:
        return Encoding(name="head", width=Head.of(teachers[0]).width, hidden="float16")
    except UsageError:
        return None


def _head_lane(job: Job, encoding: Encoding) -> Lane:
    lane = job.labeller.lane
    if job.run.encoding == encoding:
        return lane
    run = dataclasses.replace(job.run, encoding=encoding, combine=Combine(rule="logits", weights=(1.0,)))
    return Lane.of(run, lane.members, batch_size=lane.batch_size)
