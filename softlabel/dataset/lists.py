"""Lists of image files: a `.txt` or `.csv` with one ``path[,label]`` a line.

Legend: N samples.
"""

import csv
import os
from pathlib import Path

import numpy as np

from softlabel.dataset.annotated import checked_classes, checked_labels, read_classes
from softlabel.dataset.base import IGNORE
from softlabel.dataset.folder import FolderSource
from softlabel.errors import DataError, SpecError

LIST_SUFFIXES = frozenset({".txt", ".csv"})


def open_list(path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> FolderSource:
    """The files that a list names, relative to its own folder or to ``?root=``; the key is the path as it is written.

    A path with a comma in it stands in double quotes, as CSV has it. A first line ``path,label`` (or ``path``) is a
    heading; empty lines do not count; an empty label is none. ``?labels=none`` leaves all unlabelled, ``?classes=FILE``
    names the classes.

    Raises:
        SpecError: an option that cannot be understood, or a root that is no folder.
        DataError: a line that is none, or a path that is there twice.
    """
    wanted = options.pop("labels", None)
    if wanted not in (None, "none"):
        raise SpecError(f"{name}: labels: expected none, found {wanted!r}; labels follow the paths, after a comma")
    root = options.pop("root", None) or os.path.dirname(path)
    if not os.path.isdir(root or "."):
        raise SpecError(f"{name}: root={root}: no such folder")
    classes = options.pop("classes", None)
    paths, numbers = _lines(path)
    labels_N = None
    class_names = None
    if any(number != IGNORE for number in numbers) and not ignore_labels and wanted is None:
        labels_N = checked_labels(np.array(numbers, dtype=np.int64), name)
        if classes is not None:
            class_names = read_classes(classes, subject=name)
            checked_classes(labels_N, class_names, subject=name)
    source = FolderSource(Path(root), paths, labels_N, class_names, name=name, kind="list")
    # Files of a folder have names of their own; lines of a list may repeat one.
    source.doubtful_keys = True
    return source


def _lines(path: str) -> tuple[list[str], list[int]]:
    paths: list[str] = []
    labels: list[int] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                where = f"{path}: line {reader.line_num}"
                if not cells or (not paths and cells in (["path"], ["path", "label"])):
                    continue
                if len(cells) > 2 or not cells[0]:
                    raise DataError(
                        f"{where}: expected PATH or PATH,LABEL, found {','.join(cells)[:80]!r}; put a path that has a "
                        "comma into double quotes"
                    )
                paths.append(cells[0])
                labels.append(_label(cells[1], where) if len(cells) == 2 else IGNORE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a list of paths in UTF-8, found: {error}") from error
    return paths, labels


def _label(text: str, where: str) -> int:
    try:
        value = int(text) if text.strip() else IGNORE
    except ValueError:
        value = 1 << 31
    if abs(value) >= 1 << 31:
        raise DataError(
            f"{where}: expected a class number behind the comma, found {text.strip()[:40]!r}; put a path that has a "
            "comma into double quotes"
        )
    return value
