"""Measure a store and its students, and write the page."""

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.common.atomic_file import write_atomically
from softlabel.dataset import Source, open_source
from softlabel.errors import DataError, MismatchError, SoftLabelError, StoreError, StoreNotFoundError, UsageError
from softlabel.inputs.content import changed_content, hashes_of
from softlabel.models.precision import Precision
from softlabel.report.conditions import Condition, find_failures
from softlabel.report.examples import ExampleReader
from softlabel.report.figures import Absent, Example
from softlabel.report.measure import StoreFigures, measure_store
from softlabel.report.output_files import check_outputs, keep_data, keep_runs, keep_store
from softlabel.report.page import render
from softlabel.report.pictures import Picture, make_pictures
from softlabel.report.probabilities import LabelReader
from softlabel.report.report import DocumentReport, Report, report_json
from softlabel.report.student_figures import Students
from softlabel.report.students import compare_students
from softlabel.report.summary import summarize
from softlabel.report.token_students import are_language_models
from softlabel.report.write_documents import report_documents
from softlabel.store.open import open_store
from softlabel.store.reader import Store

log = logging.getLogger("softlabel")

MOST_PICTURES = 400  # of all sections together
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs cells that begin so
_NOISE_COLUMNS = ("key", "label", "suggestion", "margin", "p_label", "members_agreeing", "views_agreeing")
_AT_ONCE = 4096  # rows
_COMPARED = 32  # samples of the data with those that were labelled
_NO_STORE = Absent(reason="this is a report of runs alone; give a store to see its labels")
_NO_RUNS = Absent(reason="no students are compared; give the folders of their runs with --runs")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenReport:
    """A report and where it is.

    Attributes:
        report: the figures.
        path: the page; None if none was asked for.
        pictures: how many samples the page shows, as pictures or texts.
        failures: a sentence for each condition that is true.
    """

    report: Report | DocumentReport
    path: Path | None
    pictures: int
    failures: tuple[str, ...]


