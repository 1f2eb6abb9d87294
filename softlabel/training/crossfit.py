"""Cross-fitting: labels of every sample by a teacher that was not trained on it.

OUT.folds/teacher-K     the run folder of the teacher that was trained without fold K
OUT.folds/labels-K      its labels of fold K, until OUT is complete
OUT.folds/crossfit.json the settings that all folds share
OUT                     the labels of all folds, in the order of the data
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.common.spec import parse_spec
from softlabel.convert.merge_folds import merge_folds
from softlabel.dataset import Source
from softlabel.generation.config import GenerateConfig
from softlabel.generation.run import open_run
from softlabel.models.runs import read_run
from softlabel.store.encodings import Encoding
from softlabel.store.manifest import Format
from softlabel.store.manifest_read import load_root
from softlabel.store.storage.open import open_folder
from softlabel.training import run_folder
from softlabel.training.config import TrainConfig
from softlabel.training.fold_plan import (
    FOLDS,
    SETTINGS,
    TRAINING,
    FoldPlan,
    check_labelling,
    check_out,
    describe_dataset,
    describe_identity,
    find_encoding,
    hold_folder,
    make_plan,
)
from softlabel.training.train import train

log = logging.getLogger("softlabel")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSummary:
    """A fold: `trained_on` of the other folds' samples have a hard label; `accuracy` of its labels where a hard label
    exists, None if this call did not compute all of them."""

    trained_on: int
    labelled: int
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossfitSummary:
    """Result of `crossfit`; `folds` is empty if the store was complete already."""

    path: str
    folds: tuple[FoldSummary, ...]
    total_rows: int
    total_bad: int
    total_bytes: int
    teachers: str
    seconds: float


@check_arguments
def crossfit(
    data: "str | Path | Source | Dataset[Any]",
    *,
    student: str,
    out: str | Path,
    folds: int = 4,
    temperature: float = 4.0,
    encoding: Encoding | str = "float16",
    format: Format = "parquet",
    shard_rows: int = 16384,
    keep_folds: bool = False,
    key_fn: Callable[[int], str | int] | None = None,
    options: Mapping[str, Any] | None = None,
    **training: Any,
) -> CrossfitSummary:
    """Train a teacher without each fold of the data in turn, and store its labels of that fold: none of a sample that
    it was trained on. The same call resumes an interrupted one.

    A sample's fold is a hash of its key and the seed. Samples without a hard label are labelled with their fold, and no
    teacher is trained on them.

    Args:
        data: a SOURCE with hard labels, or a map-style dataset.
        student: the SPEC of the network; each teacher starts from the same weights.
        out: folder of the store, not a URL; the folds lie beside it in ``OUT.folds``.
        folds: how many teachers.
        temperature: logits are divided by it before they are stored.
        encoding: an `Encoding`, or the name of one without parameters; one that stores logits.
        format: file format of the shards.
        shard_rows: samples per shard.
        keep_folds: keep the stores of single folds; they are removed once the whole store is complete.
        key_fn: index -> key, for a map-style dataset.
        options: JSON values to keep in the manifest under `recorded.options`.
        **training: of `TrainConfig`: epochs, batch_size, lr, augment, seed, device and others.

    Raises:
        UsageError: an argument is wrong, or does not fit what was begun in `out` (MismatchError).
        DataError: too few samples, or an image that cannot be read.
        StoreError, TeacherError, TrainingError: as `train` and `generate`.
    """
    started = time.perf_counter()
    plan = make_plan(data, student, str(out), folds, key_fn, training)
    how = check_labelling(
        plan.config,
        encoding=encoding,
        there=find_encoding(plan),
        temperature=temperature,
        format=format,
        shard_rows=shard_rows,
    )
    identity = describe_identity(plan, how)
    totals = check_out(plan.out, identity)
    done: list[FoldSummary] = []
    if totals is None:
        hold_folder(plan.folder, identity)
        done = [_run_fold(plan, number, how) for number in range(1, folds + 1)]
        log.info("merging %d folds", folds)
        merge_folds(
            [plan.labels(number) for number in range(1, folds + 1)],
            plan.out,
            folds_N=plan.assigned,
            dataset=describe_dataset(plan.source),
            spec=f"crossfit:{folds}:{parse_spec(student).identity}",
            recorded={
                "data": plan.source.name,
                "teachers": [plan.teacher(number) for number in range(1, folds + 1)],
                FOLDS: folds,
                SETTINGS: identity,
            },
            progress=plan.config.progress,
            options=options,
        )
        totals = load_root(open_folder(plan.out)).totals
    if not keep_folds:
        for number in range(1, folds + 1):
            shutil.rmtree(plan.labels(number), ignore_errors=True)
    return CrossfitSummary(
        path=plan.out,
        folds=tuple(done),
        total_rows=totals.rows,
        total_bad=totals.bad,
        total_bytes=totals.bytes,
        teachers=str(plan.folder),
        seconds=time.perf_counter() - started,
    )


def _run_fold(plan: FoldPlan, number: int, how: GenerateConfig) -> FoldSummary:
    """Train the teacher without a fold and label the fold, as far as that was not done before."""
    named = f"fold {number} of {plan.folds}"
    others, own = plan.choose(number, outside=True), plan.choose(number, outside=False)
    folder = plan.folder / f"teacher-{number}"
    if run_folder.is_finished(folder):
        log.info("%s: the teacher is trained already", named)
    else:
        log.info("%s: training %s on %s samples", named, plan.student.student, f"{len(others):,}")
    settings = {name: getattr(plan.config, name) for name in TRAINING}
    with _only_warnings():
        train(
            TrainConfig(data=others.name, student=plan.student.student, out=str(folder), **settings),
            data=others,
        )
    log.info("%s: labelling %s samples", named, f"{len(own):,}")
    config = replace(how, activation=read_run(folder).activation)
    with (
        _only_warnings(),
        open_run(own, teachers=[plan.teacher(number)], out=plan.labels(number), config=config) as run,
    ):
        run.preflight()
        found = run.label(progress=plan.config.progress)
    whole = found.images == len(own)
    return FoldSummary(
        trained_on=len(others), labelled=found.total_rows, accuracy=found.teacher_accuracy if whole else None
    )


@contextlib.contextmanager
def _only_warnings() -> Iterator[None]:
    """Leave out what `train` and `generate` report about single folds, except warnings."""

    def select(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO

    log.addFilter(select)
    try:
        yield
    finally:
        log.removeFilter(select)
