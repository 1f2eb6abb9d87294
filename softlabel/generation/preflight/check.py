"""Label two batches of a run, estimate the time and size of the whole, and report suspicious results."""

import logging
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softlabel.errors import StoreError
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.job import Job
from softlabel.generation.labeller import Labeller
from softlabel.generation.preflight.alignment import Alignment, check_alignment
from softlabel.generation.preflight.diagnose import Diagnosis, compare_names, diagnose
from softlabel.generation.preflight.estimate import ROW_BYTES, Offer, estimate_key_bytes, offer
from softlabel.generation.preflight.precision import compare_precisions
from softlabel.generation.preflight.repeatability import check_repeatable
from softlabel.generation.preflight.sample import label_sample, refuse_equal
from softlabel.generation.token_lane import TokenLane
from softlabel.store.manifest import BadRow, ShardPlan

log = logging.getLogger("softlabel")

_PADDING = 1.5  # ratio of padded to needed forward passes from which the shard size is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Estimates and findings from a sample.

    Attributes:
        images: to label, counting views.
        views: per sample, in the whole store.
        shards: to write.
        classes, teachers: their numbers.
        sampled: images tried.
        bad: images among them that cannot be decoded.
        images_per_second: decoding and all teachers.
        bare_rate: images/s of all teachers on decoded images.
        seconds: estimated, for all images.
        offer: cost of the encoding on the sample.
        store_bytes: still to write, without what compression saves.
        free_bytes: on the file system of the store; None if unknown.
        accuracy: of the soft labels on the sample's labelled images; None if there are none.
        labelled: number of these images.
        diagnoses: of each teacher, if there are labels.
        remarks: further findings about the teachers.
        noun: what the samples are.
        answer: what has a label: a row, or of language models a position.
        alignment: of the labels of language models with the tokens of the data; None of other teachers.
        kept: whether the store keeps several members apart: `accuracy` and `alignment` are of the mean of their
            probabilities.
    """

    images: int
    views: int
    shards: int
    classes: int
    teachers: int
    sampled: int
    bad: tuple[BadRow, ...]
    images_per_second: float
    bare_rate: float
    seconds: float
    offer: Offer
    store_bytes: int
    free_bytes: int | None
    accuracy: float | None
    labelled: int
    diagnoses: tuple[Diagnosis, ...]
    remarks: tuple[str, ...] = ()
    noun: str = "images"
    answer: Literal["row", "position"] = "row"
    alignment: Alignment | None = None
    kept: bool = False

    @property
    def findings(self) -> tuple[str, ...]:
        """All findings, one line each."""
        return self.remarks + tuple(
            f"{one.teacher}: accuracy {one.accuracy:.2f} on {one.images} {self.noun}: {one.finding}"
            for one in self.diagnoses
            if one.finding is not None
        )


def check_run(job: Job, out: str | Path, missing: Sequence[ShardPlan]) -> tuple[Job, Preflight]:
    """Label two batches, check that the missing shards fit on the disk, and log findings as warnings.

    Args:
        job: the loaded run.
        out: the store's folder or URL.
        missing: plans of the missing shards.

    Returns:
        The job with a batch size that fits into memory, and the report.

    Raises:
        StoreError: the disk does not have enough free space.
        DataError: no image of the sample can be decoded, one changes when it is read again, or nearly all are equal.
        TeacherError: a member's output is not (B, C) finite numbers, it is not in evaluation mode, its logits change
            from call to call or with the rest of the batch, or nearly all are equal.
        UsageError: the encoding does not fit the teacher.
    """
    run = job.run
    job, trial = label_sample(job, seed=job.config.seed)
    named = [compare_names(teacher, run.class_names) for teacher in job.labeller.teachers]
    remarks = (
        *check_repeatable(job.labeller, trial),
        *(text for text in named if text is not None),
        *compare_precisions(job.labeller, trial),
    )
    refuse_equal(trial, job.labeller.source.name, run.activation, job.labeller.source.inputs)
    images, lane = sum(plan.stop - plan.start for plan in missing), job.labeller.lane
    found = offer(job, trial, run.encoding)
    of_views = sum(column.row_bytes for column in run.sample_columns)
    # At most: how much smaller Parquet's compression makes keys and views is known only once they are written.
    need = images * (found.row_bytes + of_views + ROW_BYTES + estimate_key_bytes(trial))
    if run.tokens is not None:
        need = found.total_bytes * images // (run.dataset.rows * run.views.count)
    free = free_bytes(out)
    if free is not None and need > free:
        raise StoreError(
            f"{out}: expected {need:,} free bytes ({images:,} rows), found {free:,}; free some space, write to another "
            "disk, or choose a smaller --encoding ('softlabel plan' shows their sizes)"
        )
    rate = trial.images_per_second(job)
    size = job.labeller.batch_size
    passes, fewest = sum(-(-(plan.stop - plan.start) // size) for plan in missing), -(-images // size)
    if passes > _PADDING * fewest and not job.labeller.members.has_buckets:
        remarks = (
            *remarks,
            f"--shard-rows {run.shard_rows}: the last batch of a shard is padded to {size}, so that {passes * size:,} "
            f"pass through the teachers for {images:,}; use a multiple of --batch-size, or a smaller --batch-size",
        )
    typical = next(batch for batch in trial.batches if batch.keys)
    report = Preflight(
        images=images,
        views=run.views.count,
        shards=len(missing),
        classes=run.num_classes,
        teachers=len(run.members),
        sampled=trial.sampled,
        bad=trial.bad,
        images_per_second=rate,
        bare_rate=1 / trial.forward,
        seconds=images / rate + _estimate_filler(job.labeller, missing, typical) * trial.forward,
        offer=found,
        store_bytes=need,
        free_bytes=free,
        accuracy=trial.accuracy,
        labelled=trial.labelled,
        diagnoses=diagnose(job.labeller, trial),
        remarks=remarks,
        noun=job.labeller.source.inputs.noun,
        answer="row" if run.tokens is None else "position",
        alignment=check_alignment(lane, trial.batches) if isinstance(lane, TokenLane) else None,
        kept=run.members_stored > 1,
    )
    for finding in report.findings:
        log.warning("warning: %s", finding)
    return job, report


def _estimate_filler(labeller: Labeller, plans: Sequence[ShardPlan], batch: DecodedBatch) -> float:
    """Estimate the samples that forward passes are filled up with, beyond the plans' own; `batch` is a typical one."""
    size, members = labeller.batch_size, labeller.members
    passes = [math.ceil((plan.stop - plan.start) / size) for plan in plans]
    if not members.has_buckets:
        return (sum(passes) - math.ceil(sum(plan.stop - plan.start for plan in plans) / size)) * len(batch.keys)
    windows = sum(math.ceil(n / labeller.batches_together(plan)) for n, plan in zip(passes, plans, strict=True))
    # Of each length, half a pass; counted in samples of the mean length.
    filler: float = max(
        sum(bucket * labeller.lane.pass_rows(bucket) / 2 for bucket in set(lengths)) / statistics.mean(lengths)
        for transform, inputs in zip(members.transforms, batch.inputs, strict=True)
        if transform.buckets and (lengths := transform.bucket_of(inputs).tolist())
    )
    return windows * filler


def free_bytes(out: str | Path) -> int | None:
    """Return the free bytes of a store's file system; None for a URL."""
    text = os.fspath(out).removeprefix("file://")
    if "://" in text:
        return None
    place = Path(text).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
