"""Hard labels and class names: which columns hold them, how they are parsed and checked. N samples."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.common.multi_hot import UNKNOWN, Labels
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE


def read_classes(path: str, *, subject: str) -> tuple[str, ...]:
    """Read class names from ``classes=FILE``: one per line; line i, counted from 0, is label i.

    Raises:
        SpecError: the file cannot be read, or a line is empty or repeated.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{subject}: classes={path}: cannot be read: {error}") from error
    wrong = next((number for number, name in enumerate(names) if not name or name in names[:number]), None)
    if wrong is not None or not names:
        raise SpecError(
            f"{subject}: classes={path}: expected a different class name on every line, found "
            f"{repr(names[wrong]) if wrong is not None else 'none'} on line {(wrong or 0) + 1}"
        )
    return tuple(names)


def checked_classes(labels_N: NDArray[np.int64], class_names: tuple[str, ...] | None, *, subject: str) -> None:
    """Check that every label int64 (N,) has a name.

    Raises:
        SpecError: a label has none.
    """
    largest = int(labels_N.max(initial=IGNORE))
    if class_names is not None and largest >= len(class_names):
        raise SpecError(
            f"{subject}: expected labels below {len(class_names)}, the number of class names, found {largest}; fix "
            "classes=, or the labels"
        )


def checked_width(width: int, class_names: tuple[str, ...] | None, *, subject: str) -> None:
    """Check that multi-label rows have one column per class name.

    Raises:
        SpecError: the numbers differ.
    """
    if class_names is not None and len(class_names) != width:
        raise SpecError(
            f"{subject}: expected {width} class names, one for each class of a label, found {len(class_names)}; "
            "correct classes="
        )


def check_labels_named(labels: Labels, class_names: tuple[str, ...] | None, *, subject: str) -> None:
    """Check that labels int64 (N,) or int8 (N, C) fit the class names.

    Raises:
        SpecError: they do not.
    """
    if labels.ndim == 2:
        checked_width(labels.shape[1], class_names, subject=subject)
    else:
        checked_classes(labels.astype(np.int64, copy=False), class_names, subject=subject)


def name_several(labels: str | None, class_names: tuple[str, ...] | None, *, subject: str) -> tuple[str, ...] | None:
    """Return the class names where ``labels=a,b,c`` may name columns, which then are the classes.

    Raises:
        SpecError: ``classes=`` names others.
    """
    columns = None if labels is None else tuple(labels.split(","))
    if columns is not None and class_names not in (None, columns):
        raise SpecError(f"{subject}: classes= differs from the columns of labels=; leave it out")
    return columns or class_names


def checked_labels(labels_N: NDArray[np.int64], name: str, where: str | None = None) -> NDArray[np.int64]:
    """Replace -1, which Hugging Face and STL-10 use for unlabelled samples, by -100.

    Args:
        labels_N: int64 (N,).
        name: the source, for errors.
        where: the sample, for errors; by default its index in `labels_N`.

    Returns:
        int64 (N,).

    Raises:
        DataError: another negative number.
    """
    labels_N = np.where(labels_N == -1, IGNORE, labels_N)
    wrong = np.flatnonzero((labels_N < 0) & (labels_N != IGNORE))
    if len(wrong):
        where = where or f"sample {wrong[0]}"
        raise DataError(
            f"{name}: {where}: expected a label of at least 0, or -1, -100 or null for none; found {labels_N[wrong[0]]}"
        )
    return labels_N


