"""`train`: bring data, labels and students together, run or resume, and leave run folders that are SPECs."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from softlabel.common.device import decoders
from softlabel.dataset import Source, open_source, require_samples
from softlabel.errors import TrainingError, UsageError
from softlabel.models.precision import Precision
from softlabel.store.open import open_store
from softlabel.training import run_folder
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.epoch_loop import Pass, Review, closing_loader
from softlabel.training.grid import StudentConfig, students_of
from softlabel.training.metrics import read_csv
from softlabel.training.row_task import RowTask
from softlabel.training.student import Student
from softlabel.training.summary import StudentResult, TrainResult, announce, write_summary
from softlabel.training.task import Task
from softlabel.training.token_task import TokenTask, are_language_models

log = logging.getLogger("softlabel")

VIEWS = "views of the store"  # what a run's identity calls the number that it uses


def train(
    config: TrainConfig,
    *,
    data: "Source | Dataset[Any] | None" = None,
    eval_data: "Source | Dataset[Any] | None" = None,
    key_fn: Callable[[int], str | int] | None = None,
) -> TrainResult:
    """Train a student, or several in one pass, or go on with what is in `config.out` if it was interrupted.

    Ctrl-C and SIGTERM write a checkpoint after the step that is running, and raise KeyboardInterrupt. Processes that
    `torchrun` has started train together, and so do those of a process group that exists already.

    Args:
        config: see `TrainConfig`.
        data: used instead of opening `config.data`.
        eval_data: used instead of opening `config.eval_data`.
        key_fn: index -> key, for a map-style dataset given as `data`.

    Raises:
        UsageError: settings that make no sense (MismatchError: `out` holds another run; the student's classes are not
            the store's).
        MissingKeyError: samples without soft labels, see `config.missing`.
        DataError, StoreError: data or labels cannot be used.
        TrainingError: no student's loss is finite any more, the run folder cannot be written to, or another process of
            the run has ended.
    """
    started = time.perf_counter()
    with Ranks(config.device) as ranks:
        source = open_source(config.data if data is None else data, key_fn=key_fn, ignore_labels=config.ignore_labels)
        results = _train(config, students_of(config), ranks, source, eval_data)
        # Nobody leaves before everything is written: the others read it.
        ranks.first(lambda: None)
    if all(result.failure is not None for result in results):
        raise TrainingError(str(results[0].failure))
    return TrainResult(out=config.out, students=tuple(results), seconds=time.perf_counter() - started)


def train_together(config: TrainConfig, students: Sequence[StudentConfig], review: Review) -> list[StudentResult]:
    """Train given students in one pass, or go on with it, in one process.

    Args:
        config: what they share.
        students: several, each with a folder of its own in `config.out`.
        review: see `Pass`.

    Returns:
        What became of each, in their order; `failure` says why `review` ended one.

    Raises:
        As `train`, but for students without a finite loss.
    """
    with Ranks(config.device) as ranks:
        return _train(config, students, ranks, open_source(config.data), None, review)


def _train(
    config: TrainConfig,
    configs: Sequence[StudentConfig],
    ranks: Ranks,
    source: Source,
    eval_data: "Source | Dataset[Any] | None",
    review: Review | None = None,
) -> list[StudentResult]:
    precision = _precision(config, ranks.device)
    require_samples(source)
    store = open_store(config.labels) if config.labels is not None else None
    make = TokenTask if are_language_models(configs) else RowTask
    task: Task = make(config, configs, source, store, precision, report=ranks.is_first)
    shared = task.identity()
    views = ranks.first(lambda: _choose_views(config, configs, task.count_views()))
    shared |= {} if views is None else {VIEWS: views}
    with contextlib.ExitStack() as held:
        standing = ranks.first(lambda: _hold(held, config, configs, shared))
        chosen = [number for number, found in enumerate(standing) if found is None]
        students: dict[int, Student] = {}
        before: dict[int, int] = {}
        if chosen:
            workers = 0 if config.cache == "device" else decoders(config.workers, ranks.device)
            loader = task.open_loader(ranks, workers, views)
            for number in chosen:
                student = task.make_student(number, ranks=ranks, temperature=loader.temperature, steps=len(loader))
                student.resume()
                students[number], before[number] = student, student.epoch
                ranks.first(functools.partial(_require_kept, config, student.folder, student.epoch))
            with (
                closing_loader(loader, ranks),
                task.open_eval_loader(eval_data, ranks, workers) as eval_loader,
            ):
                going = Pass(config, ranks, task, loader, eval_loader, list(students.values()), review)
                if ranks.is_first:
                    announce(ranks, task, loader, list(students.values()))
                going.run()
        results = []
        for number, (student_config, found) in enumerate(zip(configs, standing, strict=True)):
            results.append(found or _result(student_config, students[number], before[number]))
        if len(results) > 1 and ranks.is_first:
            write_summary(Path(config.out), results)
    return results


def _hold(
    held: contextlib.ExitStack, config: TrainConfig, configs: Sequence[StudentConfig], shared: Mapping[str, Any]
) -> list[StudentResult | None]:
    """Hold every student's folder for this run; the results of those that need no more training."""
    if len(configs) > 1:
        names = {one.name: one.identity() for one in configs}
        held.enter_context(run_folder.hold_students(Path(config.out), names, asdict(config)))
    standing: list[StudentResult | None] = []
    for student in configs:
        folder = Path(student.out)
        # The file that makes this student by itself.
        one = asdict(config) | {"out": student.out}
        one |= student.list_options() | {"stack": "off"} if len(configs) > 1 else {}
        identity = {**student.identity(), **shared}
        if not config.overwrite and run_folder.is_finished(folder) and (before := run_folder.recorded_identity(folder)):
            identity |= {VIEWS: before[VIEWS]} if VIEWS in before else {}  # its epochs are over
        held.enter_context(run_folder.run_folder(folder, identity=identity, config=one, overwrite=config.overwrite))
        failure = run_folder.read_failure(folder)
        if run_folder.is_finished(folder):
            log.info("%s: finished already; --overwrite trains it again", folder)
            history = tuple(read_csv(folder / run_folder.METRICS))
            _require_kept(config, folder, len(history))
            standing.append(StudentResult(name=student.name, out=student.out, history=history, already_done=True))
        elif failure is not None and len(configs) > 1:
            log.info("%s: given up before (%s); remove its %s to try again", folder, failure, run_folder.FAILED)
            history = tuple(read_csv(folder / run_folder.METRICS))
            standing.append(StudentResult(name=student.name, out=student.out, history=history, failure=failure))
        else:
            standing.append(None)
    return standing


def _require_kept(config: TrainConfig, folder: Path, done: int) -> None:
    run_folder.require_kept(folder, config.keep_epochs or [], done)


def _result(config: StudentConfig, student: Student, before: int) -> StudentResult:
    return StudentResult(
        name=config.name,
        out=config.out,
        history=tuple(student.history),
        resumed_from=before,
        failure=student.failure,
    )


def _precision(config: TrainConfig, device: torch.device) -> Precision:
    if config.precision == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if config.precision == "fp16" and device.type != "cuda":
        raise UsageError("precision: fp16 trains on CUDA only; use bf16 or fp32 on the CPU")
    return config.precision


def _choose_views(config: TrainConfig, configs: Sequence[StudentConfig], there: int | None) -> int | None:
    """How many views of the store this pass uses, None where its rows are no views: as many as its runs began with,
    though the store may have got more since, by which epoch e would be of another one."""
    if there is None:
        return None
    folders = [] if config.overwrite else [Path(student.out) for student in configs]
    begun = [run_folder.recorded_identity(folder) for folder in folders if not run_folder.is_finished(folder)]
    recorded: list[int] = [found[VIEWS] for found in begun if isinstance(found.get(VIEWS), int)]
    return min([*recorded, there])
