"""Conditions on the figures of a report, such as ``noise>0.05``, for use in continuous integration."""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from softlabel.errors import UsageError
from softlabel.report.document_figures import TokenStudents
from softlabel.report.figures import Absent
from softlabel.report.report import DocumentReport, Report
from softlabel.report.student_figures import Students

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def _worst(students: Students | TokenStudents, name: str, choose: Callable[[list[float]], float]) -> float | None:
    values = [getattr(one, name) for one in students.comparisons]
    known = [value for value in values if value is not None]
    if not all(map(math.isfinite, known)):
        return math.nan
    return choose(known) if known else None


_Metrics = dict[str, tuple[str, str, Callable[[Any], float | None]]]

# name -> (meaning, section of the report, value in that section)
_OF_ALL: _Metrics = {
    "accuracy": ("of the labels", "agreement", lambda found: found.accuracy),
    "one_hot": ("share of rows with a probability above 0.999", "sharpness", lambda found: found.at[0].one_hot),
    "encoding_loss": (
        "KL(teacher || stored) in nats",
        "encoding",
        lambda found: found.mean_t if found.of == "teachers" else None,
    ),
    "bad": ("samples that could not be read", "coverage", lambda found: found.bad_count),
    "missing": ("samples of the dataset without a row", "coverage", lambda found: found.missing),
    "duplicates": (
        "samples whose content another one has",
        "coverage",
        lambda found: found.duplicates.samples if found.duplicates.compared else None,
    ),
    "student_accuracy": ("of the worst student", "students", lambda found: _worst(found, "accuracy", min)),
    "student_agreement": ("with the teacher, at worst", "students", lambda found: _worst(found, "agreement", min)),
    "student_kl": ("KL(teacher || student), at worst", "students", lambda found: _worst(found, "divergence", max)),
}
_OF_SAMPLES: _Metrics = {
    "noise": ("estimated share of wrong hard labels", "noise", lambda found: found.share),
    "candidates": ("hard labels that are likely wrong", "noise", lambda found: found.candidates),
    "calibration_error": ("of the labels", "calibration", lambda found: found.curves[0].before.calibration_error),
    "conflicts": (
        "groups of equal samples with different hard labels",
        "coverage",
        lambda found: found.duplicates.conflicting if found.duplicates.compared else None,
    ),
}
_OF_DOCUMENTS: _Metrics = {
    "nll": ("of the next tokens, mean in nats", "agreement", lambda found: found.nll),
    "perplexity": ("of the next tokens", "agreement", lambda found: found.perplexity),
    "kept_mass": (
        "what top-k labels keep of the probability, mean",
        "encoding",
        lambda found: found.kept[0].mean if found.kept else None,
    ),
    "empty": ("documents without a token", "coverage", lambda found: found.empty),
    "at_limit": ("documents of the largest length", "coverage", lambda found: found.at_limit),
    "unknown_tokens": ("tokens that the tokenizer does not know", "vocabulary", lambda found: found.unknown),
    "student_nll": ("of the next tokens, at worst", "students", lambda found: _worst(found, "nll", max)),
}
_WHY_NOT = {"kept_mass": "only labels of encoding topk leave out a part of the probability that is known"}
_METRICS = {**_OF_ALL, **_OF_SAMPLES, **_OF_DOCUMENTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A comparison of one metric with a number, such as ``noise>0.05``; see `parse`."""

    text: str
    metric: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read a condition.

        Raises:
            UsageError: it is not METRIC>NUMBER, or the metric is unknown.
        """
        found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            limit = float(found[3]) if found else float("nan")
        except ValueError:
            found = None
        if found is None or limit != limit:
            raise UsageError(f"--fail-if: expected a condition such as 'noise>0.05', found {text!r}")
        if found[1] not in _METRICS:
            known = "; ".join(f"{name} ({meaning})" for name, (meaning, *_) in _METRICS.items())
            raise UsageError(f"--fail-if: expected one of these metrics, found {found[1]!r}: {known}")
        return cls(text=text, metric=found[1], sign=found[2], limit=limit)

    def check_kind(self, *, documents: bool) -> None:
        """Raise UsageError where a report of such samples has no such metric.

        Args:
            documents: whether it is of documents.
        """
        foreign, own = (_OF_SAMPLES, _OF_DOCUMENTS) if documents else (_OF_DOCUMENTS, _OF_SAMPLES)
        if self.metric in foreign:
            words = ("samples with one answer each", "documents")
            raise UsageError(
                f"--fail-if {self.text!r}: {self.metric} is of {words[not documents]}; of {words[documents]} expected "
                f"one of {', '.join((*_OF_ALL, *own))}"
            )

    def holds(self, report: Report | DocumentReport) -> float | None:
        """Return the value of the metric if the condition is true of a report, None if it is not.

        Raises:
            UsageError: the metric was not measured, or is not finite.
        """
        _, section, measure = _METRICS[self.metric]
        found = getattr(report, section)
        value = None if isinstance(found, Absent) else measure(found)
        if value is None:
            why = _WHY_NOT.get(self.metric, f"the section '{section}' does not have it")
            why = found.reason if isinstance(found, Absent) else why
            raise UsageError(f"--fail-if {self.text!r}: {self.metric} was not measured: {why}")
        if not math.isfinite(value):
            raise UsageError(
                f"--fail-if {self.text!r}: {self.metric} is not finite; a report without this condition says why, in "
                f"section '{section}'"
            )
        return value if _COMPARE[self.sign](value, self.limit) else None


def find_failures(report: Report | DocumentReport, conditions: Iterable[Condition]) -> list[str]:
    """Return a sentence for each condition that is true of a report.

    Raises:
        UsageError: a metric was not measured, or is not finite.
    """
    return [
        f"{one.metric} is {value:.6g}, and {one.text!r} was to fail"
        for one in conditions
        if (value := one.holds(report)) is not None
    ]
