"""The member of a tar sample that is its label, and members that may be."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softlabel.common.multi_hot import UNKNOWN
from softlabel.dataset.findings import Findings, some
from softlabel.dataset.hard_labels import class_number, usual_labels
from softlabel.dataset.multi_hot_columns import ask_columns, parse_flags
from softlabel.errors import DataError
from softlabel.inputs.base import IGNORE

LABEL_BYTES = 1 << 20
_CLASS = "cls"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMember:
    """Location of the label in a sample.

    Attributes:
        extension: of the member; None: ignore labels.
        field: of that member, which is JSON; None: the member is the label.
        fields: of that member, one for each of several classes at once; empty for class numbers.
        numbers: label of each class name of `classes=`.
    """

    extension: str | None = _CLASS
    field: str | None = None
    fields: tuple[str, ...] = ()
    numbers: Mapping[str, int] | None = None

    @classmethod
    def asked(
        cls, label: str | None, labels: str | None, numbers: Mapping[str, int] | None, *, name: str, ignored: bool
    ) -> "LabelMember":
        """Parse ``label=``: ``none``, ``.EXTENSION`` or a FIELD of `.json`; by default `.cls`; and ``labels=``: FIELDs.

        Raises:
            SpecError: ``labels=`` are not several fields, or ``label=`` is given too.
        """
        if ignored or label == "none":
            return cls(extension=None)
        if labels is not None:
            return cls(extension="json", fields=ask_columns(labels, label, labels.split(","), name))
        if label is None:
            return cls(numbers=numbers)
        if label.startswith("."):
            return cls(extension=label[1:].lower(), numbers=numbers)
        return cls(extension="json", field=label, numbers=numbers)

    @property
    def none(self) -> int | list[int]:
        """The label of a sample without one."""
        return [UNKNOWN] * len(self.fields) if self.fields else IGNORE

    def __str__(self) -> str:
        if self.fields:
            return f"fields {', '.join(self.fields)} of .json members"
        return f".{self.extension} members" if self.field is None else f"field {self.field!r} of .json members"

    def parse(self, raw: bytes, member: str) -> int | list[int]:
        """Parse the bytes of a member, named `member` in errors.

        Returns:
            A class number, -100 for none; or, of several fields, 1, 0, or -1 (absent or null) for each.

        Raises:
            DataError: it is not a label.
        """
        found: object = raw
        if self.extension == "json":
            try:
                found = json.loads(raw)
            except ValueError as error:
                raise DataError(f"{member}: expected JSON: {error}") from None
            if isinstance(found, dict) and not self.fields:
                found = found.get(self.field) if self.field is not None else found
        elif not raw.strip():
            raise DataError(
                f"{member}: expected a class number, found nothing; write one, or go without: '?label=none'"
            )
        try:
            if self.fields:
                if not isinstance(found, dict):
                    raise ValueError(f"expected an object with fields, found {str(found)[:40]!r}")
                return parse_flags([found.get(field) for field in self.fields], self.fields)
            return class_number(found, self.numbers)
        except ValueError as error:
            what = "" if self.field is None else f"{self.field}: "
            raise DataError(
                f"{member}: {what}{error}; name another with '?label=', or go without: '?label=none'"
            ) from None


def find_labels(
    label: LabelMember,
    has_labels: bool,
    examples: Sequence[tuple[str, bytes]],
    others: Mapping[str, int],
    names: Sequence[str],
    unknown: Sequence[str],
) -> Findings:
    """Describe where the labels come from, or what may hold them.

    Args:
        label: the label member.
        has_labels: whether a sample has a label.
        examples: extension and bytes of the first member of each kind that is neither image nor label.
        others: extension -> number of such members.
        names: of the first samples, with their folders.
        unknown: the fields of several classes at once that no sample has.
    """
    if label.extension is None:
        return Findings(without_labels="labels are ignored, as requested")
    if has_labels:
        absent = tuple(f"labels=: field {field!r} of the .json members is known of no sample" for field in unknown)
        return Findings(labels_from=str(label), left_out=absent)
    offers = []
    for extension, raw in dict(examples).items():
        many = f"{others.get(extension, 1):,} .{extension} members"
        if extension == "json":
            if fields := _list_fields(raw):
                usual = next(iter(usual_labels(fields)), "FIELD")
                offers.append(f"'?label={usual}' uses a field of the {many}, which have {', '.join(fields)}")
        elif _is_number(raw):
            offers.append(f"'?label=.{extension}' uses the {many}; the first holds {raw.strip().decode()!r}")
    folders = sorted({folder for name in names if (folder := os.path.basename(os.path.dirname(name)))})
    if len(folders) > 1:
        offers.append(f"folders such as {some(folders)} may be classes; unpack the archive to use them")
    why = f"no sample has a label in {label}" if label.field or label.fields else f"no sample has {label}"
    return Findings(without_labels=why, left_out=tuple(f"labels may have been left out: {offer}" for offer in offers))


def _list_fields(raw: bytes) -> list[str]:
    """Return the fields of a JSON member that hold a number or a string."""
    try:
        found = json.loads(raw)
    except ValueError:
        return []
    return [str(k) for k, v in found.items() if isinstance(v, int | float | str)] if isinstance(found, dict) else []


def _is_number(raw: bytes) -> bool:
    try:
        return class_number(raw) >= 0
    except ValueError:
        return False
