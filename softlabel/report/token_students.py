"""Students that are language models against the teacher of a store, on its documents and on held-out ones.

Legend: N documents, B lines, P positions that count.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from softlabel.common.device import resolve_device
from softlabel.dataset import Source, open_source, require_samples
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.language import (
    TokenEvaluation,
    check_vocabulary,
    choose_length,
    measure_on_documents,
    tokenize_for,
)
from softlabel.evaluation.network import build_network, spec_of
from softlabel.inputs.tokens import TOKENS, TokenTransform
from softlabel.loader.token_batch import TokenBatch
from softlabel.models import LanguageModel, read_run
from softlabel.models.precision import Precision
from softlabel.report.document_figures import TokenComparison, TokenStudents
from softlabel.report.runs import Run, describe_runs, find_unfinished, make_grid, read_runs
from softlabel.report.shortlist import Shortlist
from softlabel.report.store_pass import choose_samples
from softlabel.report.stored_documents import StoredDocuments
from softlabel.report.students import describe_other_teachers, write_generate_command
from softlabel.report.training_data import Overlap, ReadSamples, SourceHashes, count_trained
from softlabel.store.open import open_store
from softlabel.store.reader import Store

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
MOST_POSITIONS = 1 << 20  # of the labelled documents, on which students are measured
FURTHEST = 6  # documents of each student
COLOURED = 3  # students by whose divergence tokens are coloured
_LINE_TOKENS = 32  # of a sample that the batch size counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Divergences:
    """A student's KL(teacher || student) on documents of the store.

    Attributes:
        run: folder of the student.
        rows: of the documents with the highest mean, int64, the highest first; scores: these means.
        by_row: row -> by position of the document, float64 (L,), NaN where it is not known.
    """

    run: str
    rows: I64
    scores: F64
    by_row: Mapping[int, F64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModels:
    """The section of the page, and what its documents are coloured by."""

    students: TokenStudents
    divergences: tuple[Divergences, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Student:
    run: Run
    name: str
    model: LanguageModel
    transform: TokenTransform


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    batch_tokens: int
    precision: Precision
    device: torch.device
    workers: int
    progress: bool | None

    def measure(
        self, student: _Student, documents: Source, store: Store | None, observe: Any = None
    ) -> TokenEvaluation:
        return measure_on_documents(
            student.name,
            student.model,
            documents,
            store,
            batch_tokens=self.batch_tokens,
            precision=self.precision,
            device=self.device,
            workers=self.workers,
            missing="hard-only",
            progress=self.progress,
            observe=observe,
        )


def are_language_models(runs: Sequence[str | Path]) -> bool:
    """Whether the finished runs in some folders are of language models.

    Raises:
        MismatchError: only some are.
    """
    found = {run.folder: _is_language_model(run) for run in read_runs(runs) if run.is_finished}
    if len(set(found.values())) > 1:
        one, other = (next(folder for folder, is_one in found.items() if is_one == wanted) for wanted in (True, False))
        raise MismatchError(f"{one}: is a language model, and {other} is none; give one report for each kind")
    return any(found.values())


def _is_language_model(run: Run) -> bool:
    return read_run(run.folder).preprocessing.get("kind") == TOKENS.name


def compare_language_models(
    runs: Sequence[str | Path],
    store: Store | None,
    *,
    shown: I64,
    eval_data: "str | Path | Source | Dataset[Any] | None" = None,
    eval_labels: str | Path | Store | None = None,
    batch_size: int = 256,
    precision: Precision = "fp32",
    device: str = "auto",
    workers: int = 0,
    progress: bool | None = None,
) -> ComparedModels:
    """Measure students on the documents of a store, about a million positions of them, and on held-out ones.

    Args:
        runs: folders of `softlabel train`.
        store: of tokens; None measures on `eval_data` alone.
        shown: rows of documents whose divergence is asked for, int64.
        batch_size: of so many times 32 tokens is a forward pass.

    Raises:
        MismatchError: a student has another vocabulary than the labels, or is no language model.
        UsageError, SpecError, DataError, StoreError: as `softlabel.report.students.compare_students`.
    """
    if eval_labels is not None and eval_data is None:
        raise UsageError("--eval-labels: labels of held-out data need that data; give --eval-data SOURCE")
    found = read_runs(runs)
    grid, grid_notes = make_grid(found)
    notes = [*find_unfinished(found), *grid_notes]
    how = _How(
        batch_tokens=batch_size * _LINE_TOKENS,
        precision=precision,
        device=resolve_device(device),
        workers=workers,
        progress=progress,
    )
    students = [_build_student(run, store, how) for run in found if run.is_finished]
    opened = None if eval_labels is None else eval_labels if isinstance(eval_labels, Store) else open_store(eval_labels)
    stores = tuple(one for one in (store, opened) if one is not None)
    labels = store
    if store is not None and store.run.encoding.drawn:
        notes.append(
            f"{store.url} holds tokens drawn from the teacher, which do not determine its most probable one: the "
            "students are measured alone; generate with another --encoding to compare them"
        )
        labels = None
    compared: dict[str, list[TokenComparison]] = {student.name: [] for student in students}
    divergences: tuple[Divergences, ...] = ()
    if store is not None and len(store) and students:
        measured, divergences = _compare_stored(store, labels, students, how, shown)
        for one in measured:
            compared[one.run].append(one)
    if eval_data is not None and students:
        for one in _compare_held_out(open_source(eval_data), opened, store, students, how, notes, stores):
            compared[one.run].append(one)
    return ComparedModels(
        students=TokenStudents(
            runs=describe_runs(found),
            comparisons=tuple(one for parts in compared.values() for one in parts),
            grid=grid,
            notes=tuple(dict.fromkeys(notes)),
        ),
        divergences=divergences,
    )


def _build_student(run: Run, store: Store | None, how: _How) -> _Student:
    if not _is_language_model(run):
        raise MismatchError(
            f"{run.folder}: expected a language model, as the labels are of documents, found a student of "
            "other samples; report on runs that were trained with this store"
        )
    model, transform = build_network(spec_of(run.folder), TOKENS.name, how.precision)
    assert isinstance(model, LanguageModel)
    assert isinstance(transform, TokenTransform)
    name = os.fspath(run.folder)
    if store is not None:
        check_vocabulary(f"student {name}", store, model.vocabulary)
    return _Student(run=run, name=name, model=model, transform=transform)


class _Observer:
    """Takes the divergence of positions, batch by batch: the mean of each document, and with `keep` all of them."""

    def __init__(self, rows_N: I64, lengths_N: NDArray[np.int32], *, keep: bool = False) -> None:
        self._rows_N, self._lengths_N, self._keep = rows_N, lengths_N, keep
        self.furthest = Shortlist(FURTHEST)
        self.by_row: dict[int, F64] = {}

    def __call__(self, batch: TokenBatch, nats_P: Tensor | None) -> None:
        if nats_P is None:
            return
        segments_BL, places_P = batch.segments.cpu().numpy(), batch.places.cpu().numpy()
        of_line_B = segments_BL.max(axis=1)
        before_B = np.cumsum(of_line_B) - of_line_B
        line_P = places_P // segments_BL.shape[1]
        document_P = before_B[line_P] + segments_BL.reshape(-1)[places_P] - 1
        samples, found_P = batch.samples.numpy(), nats_P.cpu().numpy()
        known_P = np.isfinite(found_P)
        count, sums = (
            np.bincount(document_P[known_P], weights, minlength=len(samples)) for weights in (None, found_P[known_P])
        )
        has = np.flatnonzero(count)
        self.furthest.add(-sums[has] / count[has], self._rows_N[samples[has]])
        if self._keep:
            position_P = batch.position_ids.cpu().numpy().reshape(-1)[places_P]
            for number, sample in enumerate(samples.tolist()):
                of_L = np.full(self._lengths_N[sample], np.nan)
                mine_P = document_P == number
                of_L[position_P[mine_P]] = found_P[mine_P]
                self.by_row[int(self._rows_N[sample])] = of_L


def _compare_stored(
    store: Store, labels: Store | None, students: Sequence[_Student], how: _How, shown: I64
) -> tuple[list[TokenComparison], tuple[Divergences, ...]]:
    total = max(1, store.spans.total("position"))
    rows_N = choose_samples(len(store), max(1, min(len(store), len(store) * MOST_POSITIONS // total)))
    documents = StoredDocuments(store, None if len(rows_N) == len(store) else rows_N)
    hashes = SourceHashes(documents, store)
    found, observers = [], []
    for student in students:
        observers.append(_Observer(rows_N, documents.lengths))
        evaluation = how.measure(student, documents, labels, observers[-1])
        overlap = count_trained(student.run.folder, ReadSamples(hashes), stores=[store])
        found.append(_describe(student, store.url, evaluation, overlap, of=len(store), of_eval_data=False))
    if labels is None:
        return found, ()
    furthest = [observer.furthest.rows for observer in observers[:COLOURED]]
    rows = np.unique(np.concatenate([shown, *(one["number"] for one in furthest if one)]))
    picked = StoredDocuments(store, rows)
    divergences = []
    for student, one in zip(students, furthest, strict=False):
        observer = _Observer(rows, picked.lengths, keep=True)
        if one and len(rows):
            how.measure(student, picked, labels, observer)
        divergences.append(
            Divergences(
                run=student.name,
                rows=one["number"] if one else rows[:0],
                scores=-one["score"] if one else np.zeros(0),
                by_row=observer.by_row,
            )
        )
    return found, tuple(divergences)


def _compare_held_out(
    source: Source,
    labels: Store | None,
    store: Store | None,
    students: Sequence[_Student],
    how: _How,
    notes: list[str],
    stores: Sequence[Store],
) -> list[TokenComparison]:
    require_samples(source)
    if labels is None:
        notes.append(write_generate_command(source, store))
    elif store is not None:
        notes += describe_other_teachers(labels, store)
    hashes: dict[Any, SourceHashes] = {}  # of students of one vocabulary
    found = []
    for student in students:
        length = choose_length(student.model, labels or store, student.transform)
        documents = tokenize_for(f"student {student.name}", source, student.model, labels, max_length=length)
        if documents.tokenization not in hashes:
            hashes[documents.tokenization] = SourceHashes(documents, labels)
        made = hashes[documents.tokenization]
        evaluation = how.measure(student, documents, labels)
        overlap = count_trained(student.run.folder, ReadSamples(made), stores=stores, sources=[source])
        found.append(_describe(student, source.name, evaluation, overlap, of=len(source), of_eval_data=True))
    return found


def _describe(
    student: _Student, data: str, found: TokenEvaluation, overlap: Overlap, *, of: int, of_eval_data: bool
) -> TokenComparison:
    figures = [found.cross_entropy, found.teacher_kl]
    is_finite = all(math.isfinite(one) for one in figures if one is not None)

    def keep(value: float | None) -> float | None:
        return value if is_finite or value is None else math.nan

    return TokenComparison(
        run=student.name,
        data=data,
        held_out=None if overlap.trained is None else overlap.trained == 0,
        trained_on=overlap.trained,
        by_keys=overlap.by_keys,
        of_eval_data=of_eval_data,
        samples=found.samples,
        of=of,
        is_finite=is_finite,
        tokens=found.tokens,
        predicted=found.labelled,
        with_teacher=found.with_teacher,
        nll=keep(found.cross_entropy),
        perplexity=keep(found.perplexity),
        accuracy=keep(found.accuracy),
        calibration_error=keep(found.calibration_error),
        agreement=keep(found.agreement),
        divergence=keep(found.teacher_kl),
        divergence_kind=found.teacher_kl_kind,
        teacher_accuracy=found.teacher_accuracy,
        temperature=found.temperature,
    )
