"""A whole report: its sections and the sentences that sum them up, and their form in JSON."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from softlabel.report.document_figures import (
    DocumentCoverage,
    Documents,
    NextTokenAgreement,
    PositionCost,
    TokenStudents,
    VocabularyUse,
)
from softlabel.report.figures import (
    About,
    Absent,
    Agreement,
    Calibration,
    Confusion,
    Coverage,
    EncodingCost,
    Ensemble,
    Noise,
    Sharpness,
    Views,
)
from softlabel.report.student_figures import Students


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One line of the summary: `level` says whether something has to be done; `command` does it, '' for none."""

    section: str
    level: Literal["good", "look", "act"]
    text: str
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it. `about` and the store's sections are absent in a report of runs alone."""

    title: str
    about: About | Absent
    summary: tuple[Sentence, ...]
    agreement: Agreement | Absent
    noise: Noise | Absent
    calibration: Calibration | Absent
    sharpness: Sharpness | Absent
    confusion: Confusion | Absent
    ensemble: Ensemble | Absent
    views: Views | Absent
    encoding: EncodingCost | Absent
    coverage: Coverage | Absent
    students: Students | Absent


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentReport:
    """That of a store of documents, or of runs of language models alone."""

    title: str
    about: About | Absent
    summary: tuple[Sentence, ...]
    agreement: NextTokenAgreement | Absent
    sharpness: Sharpness | Absent
    documents: Documents | Absent
    ensemble: Ensemble | Absent
    encoding: PositionCost | Absent
    coverage: DocumentCoverage | Absent
    vocabulary: VocabularyUse | Absent
    students: TokenStudents | Absent


def report_json(report: Report | DocumentReport) -> str:
    """Return the figures of a report as JSON; a number that is not finite is null."""
    return json.dumps(_plain(asdict(report)), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
