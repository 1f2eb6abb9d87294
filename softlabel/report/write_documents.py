"""Measure a store of documents and its students for a report."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from softlabel.dataset import Source, open_source
from softlabel.dataset.tokenize import tokenize_samples
from softlabel.errors import MismatchError
from softlabel.inputs.base import TokenIds
from softlabel.inputs.chat import CHATS
from softlabel.inputs.content import changed_content
from softlabel.inputs.text import TEXTS
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.inputs.tokens import TOKENS, hash_ids
from softlabel.inputs.vocabulary import Vocabulary
from softlabel.models.precision import Precision
from softlabel.report.document_figures import Documents, TokenStudents
from softlabel.report.figures import Absent
from softlabel.report.measure_documents import DocumentFigures, measure_documents
from softlabel.report.report import DocumentReport
from softlabel.report.shown_documents import show_documents
from softlabel.report.store_pass import choose_samples
from softlabel.report.summary_documents import summarize_documents
from softlabel.report.token_students import Divergences, compare_language_models
from softlabel.store.reader import Store

_COMPARED = 32  # documents of the data with those that were labelled


def report_documents(
    title: str,
    store: Store | None,
    absent: tuple[Absent, Absent],
    *,
    data: Any,
    runs: Sequence[str | Path],
    eval_data: Any,
    eval_labels: Any,
    batch_size: int,
    precision: Precision,
    device: str,
    workers: int,
    progress: bool | None,
) -> DocumentReport:
    """The report of a store of documents, of its students, or of both; see `softlabel.report.write.write_report`.

    Args:
        absent: why there is no store, and why there are no students.

    Raises:
        MismatchError: `data` is not what was labelled.
    """
    no_store, no_students = absent
    if store is not None and data is not None:
        _check_documents(open_source(data), store)
    figures: DocumentFigures | Absent = no_store if store is None else measure_documents(store, progress=progress)
    if isinstance(figures, DocumentFigures) and isinstance(data, str | Path):
        figures = replace(figures, about=replace(figures.about, data=str(data)))  # as commands have to name it here
    students: TokenStudents | Absent = no_students
    divergences: tuple[Divergences, ...] = ()
    if runs:
        compared = compare_language_models(
            runs,
            store,
            shown=figures.surprising[0] if isinstance(figures, DocumentFigures) else np.zeros(0, np.int64),
            eval_data=eval_data,
            eval_labels=eval_labels,
            batch_size=batch_size,
            precision=precision,
            device=device,
            workers=workers,
            progress=progress,
        )
        students, divergences = compared.students, compared.divergences
    documents: Documents | Absent = no_store
    if store is not None and isinstance(figures, DocumentFigures):
        documents = show_documents(store, figures, divergences)
    own = {"title", "summary", "documents", "students"}
    return DocumentReport(
        title=title,
        summary=summarize_documents(figures, documents, students),
        documents=documents,
        students=students,
        **{
            field.name: figures if isinstance(figures, Absent) else getattr(figures, field.name)
            for field in fields(DocumentReport)
            if field.name not in own
        },
    )


def _check_documents(source: Source, store: Store) -> None:
    """Compare some documents with those that were labelled.

    Raises:
        MismatchError: none of them has a row, or one is another document than was labelled.
    """
    samples = source.read(choose_samples(len(source), min(_COMPARED, len(source)))) if len(source) else []
    rows = store.lookup([sample.key for sample in samples], missing="mask")
    there = np.flatnonzero(rows >= 0)
    if source.inputs not in (TEXTS, CHATS, TOKENS) or not len(there):
        raise MismatchError(f"{source.name}: expected the data that was labelled in {store.url}, found other documents")
    content, tokens = store.tokenizer, store.run.tokens
    assert tokens is not None
    if content is None or source.inputs == CHATS:
        return  # a chat template is in the teacher's folder; keys are compared alone
    found = tokenize_samples([samples[place] for place in there.tolist()], source, Vocabulary(Tokenizer(content)))
    now = [hash_ids(one.ids[: tokens.max_length]) if isinstance(one, TokenIds) else 0 for one in found]
    changed = np.flatnonzero(changed_content(np.array(now, np.uint64), store.content[rows[there]]))
    if len(changed):
        key = samples[int(there[changed[0]])].key
        raise MismatchError(f"{source.name}: document {key!r} is not the one that was labelled in {store.url}")
