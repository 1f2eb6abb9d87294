"""What a run would take and what each encoding would cost, from a short timed sample, before anything is spent.

Legend: R rows of the sample, C classes.
"""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.dataset import IGNORE
from softlabel.encoding import FidelityMeter, encode, encode_hidden
from softlabel.engine import Labeller
from softlabel.errors import DataError, UsageError
from softlabel.head import Head
from softlabel.intake import DecodedBatch
from softlabel.job import Job
from softlabel.store.columns import Encoding
from softlabel.store.manifest import Combine, Fidelity, Run

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


def plan(job: Job, *, seconds: float = SECONDS, seed: int = 0) -> Plan:
    """Label a random sample for a few seconds and measure every encoding on it. Writes nothing.

    Raises:
        DataError: no image of the sample can be decoded.
        TeacherError: see `generate`.
    """
    run, labeller = job.run, job.labeller
    rows = run.dataset.rows * run.views.count
    order_N = np.random.default_rng(seed).permutation(len(labeller.source))
    batches = [order_N[start : start + labeller.batch_size] for start in range(0, len(order_N), labeller.batch_size)]
    _label(labeller, batches[0])  # warms everything up
    scaled: list[Tensor] = []
    labels: list[int] = []
    bad = done = 0
    started = time.perf_counter()
    for indices_B in batches:
        batch, scaled_logits = _label(labeller, indices_B)
        bad, done = bad + len(batch.bad), done + len(indices_B)
        labels += batch.labels.tolist()
        scaled += [] if scaled_logits is None else [scaled_logits]
        if (spent := time.perf_counter() - started) > seconds:
            break
    if not scaled:
        raise DataError(f"{labeller.source.name}: none of the {bad} images of a sample can be decoded")
    all_scaled = torch.cat(scaled)
    mixed_BC = all_scaled.mean(dim=1) if run.kept else all_scaled
    top_B = mixed_BC.argmax(dim=-1).numpy()
    known_B = np.array(labels) != IGNORE
    offers = [
        _offer(name, encoding, run, all_scaled.reshape(-1, run.num_classes), rows)
        for name, encoding in _encodings(run.num_classes, run.temperature)
    ]
    if (head := _head_offer(labeller, batches[0], rows)) is not None:
        offers.append(head)
    return Plan(
        rows=rows,
        sampled=len(mixed_BC),
        images_per_second=done / spent,
        seconds=rows * spent / done,
        bad=bad,
        accuracy=float((top_B == np.array(labels))[known_B].mean()) if known_B.any() else None,
        offers=tuple(offers),
    )


def _label(labeller: Labeller, indices_B: NDArray[np.int64]) -> tuple[DecodedBatch, Tensor | None]:
    batch = labeller.intake.batch(indices_B.tolist())
    return batch, labeller.scaled_logits(batch).cpu() if batch.keys else None


def _encodings(num_classes: int, temperature: float) -> list[tuple[str, Encoding]]:
    declared = tuple(sorted({1.0, temperature}))
    found = [("float32", Encoding(name="float32")), ("float16", Encoding()), ("int8", Encoding(name="int8"))]
    for k in KEPT:
        if k < num_classes:
            found.append((f"topk {k}", Encoding(name="topk", k=k, temperatures=declared)))
            found.append((f"sampled {k}", Encoding(name="sampled", samples=k)))
    return found


def _offer(name: str, encoding: Encoding, run: Run, scaled_logits_RC: Tensor, rows: int) -> Offer:
    seeds_R = torch.arange(len(scaled_logits_RC))
    meter = FidelityMeter(temperature=run.temperature, encoding=encoding)
    meter.add(scaled_logits_RC, encode(scaled_logits_RC, encoding, temperature=run.temperature, seeds_R=seeds_R))
    columns = encoding.columns(num_classes=run.num_classes, members=run.members_stored)
    return _priced(name, sum(column.row_bytes for column in columns), rows, meter)


def _head_offer(labeller: Labeller, indices_B: NDArray[np.int64], rows: int) -> Offer | None:
    """The head encoding where the teacher has a head that is smaller than its logits."""
    run = labeller.run
    batch = labeller.intake.batch(indices_B.tolist())
    if len(labeller.teachers) > 1 or not batch.keys:
        return None
    try:
        head = Head.of(labeller.teachers[0], run.members[0].calibration)
        encoding = Encoding(name="head", width=head.width, hidden="float16")
        asked = Labeller(
            labeller.source,
            labeller.teachers,
            dataclasses.replace(run, encoding=encoding, combine=Combine(rule="logits", weights=(1.0,))),
            batch_size=labeller.batch_size,
        )
        scaled_logits_BC, hidden_BD = asked.hidden(batch)
    except UsageError:  # no head, or not one that explains the output
        return None
    meter = FidelityMeter(temperature=run.temperature, encoding=encoding)
    meter.add(scaled_logits_BC, encode_hidden(hidden_BD, encoding), (head.weight, head.bias))
    row_bytes = sum(column.row_bytes for column in encoding.columns(num_classes=run.num_classes))
    return _priced("head", row_bytes, rows, meter)


def _priced(name: str, row_bytes: int, rows: int, meter: FidelityMeter) -> Offer:
    fidelity = meter.result()
    assert fidelity is not None
    return Offer(name=name, row_bytes=row_bytes, total_bytes=row_bytes * rows, fidelity=fidelity)
