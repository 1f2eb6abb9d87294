"""Labels and class names that stand beside the images, for the sources that do not carry both in one file.

Legend: N samples.
"""

import numpy as np
from numpy.typing import NDArray

from softlabel.dataset.base import IGNORE
from softlabel.errors import DataError, SpecError


def read_classes(path: str, *, subject: str) -> tuple[str, ...]:
    """The names of the classes out of ``classes=FILE``: one a line, label i is on line i, counted from 0.

    Raises:
        SpecError: the file cannot be read, or a line is empty or there twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{subject}: classes={path}: cannot be read: {error}") from error
    wrong = next((number for number, name in enumerate(names) if not name or name in names[:number]), None)
    if wrong is not None or not names:
        raise SpecError(
            f"{subject}: classes={path}: expected a class name of its own on every line, found "
            f"{repr(names[wrong]) if wrong is not None else 'none'} on line {(wrong or 0) + 1}"
        )
    return tuple(names)


def checked_classes(labels_N: NDArray[np.int64], class_names: tuple[str, ...] | None, *, subject: str) -> None:
    """Raises DataError where a label has no name."""
    largest = int(labels_N.max(initial=IGNORE))
    if class_names is not None and largest >= len(class_names):
        raise DataError(
            f"{subject}: expected labels below {len(class_names)}, the number of class names, found {largest}; mend "
            "classes=, or the labels"
        )


def checked_labels(labels_N: NDArray[np.int64], name: str, where: str | None = None) -> NDArray[np.int64]:
    """-1, as Hugging Face and STL-10 write it, is no label; another negative number is a mistake.

    Args:
        labels_N: int64.
        name: of the source.
        where: what to call the sample, if there is one alone; its place in `labels_N` without.

    Raises:
        DataError: such a number.
    """
    labels_N = np.where(labels_N == -1, IGNORE, labels_N)
    wrong = np.flatnonzero((labels_N < 0) & (labels_N != IGNORE))
    if len(wrong):
        where = where or f"sample {wrong[0]}"
        raise DataError(
            f"{name}: {where}: expected a label of at least 0, or -1, -100 or null for none; found {labels_N[wrong[0]]}"
        )
    return labels_N
