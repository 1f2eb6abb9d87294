"""Stage 1: the teachers label a dataset, once.

plan minus manifest -> label_shards -> write_shard -> commit
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset
from tqdm import tqdm

from softlabel.common.arguments import check_arguments
from softlabel.common.device import Choice, Tuning
from softlabel.common.places import absolute_source, absolute_spec
from softlabel.dataset import Source
from softlabel.engine import BadImagePolicy, LabelledShard
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.generation.deployment import Deployment
from softlabel.history import History, check_same_data, recorded_there
from softlabel.job import Job, prepare
from softlabel.labels.combine import CombineRule
from softlabel.lanes import label_shards
from softlabel.pace import Pace, PaceMeter
from softlabel.preflight import Preflight
from softlabel.preflight import preflight as try_out
from softlabel.store.columns import EXTRA_NAME, Encoding
from softlabel.store.manifest import BadRow, Format, ShardPlan
from softlabel.store.writer import Committer, write_shard
from softlabel.views import view_policy

log = logging.getLogger("softlabel")

# One shard is written while the next is computed and a third waits: more would only hold memory.
WRITES_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """What a call of `generate` did: images, shards, seconds and accuracy of this call's work; totals of the store.

    `pace`: where the time went; None on a cluster, whose workers do not tell.
    """

    path: str
    total_rows: int
    total_bad: int
    total_bytes: int
    shards_written: int
    images: int
    seconds: float
    teacher_accuracy: float | None
    pace: Pace | None = None

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


@check_arguments
def generate(
    data: "str | Path | Source | Dataset[Any]",
    *,
    teachers: Sequence[str],
    out: str | Path,
    combine: CombineRule = "logits",
    weights: Sequence[float] | None = None,
    temperature: float = 4.0,
    format: Format = "parquet",
    shard_rows: int = 16384,
    batch_size: int | Literal["auto"] = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    compile: bool = False,
    stack: Choice = "auto",
    members_in_turn: Choice = "auto",
    workers: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    ignore_labels: bool = False,
    on_bad_image: BadImagePolicy = "skip",
    encoding: Encoding | str = "float16",
    calibration: str | Path | None = None,
    grow: bool = False,
    views: int = 1,
    augment: str = "center",
    device: str = "auto",
    key_fn: Callable[[int], str | int] | None = None,
    deployment: Deployment | None = None,
    preflight: bool = True,
    progress: bool | None = None,
    begin: Callable[[Preflight | None], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> GenerateSummary:
    """Run teachers over a dataset and store their combined soft labels; resumes what an earlier call left unfinished.

    Args:
        data: a SOURCE (see `open_source`), or a map-style dataset of (image, label) or images.
        teachers: one SPEC for each member of the ensemble, such as ``torchvision:resnet50@weights.pth``.
        out: folder of the store.
        combine: ``logits`` averages logits (re-tempers exactly), ``probs`` the softmax at `temperature`, ``keep``
            stores every member, to be mixed later.
        weights: one number a teacher, normalised to sum 1; equal when absent.
        temperature: logits are divided by it before they are stored.
        format: file format of the shards.
        shard_rows: samples a shard; what a kill can cost.
        batch_size: samples a forward pass, always: the last batch is padded to it; ``auto`` finds the fastest. Where
            memory runs out it is halved.
        precision: of the forward pass; bf16 and fp16 use autocast.
        compile: let `torch.compile` have the teachers.
        stack: run members of one architecture as one stacked network; ``auto``: where a timed trial says so.
        members_in_turn: move members to the device one after the other; ``auto``: where they do not fit together.
        workers: processes that decode images; absent: none on a CPU, up to 8 beside a GPU.
        threads: that compute on a CPU; absent: as many as torch takes.
        seed: of the view policy, and of what a teacher's factory draws at random.
        ignore_labels: store no hard labels even if the data has them.
        on_bad_image: ``skip`` lists an image that cannot be decoded in the manifest, ``error`` stops at it.
        encoding: how logits are stored; a name for those without parameters, or an `Encoding`.
        calibration: file of `softlabel calibrate`; each teacher's logits are divided by its temperature in there first.
        grow: label the samples that a store of the smaller dataset lacks; its shards stay as they are.
        views: how many views of each sample are labelled; more than a store has adds those that it lacks.
        augment: what a view is, see `softlabel.views.parse_policy`: ``center`` (the image as it is), ``crop-flip``,
            ``inception``, ``trivial``, ``randaugment``, ``mixup``, ``cutmix``, several joined by ``+``, or a YAML file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        deployment: the Dask cluster whose workers label; absent: this process does.
        preflight: label two batches first, check that the disk has room, and warn of what looks wrong.
        progress: show a bar; absent: if standard error is a terminal.
        begin: called with what preflight found, once the store is open and something is left to do, before the first
            image is labelled.
        options: as JSON takes it: what the caller was given, kept in the manifest under `recorded.options`.

    Returns:
        Counts and times of this call.

    Raises:
        UsageError: a request that cannot be (SpecError, MismatchError: `out` holds another run's store).
        TeacherError: a member's output is not (B, C) finite numbers.
        DataError: a source that cannot be read, or a bad image if `on_bad_image` is ``error``.
        StoreError: the store cannot be written, or would not fit on its disk; what was committed stays and the same
            call resumes.
    """
    if deployment is not None:
        if not isinstance(data, str | Path):
            raise UsageError("data: on a cluster expected a SOURCE that every worker can open, found an object")
        data, teachers = absolute_source(str(data)), [absolute_spec(teacher) for teacher in teachers]
    job = prepare(
        data,
        history=History.of(out, grow=grow, views=views),
        views=view_policy(augment, count=views, seed=seed),
        teachers=teachers,
        combine=combine,
        weights=weights,
        temperature=temperature,
        format=format,
        shard_rows=shard_rows,
        batch_size=batch_size,
        precision=precision,
        tuning=Tuning(threads=threads, compile=compile, stack=stack, members_in_turn=members_in_turn),
        settled=recorded_there(out),
        workers=workers,
        seed=seed,
        ignore_labels=ignore_labels,
        on_bad_image=on_bad_image,
        encoding=encoding,
        calibration=calibration,
        device=device,
        key_fn=key_fn,
    )
    if options is not None:
        job.recorded["options"] = dict(options)
    with Committer.open(out, job.run, job.recorded, grow=bool(job.run.dataset.earlier)) as committer:
        if committer.manifest.recorded.get("derived") and committer.missing():
            raise MismatchError(
                f"{out}: was made from other stores, and teachers can add nothing to it: run the command that began it "
                "again if it is not finished, or label new samples into another folder and merge the two"
            )
        if job.labeller.head is not None:
            committer.add_extra(EXTRA_NAME, job.labeller.head.safetensors())
        label = None if deployment is None else _elsewhere(deployment, out, job, device)

        def ready(missing: Sequence[ShardPlan]) -> Preflight | None:
            found = try_out(job, out, missing, seed=seed) if preflight else None
            if begin is not None:
                begin(found)
            return found

        return label_missing(committer, out, job, progress=progress, begin=ready, label=label)


@dataclass(slots=True)
class Counts:
    """What was labelled: images, shards, rows among them that are good, and where hard labels exist and are hit."""

    images: int = 0
    shards: int = 0
    good: int = 0
    correct: int = 0
    labelled: int = 0
    first_bad: BadRow | None = None


Label = Callable[[Committer, Sequence[ShardPlan], "tqdm[Any]"], Counts]


def label_missing(
    committer: Committer,
    out: str | Path,
    job: Job,
    *,
    progress: bool | None = None,
    begin: Callable[[Sequence[ShardPlan]], Preflight | None] | None = None,
    complement: Callable[[LabelledShard], LabelledShard] | None = None,
    label: Label | None = None,
) -> GenerateSummary:
    """Label and commit the shards that the store lacks, and declare it complete.

    begin: called with what is missing before the first image is labelled. complement: what is added to a shard's rows
    before they are written. label: what labels and commits shards, where it is not this process.

    Raises:
        MismatchError: the data are not those that the store's shards were made from.
        DataError: no image could be labelled, in this call or before.
    """
    run, labeller = committer.run, job.labeller
    missing = committer.missing()
    if committer.resumed:
        check_same_data(out, labeller.intake)
    found = begin(missing) if begin is not None and missing else None
    started = time.perf_counter()
    before = committer.manifest.totals.rows
    rows = sum(plan.stop - plan.start for plan in missing)
    total = run.dataset.rows * run.views.count
    if missing and committer.resumed:
        log.info("%s: %d of %d shards are there", out, run.shard_count - len(missing), run.shard_count)
    counts, meter = Counts(), PaceMeter()
    meter.bare_rate = found.bare_rate if found is not None else None
    if missing:
        with _bar(total, total - rows, progress) as bar:
            counts = (label or _here(out, job, meter, complement))(committer, missing, bar)
    if not before + counts.good:
        first = counts.first_bad
        raise DataError(
            f"{out}: no image could be labelled{f'; the first, {first.key!r}: {first.reason}' if first else ''}"
        )
    if (bad := counts.first_bad) is not None:
        count = counts.images - counts.good
        log.warning(
            "warning: %s: %d of %d images have no row; the first, sample %d, %r: %s",
            out,
            count,
            counts.images,
            bad.index,
            bad.key,
            bad.reason,
        )
    totals = committer.finish().totals
    return GenerateSummary(
        path=str(out),
        total_rows=totals.rows,
        total_bad=totals.bad,
        total_bytes=totals.bytes,
        shards_written=counts.shards,
        images=counts.images,
        seconds=time.perf_counter() - started,
        teacher_accuracy=counts.correct / counts.labelled if counts.labelled else None,
        pace=meter.pace() if label is None else None,
    )


def _here(
    out: str | Path, job: Job, meter: PaceMeter, complement: Callable[[LabelledShard], LabelledShard] | None
) -> Label:
    """This process labels."""

    def label(committer: Committer, missing: Sequence[ShardPlan], bar: "tqdm[Any]") -> Counts:
        counts = Counts()
        shards = label_shards(
            missing, job.labeller, workers=job.workers, meter=meter, seen=lambda images: _show(bar, images, meter)
        )
        with contextlib.closing(shards), _writer(committer, out) as write:
            for shard in shards:
                shard = shard if complement is None else complement(shard)
                with meter.spend("writing"):
                    write(shard)
                counts.images += len(shard.rows.keys) + len(shard.bad)
                counts.good += len(shard.rows.keys)
                counts.first_bad = counts.first_bad or (shard.bad[0] if shard.bad else None)
                counts.correct, counts.labelled = counts.correct + shard.correct, counts.labelled + shard.labelled
                counts.shards += 1
        return counts

    return label


def _elsewhere(deployment: Deployment, out: str | Path, job: Job, device: str) -> Label:
    try:
        from softlabel.cluster import on_cluster
    except ImportError as error:
        raise UsageError(f"generation on a cluster needs Dask ({error}); pip install 'softlabel[dask]'") from None
    return on_cluster(deployment, out, job, device)


@contextlib.contextmanager
def _writer(committer: Committer, out: str | Path) -> Iterator[Callable[[LabelledShard], None]]:
    """Write and commit in the background, few in flight; a failure is raised at the next call or at exit."""
    pending: list[Future[None]] = []

    def publish(shard: LabelledShard) -> None:
        record = write_shard(out, committer.run, shard.plan, shard.rows, shard.bad, fidelity=shard.fidelity)
        committer.commit(record)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabel-writer") as pool:

        def write(shard: LabelledShard) -> None:
            while len(pending) >= WRITES_IN_FLIGHT or (pending and pending[0].done()):
                pending.pop(0).result()
            pending.append(pool.submit(publish, shard))

        yield write
        for future in pending:
            future.result()


def _show(bar: "tqdm[Any]", images: int, meter: PaceMeter) -> None:
    """Images/s and the time left are the bar's own; behind them, what the time goes into."""
    pace = meter.pace()
    bar.set_postfix_str(
        f"data {pace.share('waiting'):.0%}, teachers {pace.share('forward') + pace.share('encoding'):.0%}, "
        f"writing {pace.share('writing'):.0%}",
        refresh=False,
    )
    bar.update(images)


def _bar(total: int, initial: int, progress: bool | None) -> "tqdm[Any]":
    return tqdm(
        total=total,
        initial=initial,
        unit="img",
        unit_scale=True,
        desc="labelling",
        disable=None if progress is None else not progress,
    )
