"""Lists of image files: a `.txt`, `.csv`, `.tsv` or `.jsonl` with an image per line, and optionally its label."""

import os
from pathlib import Path

import numpy as np

from softlabel.dataset.file_list_lines import Asked, read_list
from softlabel.dataset.hard_labels import checked_classes, checked_labels, number_classes, read_classes
from softlabel.dataset.image_folder import FolderSource
from softlabel.errors import SpecError
from softlabel.inputs.base import IGNORE


def open_list(path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> FolderSource:
    """Open the files of a list, relative to its folder or to ``?root=``.

    The key is the path as written, without a leading `./`. A comma, tab, semicolon or space separates path and label; a
    path that contains a comma is quoted as in CSV. A first line with column names (``path,label``, ``file_name``, ...)
    is a heading; further columns are allowed, in any order, and ``?image=COLUMN`` and ``?label=COLUMN`` select. Empty
    lines and lines that begin with `#` are ignored; an empty label means unlabelled. ``?labels=none`` ignores all
    labels. With ``?classes=FILE``, which names the classes, a label may be a name.

    Args:
        path: the list.
        options: of the SOURCE; the ones used are removed.
        name: the source, for errors.
        ignore_labels: leave all samples unlabelled.

    Raises:
        SpecError: an option is wrong, or the root is not a folder.
        DataError: a line cannot be parsed, or a path occurs with two labels.
    """
    wanted, label = options.pop("labels", None), options.pop("label", None)
    if wanted not in (None, "none"):
        raise SpecError(
            f"{name}: labels: expected none, found {wanted!r}; labels follow the paths, after a comma, or '?label=' "
            "names their column"
        )
    root = options.pop("root", None) or os.path.dirname(path)
    if not os.path.isdir(root or "."):
        raise SpecError(f"{name}: root={root}: no such folder")
    classes = options.pop("classes", None)
    unlabelled = ignore_labels or wanted == "none" or label == "none"
    class_names = None if classes is None or unlabelled else read_classes(classes, subject=name)
    asked = Asked(
        image=options.pop("image", None),
        label=None if unlabelled else label,
        unlabelled=unlabelled,
        numbers=number_classes(class_names),
    )
    found = read_list(path, root, asked, name=name)
    labels_N = None
    if any(number != IGNORE for number in found.labels):
        labels_N = checked_labels(np.array(found.labels, dtype=np.int64), name)
        checked_classes(labels_N, class_names, subject=name)
    names = class_names if labels_N is not None else None
    source = FolderSource(Path(root), found.paths, labels_N, names, name=name, kind="list", findings=found.findings)
    source.maybe_repeated_keys = True
    return source