@check_arguments
def write_report(
    store: str | Path | Store,
    *,
    data: "str | Path | Source | Dataset[Any] | None" = None,
    runs: str | Path | Sequence[str | Path] = (),
    eval_data: "str | Path | Source | Dataset[Any] | None" = None,
    eval_labels: str | Path | Store | None = None,
    out: str | Path | None = "report.html",
    json: str | Path | None = None,
    noise_csv: str | Path | None = None,
    fail_if: Sequence[str] = (),
    batch_size: int = 256,
    precision: Precision = "fp32",
    device: str = "auto",
    workers: int = 0,
    progress: bool | None = None,
) -> WrittenReport:
    """Measure a store of soft labels, and its students, and write one HTML file that shows both.

    Args:
        store: a store or its path; or the folder of one or several runs, for a report of them alone.
        data: the SOURCE that was labelled, for pictures of its samples; absent: the one that the store records.
        runs: a folder of `softlabel train`, or several, whose students are compared with the teacher on `data` and
            `eval_data`.
        eval_data: a SOURCE that the students were not trained on.
        eval_labels: a store of the teacher's labels of `eval_data`.
        out: the HTML file; None writes none.
        json: a file for all figures as JSON.
        noise_csv: a file for every hard label that is likely wrong, the most likely one first.
        fail_if: conditions such as ``noise>0.05``, see `softlabel.report.conditions`.
        batch_size: samples a forward pass of the students; of language models 32 tokens stand for one.
        precision: of the students.
        device: auto, cpu, cuda or cuda:N, for the students.
        workers: processes that decode.
        progress: show bars; None: if standard error is a terminal.

    Raises:
        UsageError: an argument is wrong, a file would lie in the store, a run or the data, or a condition is about
            something that was not measured.
        StoreError: the store cannot be read.
        DataError: `data` is given and cannot be read, or a folder holds no run.
    """
    runs = [runs] if isinstance(runs, str | Path) else runs
    conditions = [Condition.parse(text) for text in fail_if]
    if batch_size < 1 or workers < 0:
        raise UsageError(f"--batch-size and --workers: expected at least 1 and 0, found {batch_size} and {workers}")
    outputs = {"--out": out, "--json": json, "--noise-csv": noise_csv}
    kept = [*keep_store(store), *keep_store(eval_labels), *keep_runs(runs), *keep_data(data), *keep_data(eval_data)]
    check_outputs(outputs, kept)
    opened = _open(store)
    if opened is None:
        runs = [str(store), *runs]
    else:
        check_outputs(outputs, keep_data(opened.manifest.recorded.get("data")))
    if not runs and (eval_data is not None or eval_labels is not None):
        raise UsageError("--eval-data and --eval-labels are for students; give their folders with --runs")
    documents = are_language_models(runs) if opened is None else opened.run.tokens is not None
    for one in conditions:
        one.check_kind(documents=documents)
    title = str(store) if opened is None else opened.url
    how: dict[str, Any] = {
        "eval_data": eval_data,
        "eval_labels": eval_labels,
        "batch_size": batch_size,
        "precision": precision,
        "device": device,
        "workers": workers,
        "progress": progress,
    }
    report: Report | DocumentReport
    errors, source = None, None
    if documents:
        if noise_csv is not None:
            raise UsageError("--noise-csv: documents have no hard labels that could be wrong; leave it out")
        report = report_documents(title, opened, (_NO_STORE, _NO_RUNS), data=data, runs=runs, **how)
    else:
        source = _open_data(data, opened)
        figures: StoreFigures | Absent = _NO_STORE if opened is None else measure_store(opened, progress=progress)
        if isinstance(figures, StoreFigures) and isinstance(data, str | Path):
            figures = replace(figures, about=replace(figures.about, data=str(data)))  # as commands have to name it here
        students: Students | Absent = _NO_RUNS
        if runs:
            students = compare_students(runs, opened, None if opened is None else source, **how)
        report = _join(title, figures, students)
        errors = None if noise_csv is None else _list_noise(opened, figures)
    # What cannot be answered is refused before anything is written.
    failures = tuple(find_failures(report, conditions))
    page, shown = None if out is None else Path(out), 0
    if page is not None and isinstance(report, DocumentReport):
        _write(page, render(report, {}))
        shown = len({one.key for part in getattr(report.documents, "lists", ()) for one in part.documents})
    elif page is not None and isinstance(report, Report):
        keys, others = _choose_samples(report)
        pictures = _take_pictures(keys, source)
        evaluated = _take_pictures(others, open_source(eval_data)) if others and eval_data is not None else {}
        _write(page, render(report, pictures, evaluated))
        shown = len(pictures) + len(evaluated)
    if noise_csv is not None and errors is not None:
        _write(Path(noise_csv), errors)
    if json is not None:
        _write(Path(json), report_json(report) + "\n")
    return WrittenReport(report=report, path=page, pictures=shown, failures=failures)


def _open(store: str | Path | Store) -> Store | None:
    """Return the store; None for a folder of runs."""
    try:
        # Every byte is checked, unless this machine has checked these files before.
        opened = store if isinstance(store, Store) else open_store(store)
        opened.require_labels("report")
        return opened
    except StoreNotFoundError:
        assert not isinstance(store, Store)
        folder = Path(store)
        if folder.is_dir() and next(folder.glob("**/run.json"), None) is not None:
            return None
        raise


def _open_data(data: Any, store: Store | None) -> Source | None:
    """Return the labelled data: as given, or as the store records it where that can still be opened.

    Raises:
        MismatchError: the data that was given is not what was labelled.
    """
    if data is not None:
        source = open_source(data)
        if store is not None:
            _check_data(source, store)
        return source
    recorded = None if store is None else store.manifest.recorded.get("data")
    if store is None or not isinstance(recorded, str):
        return None
    try:
        source = open_source(recorded)
        _check_data(source, store)
    except (SoftLabelError, OSError) as error:
        log.warning("warning: the report has no pictures: %s; give the labelled data with --data", error)
        return None
    return source


