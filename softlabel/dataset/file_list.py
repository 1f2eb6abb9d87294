"""Lists of image files: a `.txt`, `.csv`, `.tsv` or `.jsonl` with an image a line, and perhaps its label.

Legend: N samples.
"""

import os
from pathlib import Path

import numpy as np

from softlabel.dataset.file_list_lines import Asked, read_list
from softlabel.dataset.hard_labels import checked_classes, checked_labels, number_classes, read_classes
from softlabel.dataset.image_folder import FolderSource
from softlabel.errors import SpecError
from softlabel.inputs.base import IGNORE


def open_list(path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> FolderSource:
    """The files that a list names, relative to its own folder or to ``?root=``.

    The key is the path as it is written, without `./` before it. Path and label are separated by a comma, tab,
    semicolon or space; a path with a comma in it stands in double quotes, as CSV has it. A first line that names
    columns (``path,label``, ``file_name``, ...) is a heading, and there may be more columns, in any order;
    ``?image=COLUMN`` and ``?label=COLUMN`` choose. Empty lines and lines that begin with `#` do not count; an empty
    label is none. ``?labels=none`` leaves all unlabelled, ``?classes=FILE`` names the classes, and then a label may be
    such a name.

    Raises:
        SpecError: an option that cannot be understood, or a root that is no folder.
        DataError: a line that is none, or a path that is there twice.
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
    # Files of a folder have names of their own; lines of a list may repeat one.
    source.doubtful_keys = True
    return source
