"""Students of runs against the teacher of a store, on the data that was labelled and on held-out data."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from softlabel.common.arguments import check_arguments
from softlabel.common.device import resolve_device
from softlabel.dataset import Source, open_source, report_source, require_samples
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.evaluation.network import build_network, compute_logits, evaluating, spec_of
from softlabel.inputs.base import InputTransform
from softlabel.loader import SoftLabelLoader
from softlabel.models import read_run
from softlabel.models.precision import Precision
from softlabel.report.about import list_options
from softlabel.report.comparison import ComparisonMeter, Teacher
from softlabel.report.probabilities import LabelReader
from softlabel.report.runs import Run, describe_runs, find_unfinished, make_grid, read_runs
from softlabel.report.student_figures import Comparison, Students
from softlabel.report.training_data import ReadSamples, SourceHashes, count_trained
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.views import Views


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Data on which students are compared.

    Attributes:
        source: the data.
        store: the teacher's labels of it; None where there are none that could be compared.
        is_eval: whether it is evaluation data.
        hashes: of its samples, which all students share.
        sources, stores: all that are open, one of which a student may have been trained with.
    """

    source: Source
    store: Store | None
    is_eval: bool
    hashes: SourceHashes
    sources: Sequence[Source]
    stores: Sequence[Store]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Student:
    run: Run
    model: nn.Module
    preprocessing: InputTransform
    classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How the students are run."""

    batch_size: int
    precision: Precision
    device: torch.device
    workers: int
    progress: bool | None


@check_arguments
def compare_students(
    runs: Sequence[str | Path],
    store: str | Path | Store | None = None,
    data: "str | Path | Source | Dataset[Any] | None" = None,
    *,
    eval_data: "str | Path | Source | Dataset[Any] | None" = None,
    eval_labels: str | Path | Store | None = None,
    batch_size: int = 256,
    precision: Precision = "fp32",
    device: str = "auto",
    workers: int = 0,
    progress: bool | None = None,
) -> Students:
    """Describe runs, and compare their students with the teacher sample by sample.

    Of a store of views students see view 0, as the teacher did. Samples without a row count for the student's own
    accuracy alone, those without a hard label for agreement and divergence alone.

    Args:
        runs: folders of `softlabel train`; the folder of several students stands for all of them.
        store: the teacher's labels.
        data: the SOURCE that was labelled; None compares on `eval_data` alone.
        eval_data: a SOURCE that the students were not trained on.
        eval_labels: a store of the teacher's labels of `eval_data`; without it only the students are measured there.
        batch_size: samples a forward pass.
        precision: fp32, bf16 or fp16 (autocast), of the students.
        device: auto, cpu, cuda or cuda:N.
        workers: processes that decode.
        progress: show bars; None: if standard error is a terminal.

    Returns:
        The section; its comparisons go run by run, the labelled data first.

    Raises:
        UsageError: a folder is not there, or `eval_labels` has no data (MismatchError: students, data and labels are of
            other classes; SpecError: a student cannot be built).
        DataError: a folder holds no run, or the data has no sample that the store has labels for.
        StoreError: a store cannot be read.
    """
    if eval_labels is not None and eval_data is None:
        raise UsageError("--eval-labels: labels of held-out data need that data; give --eval-data SOURCE")
    found = read_runs(runs)
    grid, grid_notes = make_grid(found)
    notes = [*find_unfinished(found), *grid_notes]
    how = _How(
        batch_size=batch_size,
        precision=precision,
        device=resolve_device(device),
        workers=workers,
        progress=progress,
    )
    finished = [run for run in found if run.is_finished]
    compared: list[tuple[int, Comparison]] = []
    for part in _list_parts(finished, store, data, eval_data, eval_labels, notes):
        compared += _compare_on(part, finished, how, notes)
    if data is None and eval_data is None and finished:
        notes.append(_write_report_command(finished, [os.fspath(run) for run in runs]))
    return Students(
        runs=describe_runs(found),
        comparisons=tuple(one for _, one in sorted(compared, key=lambda pair: pair[0])),
        grid=grid,
        notes=tuple(dict.fromkeys(notes)),
    )


def _list_parts(
    runs: Sequence[Run],
    store: str | Path | Store | None,
    data: Any,
    eval_data: Any,
    eval_labels: str | Path | Store | None,
    notes: list[str],
) -> Iterator[_Part]:
    """What there is to compare on; adds to `notes` what cannot be compared."""
    if not runs:
        return
    opened, opened_eval = (
        one if one is None or isinstance(one, Store) else open_store(one) for one in (store, eval_labels)
    )
    stores = tuple(one for one in (opened, opened_eval) if one is not None)
    for one in stores:
        one.require_labels("report")
    sources: list[Source] = []
    for given, labels, is_eval in ((data, opened, False), (eval_data, opened_eval, True)):
        if given is None:
            continue
        source = open_source(given)
        require_samples(source)
        if source is not given:
            report_source(source)
        sources.append(source)
        outputs = {read_run(run.folder).activation for run in runs}
        if source.label_width is not None or "sigmoid" in outputs | {one.run.activation for one in (labels,) if one}:
            notes.append(_refuse_sigmoid(source, labels, runs))
            continue
        if labels is not None and labels.run.encoding.drawn:
            notes.append(
                f"{labels.url} holds classes drawn from the teacher, which do not determine its most probable one: the "
                "students are measured alone; generate with another --encoding to compare them"
            )
            labels = None
        elif labels is None and is_eval:
            notes.append(write_generate_command(source, opened))
        elif labels is None:
            notes.append(
                f"without a store the students are measured on {source.name} alone, and not against their teacher; "
                "give the store that they were trained with"
            )
        if labels is not None:
            notes += _describe_limits(labels, opened if is_eval else None)
        yield _Part(
            source=source,
            store=labels,
            is_eval=is_eval,
            hashes=SourceHashes(source, labels),
            sources=tuple(sources),
            stores=stores,
        )


def _describe_limits(store: Store, of: Store | None) -> list[str]:
    """What to know about figures that are from the labels of a store; `of` is the store that is reported on."""
    notes, run = [], store.run
    if run.view_columns:
        mixed = ", which has no hard label where two samples are mixed" if Views.mixes(run) else ""
        notes.append(
            f"{store.url} holds labels of views: students and teacher are compared on view 0 of each sample{mixed}"
        )
    if run.encoding.sparse:
        notes.append(
            f"{store.url} holds the teacher's largest classes alone: what it left out counts as spread evenly over the "
            "other classes"
        )
    if (judged := LabelReader(store).judged) != 1:
        notes.append(
            f"{store.url} determines the teacher's probabilities at T = {judged:g} alone: p(label) of both is at that "
            "temperature, and the teacher has no calibration curve"
        )
    return notes if of is None else [*notes, *describe_other_teachers(store, of)]


def describe_other_teachers(labels: Store, of: Store) -> list[str]:
    """A note where labels of held-out data are by other teachers than those of the store that is reported on."""
    if [one.sha256 for one in of.run.members] == [one.sha256 for one in labels.run.members]:
        return []
    return [f"the labels of held-out data, {labels.url}, are by other teachers than {of.url}"]


def _refuse_sigmoid(source: Source, store: Store | None, runs: Sequence[Run]) -> str:
    labels = [] if store is None else ["--labels", store.url]
    words = ["softlabel", "evaluate", "--data", source.name, *labels, "--model", str(runs[0].folder)]
    return (
        "independent outputs have no single right class to compare students by; mAP, F1, agreement and divergence of "
        f"one: {shlex.join(words)}"
    )


def write_generate_command(source: Source, store: Store | None) -> str:
    """How the teacher's labels of held-out data are made."""
    head = f"the teacher's answers to {source.name} are not known, so that the students are measured there alone"
    if store is None:
        return f"{head}; label it with 'softlabel generate' and give the store as --eval-labels"
    if store.manifest.recorded.get("derived"):
        return (
            f"{head}; {store.url} was made from other stores: make one of {source.name} in the same way and give it as "
            "--eval-labels"
        )
    out = f"{store.url.rstrip('/')}-eval"
    words = ["softlabel", "generate", "--data", source.name, *list_options(store), "--out", out]
    return f"{head}; give --eval-labels {shlex.quote(out)} after: {shlex.join(words)}"