def checked_multi_hot(found: NDArray[Any], name: str, where: str) -> NDArray[np.int8]:
    """Labels of several classes at once, int8 (N, C), out of integers, booleans or floats: 1, 0, and -1, -100 or NaN
    where it is not known.

    Raises:
        DataError: other numbers, or no table of them.
    """
    problem = f"{found.dtype} of shape {found.shape}"
    if found.ndim == 2 and found.shape[1] and found.dtype.kind in "iubf":
        numbers = np.where(np.isnan(found), UNKNOWN, found) if found.dtype.kind == "f" else found
        numbers = np.where(numbers == IGNORE, UNKNOWN, numbers)
        wrong = np.argwhere((numbers != 0) & (numbers != 1) & (numbers != UNKNOWN))
        if not len(wrong):
            return numbers.astype(np.int8)
        problem = f"{numbers[tuple(wrong[0])]} for class {wrong[0][1]} of row {wrong[0][0]}"
    raise DataError(
        f"{name}: {where}: expected 1, 0 or -1 (not known) for each class, found {problem}; name other labels, or go "
        "without"
    )


# In order of preference, case-insensitive.
LABEL_NAMES = (
    *("label", "labels", "fine_label", "fine_labels", "target", "targets", "class", "class_id", "class_idx"),
    *("class_index", "class_label", "label_id", "label_idx", "category", "category_id", "cls", "y"),
    *("coarse_label", "coarse_labels"),
)
# Preferred among several: CIFAR-100's classes are the fine ones.
_FIRST = (("label",), ("labels",), ("fine_label", "fine_labels"))
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
MOST_CLASSES = 1 << 31


def choose_label(names: Iterable[str], *, subject: str, remedy: str) -> tuple[str | None, tuple[str, ...]]:
    """Choose the name that holds the labels.

    Args:
        names: of columns, arrays or fields.
        subject, remedy: for the error.

    Returns:
        (the chosen name, or None if no name suggests labels; other names that suggest labels).

    Raises:
        DataError: several names suggest labels, and none is preferred.
    """
    found = usual_labels(names)
    if not found:
        return None, ()
    first = [name for usual in _FIRST for name in found if name.lower() in usual]
    if len(found) > 1 and not first:
        raise DataError(f"{subject}: more than one label column: {', '.join(found)}; {remedy}")
    chosen = first[0] if first else found[0]
    return chosen, tuple(name for name in found if name != chosen)


def usual_labels(names: Iterable[str]) -> list[str]:
    """Return the names that suggest labels, in order of preference."""
    return sorted((name for name in names if name.lower() in LABEL_NAMES), key=_rank_name)


def _rank_name(name: str) -> tuple[int, bool]:
    return LABEL_NAMES.index(name.lower()), not name.islower()


def number_classes(names: Sequence[str] | None) -> dict[str, int] | None:
    """Return the label of each class name."""
    return None if names is None else {name: number for number, name in enumerate(names)}


def class_number(value: object, numbers: Mapping[str, int] | None = None) -> int:
    """Parse a label: an integer in any form (3, 3.0, "3") or a class name; -100 for None, NaN or empty text.

    Args:
        value: from a file.
        numbers: label of each class name, if known.

    Raises:
        ValueError: it is not a label, or is both a number and the name of another class.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return _parse_text(value.strip(), numbers)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return IGNORE
    if isinstance(value, int | float) and abs(value) < MOST_CLASSES and value == int(value):
        return int(value)
    raise ValueError(f"expected a class number, found {str(value)[:40]!r}")


def _parse_text(text: str, numbers: Mapping[str, int] | None) -> int:
    if not text:
        return IGNORE
    named = None if numbers is None else numbers.get(text)
    if not _WHOLE.fullmatch(text):
        if named is not None:
            return named
        if numbers is not None:
            raise ValueError(f"expected a class number or a name from classes=, found {text[:40]!r}")
        raise ValueError(
            f"expected a class number, found {text[:40]!r}; class names need '?classes=FILE' with one name per line"
        )
    found = int(text.partition(".")[0])
    if abs(found) >= MOST_CLASSES:
        raise ValueError(f"expected a class number, found {text[:40]!r}")
    if named is not None and named != found:
        raise ValueError(f"expected a class number or name, found {text!r}, which is also the name of class {named}")
    return found