def _check_data(source: Source, store: Store) -> None:
    """Compare some samples with those that were labelled.

    Raises:
        MismatchError: none of them has a row, or one is another sample than was labelled.
    """
    picked = np.unique(np.linspace(0, max(0, len(source) - 1), _COMPARED).astype(np.int64))
    samples = source.read(picked.tolist()) if len(source) else []
    rows = store.lookup([sample.key for sample in samples], missing="mask")
    there = np.flatnonzero(rows >= 0)
    if source.inputs.name != store.run.input or not len(there):
        raise MismatchError(f"{source.name}: expected the data that was labelled in {store.url}, found other samples")
    now = hashes_of([samples[place].raw for place in there.tolist()], source.inputs.content_hash)
    changed = np.flatnonzero(changed_content(now, store.content[rows[there]]))
    if len(changed):
        key = samples[int(there[changed[0]])].key
        raise MismatchError(f"{source.name}: sample {key!r} is not the one that was labelled in {store.url}")


def _join(name: str, figures: StoreFigures | Absent, students: Students | Absent) -> Report:
    own = {"title", "summary", "students"}
    sections = {
        field.name: figures if isinstance(figures, Absent) else getattr(figures, field.name)
        for field in fields(Report)
        if field.name not in own
    }
    return Report(title=name, summary=summarize(figures, students), students=students, **sections)


def _choose_samples(report: Report) -> tuple[list[str], list[str]]:
    """Return the keys of the samples that are shown with a picture, of the labelled and of the evaluation data.

    The sections take turns, so that no one leaves the others without pictures; within one the first samples come first,
    of students the first ones of each corner.
    """
    queues: list[Iterator[tuple[bool, str]]] = []
    for field in fields(report):
        found = getattr(report, field.name)
        if not isinstance(found, Students):
            queues.append((False, one.key) for one in _find_examples(found))
            continue
        corners = [
            [(compared.of_eval_data, one.key) for one in corner.examples]
            for compared in found.comparisons
            for corner in compared.corners
        ]
        queues.append(one for turn in zip_longest(*corners) for one in turn if one is not None)
    chosen: dict[tuple[bool, str], None] = {}
    while queues and len(chosen) < MOST_PICTURES:
        for queue in list(queues):
            new = next((one for one in queue if one not in chosen), None)
            if new is None:
                queues.remove(queue)
            elif len(chosen) < MOST_PICTURES:
                chosen[new] = None
    keys: tuple[list[str], list[str]] = ([], [])
    for of_eval_data, key in chosen:
        keys[of_eval_data].append(key)
    return keys


def _find_examples(part: Any) -> Iterator[Example]:
    if isinstance(part, Example):
        yield part
    elif isinstance(part, tuple):
        for one in part:
            yield from _find_examples(one)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _find_examples(getattr(part, field.name))


def _take_pictures(keys: Sequence[str], source: Source | None) -> dict[str, Picture]:
    """Return pictures of samples; none where they cannot be read."""
    if source is None or not keys:
        return {}
    try:
        return make_pictures(source, keys)
    except DataError as error:
        log.warning("warning: the report has no pictures: %s", error)
        return {}


def _list_noise(store: Store | None, figures: StoreFigures | Absent) -> str:
    """Return all candidates as CSV.

    Raises:
        UsageError: labels were not judged.
    """
    if store is None or isinstance(figures, Absent) or figures.ranking is None:
        why = figures.reason if isinstance(figures, Absent) else getattr(figures.noise, "reason", "")
        raise UsageError(f"--noise-csv: no labels were judged: {why}")
    names, ranking = store.run.class_names, figures.ranking
    examples = ExampleReader(store, LabelReader(store))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_NOISE_COLUMNS)
    for start in range(0, len(ranking.rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        for one in examples.read(
            ranking.rows[part].tolist(),
            scores=ranking.margins[part].tolist(),
            suggestions=ranking.suggestions[part].tolist(),
        ):
            assert one.label is not None
            named = [number if names is None else names[number] for number in (one.label, one.suggestion)]
            agreeing = ["" if value is None else value for value in (one.members_agreeing, one.views_agreeing)]
            key, *words = (_escape_formula(cell) for cell in (one.key, *named))
            table.writerow([key, *words, f"{one.score:.6f}", f"{one.p_label or 0:.6f}", *agreeing])
    return text.getvalue()


def _escape_formula(cell: str | int) -> str | int:
    """A cell that a spreadsheet does not run: keys and class names are a stranger's."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror}; choose another place") from error
