"""Which member of a sample in a tar shard is its label, and what else might be."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softlabel.dataset.findings import Findings, some
from softlabel.dataset.hard_labels import class_number, usual_labels
from softlabel.errors import DataError

LABEL_BYTES = 1 << 20
_CLASS = "cls"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelMember:
    """Where the label of a sample is.

    Attributes:
        extension: of the member that holds it; None: labels are not wanted.
        field: of that member, which is JSON; None: the member is the label.
        numbers: the label of each class name, where `classes=` gave names.
    """

    extension: str | None = _CLASS
    field: str | None = None
    numbers: Mapping[str, int] | None = None

    @classmethod
    def asked(cls, label: str | None, numbers: Mapping[str, int] | None, *, ignored: bool) -> "LabelMember":
        """What ``label=`` means: ``none``, ``.EXTENSION`` or a FIELD of `.json`; `.cls` without it."""
        if ignored or label == "none":
            return cls(extension=None)
        if label is None:
            return cls(numbers=numbers)
        if label.startswith("."):
            return cls(extension=label[1:].lower(), numbers=numbers)
        return cls(extension="json", field=label, numbers=numbers)

    def __str__(self) -> str:
        return f".{self.extension} members" if self.field is None else f"field {self.field!r} of .json members"

    def parse(self, raw: bytes, member: str) -> int:
        """The label in the bytes of a member, -100 for none; `member` is what an error is about.

        Raises:
            DataError: there is something else.
        """
        found: object = raw
        if self.extension == "json":
            try:
                found = json.loads(raw)
            except ValueError as error:
                raise DataError(f"{member}: expected JSON: {error}") from None
            if isinstance(found, dict):
                found = found.get(self.field) if self.field is not None else found
        elif not raw.strip():
            raise DataError(
                f"{member}: expected a class number, found nothing; write one, or go without: '?label=none'"
            )
        try:
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
) -> Findings:
    """What to say of the labels.

    Args:
        examples: extension and bytes of members that are neither image nor label, the first of each kind.
        others: how many of each kind there are.
        names: of the first samples, with their folders.
    """
    if label.extension is None:
        return Findings(without_labels="labels are ignored, as asked")
    if has_labels:
        return Findings(labels_from=str(label))
    offers = []
    for extension, raw in dict(examples).items():
        many = f"{others.get(extension, 1):,} .{extension} members"
        if extension == "json":
            if fields := _fields(raw):
                usual = next(iter(usual_labels(fields)), "FIELD")
                offers.append(f"'?label={usual}' takes a field of the {many}, which have {', '.join(fields)}")
        elif _is_number(raw):
            offers.append(f"'?label=.{extension}' takes the {many}, of which the first holds {raw.strip().decode()!r}")
    folders = sorted({folder for name in names if (folder := os.path.basename(os.path.dirname(name)))})
    if len(folders) > 1:
        offers.append(f"folders such as {some(folders)} may be classes; unpacked into a folder of images they count")
    why = f"no sample has a label in {label}" if label.field else f"no sample has {label}"
    return Findings(without_labels=why, left_out=tuple(f"labels may have been left out: {offer}" for offer in offers))


def _fields(raw: bytes) -> list[str]:
    """The fields of a JSON member that hold one number or text each."""
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
