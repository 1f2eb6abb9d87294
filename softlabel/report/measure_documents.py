"""The sections of a report that are about a store of documents."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from softlabel.report.about import describe_encoding, describe_store
from softlabel.report.document_figures import (
    DocumentCoverage,
    NextTokenAgreement,
    PositionCost,
    VocabularyUse,
)
from softlabel.report.document_meters import DocumentCoverageMeter, PositionMeter, VocabularyMeter
from softlabel.report.document_pass import run_document_pass
from softlabel.report.ensemble import measure_ensemble
from softlabel.report.figures import About, Absent, EncodingCost, Ensemble, Sharpness
from softlabel.report.measure import use_one_thread
from softlabel.report.next_token import NextTokenMeter
from softlabel.report.probabilities import LabelReader
from softlabel.report.token_texts import TokenTexts
from softlabel.store.reader import Store
from softlabel.store.token_rows import MASK, TOKENS

SURPRISING = 12  # documents


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFigures:
    """What was measured of a store of documents: sections of a `DocumentReport`, by their names there.

    Attributes:
        surprising: rows of the documents with the highest mean NLL, int64, and these NLLs.
        texts: of its tokens.
    """

    about: About
    agreement: NextTokenAgreement | Absent
    sharpness: Sharpness | Absent
    ensemble: Ensemble | Absent
    encoding: PositionCost
    coverage: DocumentCoverage
    vocabulary: VocabularyUse
    surprising: tuple[NDArray[np.int64], NDArray[np.float64]] = field(compare=False, repr=False)
    texts: TokenTexts = field(compare=False, repr=False)


def measure_documents(store: Store, *, progress: bool | None = None) -> DocumentFigures:
    """Measure a store of documents in one pass, position by position.

    Args:
        store: open, see `softlabel.open_store`; of tokens.
        progress: show a bar; None: if standard error is a terminal.

    Raises:
        StoreCorruptError: a shard is missing or damaged.
    """
    reader, texts = LabelReader(store), TokenTexts(store)
    next_token, positions = NextTokenMeter(reader, documents=SURPRISING), PositionMeter(reader)
    coverage, vocabulary = DocumentCoverageMeter(store), VocabularyMeter(reader)
    sample = run_document_pass(store, reader, [next_token, positions, coverage, vocabulary], progress=progress)
    with use_one_thread():
        covered = coverage.result(non_finite=positions.non_finite)
        why = _find_obstacle(store, covered)
        ensemble = measure_ensemble(sample, None) if why is None else why
        found = next_token.surprising.rows
        none = np.zeros(0, np.int64), np.zeros(0)
        return DocumentFigures(
            about=describe_store(store, reader, measured=covered.counted),
            agreement=why or next_token.result(texts.name),
            sharpness=why or positions.summarize_sharpness(),
            ensemble=ensemble,
            encoding=_describe_cost(store, positions),
            coverage=covered,
            vocabulary=vocabulary.result(texts.name, unknown=texts.unknown),
            surprising=none if why is not None or not found else (found["number"], -found["score"]),
            texts=texts,
        )


def _find_obstacle(store: Store, found: DocumentCoverage) -> Absent | None:
    """Why nothing can be measured of the labels; None where it can."""
    if not found.documents:
        return Absent(
            reason=f"none of the {found.samples:,} documents has labels; 'softlabel inspect {store.url}' says why"
        )
    if found.non_finite:
        return Absent(
            reason=f"{found.non_finite:,} of {found.positions:,} positions of the store hold numbers that are not "
            f"finite; 'softlabel verify {store.url}' names them"
        )
    return None


def _describe_cost(store: Store, positions: PositionMeter) -> PositionCost:
    whole: EncodingCost = describe_encoding(store)
    return PositionCost(
        name=whole.name,
        row_bytes=sum(column.row_bytes for column in store.run.label_columns),
        store_bytes=whole.store_bytes,
        mean_t1=whole.mean_t1,
        worst_t1=whole.worst_t1,
        mean_t=whole.mean_t,
        worst_t=whole.worst_t,
        of=whole.of,
        token_bytes=sum(column.row_bytes for column in store.run.columns if column.name in (TOKENS, MASK)),
        kept=() if positions.non_finite else positions.summarize_kept(),
    )
