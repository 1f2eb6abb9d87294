"""A run: label the shards that a store lacks and commit each, with a bar, and say what came of it."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from softlabel.errors import DataError
from softlabel.generation.growth import check_same_data
from softlabel.generation.job import Job
from softlabel.generation.labeller import LabelledShard
from softlabel.generation.pipeline import label_shards
from softlabel.generation.preflight.check import Preflight
from softlabel.generation.timing import Pace, PaceMeter
from softlabel.store.manifest import BadRow, ShardPlan
from softlabel.store.writer import Committer, write_shard

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