def _write_report_command(finished: Sequence[Run], folders: Sequence[str]) -> str:
    """How students are compared with the teacher that they were trained with."""
    head = "the students are not compared with their teacher sample by sample, which needs the data"
    places = {(run.setting("labels"), run.setting("data")) for run in finished}
    labels, data = next(iter(places)) if len(places) == 1 else (None, None)
    labels, data = (one if isinstance(one, str) else place for one, place in ((labels, "STORE"), (data, "SOURCE")))
    return f"{head}: {shlex.join(['softlabel', 'report', labels, '--runs', *folders, '--data', data])}"


def _compare_on(part: _Part, runs: Sequence[Run], how: _How, notes: list[str]) -> list[tuple[int, Comparison]]:
    """Comparisons on some data, each with the number of its run."""
    students = [_build_student(run, part, how) for run in runs]
    found: list[tuple[int, Comparison]] = []
    # Students that take samples in the same shape share one pass over the data.
    groups: dict[Any, list[int]] = {}
    for number, student in enumerate(students):
        groups.setdefault(student.preprocessing.shape, []).append(number)
    for members in groups.values():
        compared = _run_pass(part, [students[number] for number in members], how, notes)
        found += zip(members, compared, strict=True)
    return found


def _build_student(run: Run, part: _Part, how: _How) -> _Student:
    classes = read_run(run.folder).num_classes
    if part.store is not None and classes != part.store.run.num_classes:
        raise MismatchError(
            f"{run.folder}: the student has {classes} classes, {part.store.url} has {part.store.run.num_classes}; "
            "report on runs that were trained with this store"
        )
    model, preprocessing = build_network(spec_of(run.folder), part.source.inputs.name, how.precision)
    return _Student(run=run, model=model.to(how.device), preprocessing=preprocessing, classes=classes)


