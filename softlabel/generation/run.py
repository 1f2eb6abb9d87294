"""An open run: data and teachers are loaded, the store's lease is held, and missing shards can be labelled."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from softlabel.common.places import absolute_source, absolute_spec
from softlabel.dataset import Source
from softlabel.errors import DataError, MismatchError, SoftLabelError, UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.generation.executor import Executor, LocalExecutor
from softlabel.generation.growth import History, check_same_data
from softlabel.generation.job import Job, load_job
from softlabel.generation.optimize import keep_optimization
from softlabel.generation.preflight.check import Preflight, check_run
from softlabel.generation.progress import Pace, Progress
from softlabel.models import LanguageModel
from softlabel.store.manifest_read import find_root
from softlabel.store.storage.open import open_folder
from softlabel.store.writer import Committer

log = logging.getLogger("softlabel")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSummary:
    """Result of `generate`: totals of the store; images, shards, seconds and accuracy of this call.

    `pace` is None on a cluster, whose workers do not report times; `noun` is the plural of a sample of this kind;
    `kept` says whether several members are kept apart: the accuracy is then of the mean of their probabilities.
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
    noun: str = "images"
    kept: bool = False

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class GenerationRun:
    """A store open for writing, with the job that labels its missing shards; create it with `open_run`."""

    def __init__(self, job: Job, committer: Committer, executor: Executor) -> None:
        self.job, self.committer, self.executor = job, committer, executor
        self._bare_rate: float | None = None

    def preflight(self) -> Preflight | None:
        """Label two batches, check the free space, and log suspicious results; None if no shard is missing.

        Raises:
            StoreError, DataError, TeacherError, UsageError: as `check_run`.
        """
        missing = self.committer.missing()
        if not missing:
            return None
        try:
            self.job, found = check_run(self.job, self.committer.url, missing)
        except SoftLabelError:
            self.committer.withdraw()
            raise
        self._bare_rate = found.bare_rate
        return found

    def label(self, *, progress: bool | None = None) -> GenerateSummary:
        """Label and commit the missing shards; see `label_missing`."""
        return label_missing(
            self.job, self.committer, executor=self.executor, progress=progress, bare_rate=self._bare_rate
        )


@contextmanager
def open_run(
    data: "str | Path | Source | Dataset[Any]",
    *,
    teachers: Sequence[str],
    out: str | Path,
    config: GenerateConfig,
    executor: Executor | None = None,
    key_fn: Callable[[int], str | int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[GenerationRun]:
    """Load data and teachers and open or resume the store; arguments and errors as in `generate`."""
    executor = executor or LocalExecutor()
    if not executor.in_process:
        if not isinstance(data, str | Path):
            raise UsageError("data: expected a SOURCE that every cluster worker can open, found an object")
        if config.workers is not None:
            raise UsageError(
                "workers: a cluster's workers decode with threads; give --cluster-workers for their number"
            )
        config = replace(config, workers=0)
        data, teachers = absolute_source(str(data)), [absolute_spec(teacher) for teacher in teachers]
    there = find_root(open_folder(out))
    if there is not None:
        config = keep_optimization(out, config, there.recorded)
    job = load_job(
        data,
        teachers,
        config,
        key_fn=key_fn,
        history=History.of(out, grow=config.grow, views=config.views),
        recorded=None if there is None else there.recorded,
        there=None if there is None else there.run,
    )
    _report_equal_teachers(job)
    if options is not None:
        job.recorded["options"] = dict(options)
    with Committer.open(out, job.run, job.recorded, grow=bool(job.run.dataset.earlier)) as committer:
        if committer.manifest.recorded.get("derived") and committer.missing():
            raise MismatchError(
                f"{out}: made from other stores, so teachers cannot add to it: if it is unfinished, rerun the command "
                "that began it; else label new samples into another folder and merge the two"
            )
        add_extra(job, committer)
        if committer.resumed:
            check_same_data(out, job.labeller.reader)
        yield GenerationRun(job, committer, executor)


def _report_equal_teachers(job: Job) -> None:
    """Warn of a teacher that was given before, perhaps by another path."""
    names = [teacher.spec.text for teacher in job.labeller.teachers]
    members = [(member.sha256, member.preprocessing) for member in job.run.members]
    for place, member in enumerate(members):
        if (first := members.index(member)) < place:
            log.warning(
                "warning: teachers: %s (number %d) has the same weights and inputs as %s (number %d), so that it gives "
                "the same logits; leave it out, or give --weights for a teacher that counts more",
                *(names[place], place + 1, names[first], first + 1),
            )


def add_extra(job: Job, committer: Committer) -> None:
    """Store the teacher's last layer, if the encoding stores its inputs, and the tokenizer of language models."""
    head, name = job.labeller.lane.head, job.run.encoding.extra
    if head is not None and name is not None:
        committer.add_extra(name, head.safetensors())
    model = job.labeller.teachers[0].model
    if isinstance(model, LanguageModel):
        committer.add_extra("tokenizer", model.vocabulary.tokenizer.content, "json")


def label_missing(
    job: Job,
    committer: Committer,
    *,
    executor: Executor | None = None,
    progress: bool | None = None,
    bare_rate: float | None = None,
    name: str | None = None,
) -> GenerateSummary:
    """Label and commit the missing shards of a store, and complete it.

    Args:
        job: the loaded run.
        committer: of the store.
        executor: labels the shards; None: in this process.
        progress: show a bar; None: if standard error is a terminal.
        bare_rate: images/s of the teachers alone, for the summary.
        name: of the store in messages; None: its URL.

    Raises:
        DataError: no sample could be labelled, in this call or before.
    """
    executor = executor or LocalExecutor()
    run, missing, out = committer.run, committer.missing(), name or committer.url
    before = committer.manifest.totals.rows
    left = sum(plan.stop - plan.start for plan in missing)
    total = run.dataset.rows * run.views.count
    if missing and committer.resumed:
        log.info("%s: %d of %d shards exist", out, run.shard_count - len(missing), run.shard_count)
    started, kind = time.perf_counter(), job.labeller.source.inputs
    with Progress(total=total, done=total - left, show=progress if missing else False, unit=kind.unit) as done:
        done.bare_rate = bare_rate
        if missing:
            executor.label(job, committer, missing, done)
    _report_problems(done, out, any_row=bool(before + done.rows))
    totals = committer.finish().totals
    return GenerateSummary(
        path=out,
        total_rows=totals.rows,
        total_bad=totals.bad,
        total_bytes=totals.bytes,
        shards_written=done.shards,
        images=done.images,
        seconds=time.perf_counter() - started,
        teacher_accuracy=done.correct / done.labelled if done.labelled else None,
        pace=done.pace() if executor.in_process else None,
        noun=kind.noun,
        kept=run.members_stored > 1,
    )


def _report_problems(done: Progress, out: str, *, any_row: bool) -> None:
    if done.truncated:
        log.warning(
            "warning: %s: %d of %d texts are longer than a teacher takes and were labelled without the rest; "
            "'?max_length=N' in its SPEC takes more",
            out,
            done.truncated,
            done.images,
        )
    first = done.first_bad
    if not any_row:
        reason = f"; the first, {first.key!r}: {first.reason}" if first else ""
        raise DataError(f"{out}: no sample could be labelled{reason}")
    if first is not None:
        log.warning(
            "warning: %s: %d of %d samples have no row; the first, sample %d, %r: %s",
            out,
            done.images - done.rows,
            done.images,
            first.index,
            first.key,
            first.reason,
        )