def _run_pass(part: _Part, students: Sequence[_Student], how: _How, notes: list[str]) -> list[Comparison]:
    loader = SoftLabelLoader(
        part.source,
        part.store,
        batch_size=how.batch_size,
        shuffle=False,
        preprocessing=students[0].preprocessing,
        missing="hard-only",
        workers=how.workers,
        cache_mb=0,
        pin_memory=how.device.type == "cuda",
    )
    teacher = None if part.store is None else Teacher(part.store)
    meters = [
        ComparisonMeter(
            student.classes,
            temperature=None if teacher is None else teacher.temperature,
            judged=1.0 if teacher is None else teacher.judged,
        )
        for student in students
    ]
    with contextlib.closing(loader), evaluating(*(student.model for student in students)), torch.inference_mode():
        hidden = None if how.progress is None else not how.progress
        for batch in tqdm(loader, desc="comparing", unit="batch", disable=hidden):
            batch = batch.to(how.device, non_blocking=True)
            answers = None if teacher is None else teacher.answer(batch, how.device)
            for student, meter in zip(students, meters, strict=True):
                logits_BC = compute_logits(
                    student.model,
                    batch,
                    preprocessing=student.preprocessing,
                    device=how.device,
                    precision=how.precision,
                    source=part.source,
                )
                try:
                    meter.add(logits_BC, batch, answers)
                except MismatchError as error:
                    raise MismatchError(f"{student.run.folder}: {error}; give data of its classes") from None
        _report_missing(part, meters[0], loader, notes)
        for student, meter in zip(students, meters, strict=True):
            if meter.non_finite:
                notes.append(
                    f"{student.run.folder} answers {meter.non_finite:,} of {meter.samples:,} samples of "
                    f"{part.source.name} with numbers that are not finite; its figures there are left out: train it "
                    "again with --overwrite"
                )
        samples = ReadSamples(part.hashes, loader.dataset.samples)
        return [
            meter.result(
                run=os.fspath(student.run.folder),
                data=part.source.name,
                overlap=count_trained(student.run.folder, samples, stores=part.stores, sources=part.sources),
                of_eval_data=part.is_eval,
                keys=loader.dataset.keys,
            )
            for student, meter in zip(students, meters, strict=True)
        ]


def _report_missing(part: _Part, meter: ComparisonMeter, loader: SoftLabelLoader, notes: list[str]) -> None:
    if part.store is None:
        return
    if not meter.with_teacher:
        raise DataError(
            f"{part.source.name}: none of its {meter.samples:,} samples has a row in {part.store.url}; give the data "
            "that it was made from"
        )
    if meter.teacher_non_finite:
        notes.append(
            f"{meter.teacher_non_finite:,} rows of {part.store.url} hold numbers that are not finite; students are not "
            f"compared with them: 'softlabel verify {part.store.url}' names them"
        )
    if without := meter.samples - meter.with_teacher:
        notes.append(
            f"{without:,} of {meter.samples:,} samples of {part.source.name} have no row in {part.store.url} and count "
            "for the accuracy of students alone"
        )
    if loader.dataset.skipped_bad:
        notes.append(f"{loader.dataset.skipped_bad:,} unreadable samples of {part.source.name} are left out")
