"""Lists of image files: a `.txt`, `.csv`, `.tsv` or `.jsonl` with an image per line, and optionally its label."""

import os
from pathlib import Path

from softlabel.common.multi_hot import is_labelled
from softlabel.dataset.file_list_lines import Asked, read_list
from softlabel.dataset.hard_labels import check_labels_named, name_several, number_classes, read_classes
from softlabel.dataset.image_folder import FolderSource
from softlabel.dataset.multi_hot_columns import stack_parsed
from softlabel.errors import SpecError


def open_list(path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> FolderSource:
    """Open the files of a list, relative to its folder or to ``?root=``.

    The key is the path as written, without a leading `./`. A comma, tab, semicolon or space separates path and label; a
    path that contains a comma is quoted as in CSV. A first line with column names (``path,label``, ``file_name``, ...)
    is a heading; further columns are allowed, in any order, and ``?image=COLUMN`` and ``?label=COLUMN`` select. Empty
    lines and lines that begin with `#` are ignored; an empty label means unlabelled. ``?labels=COLUMN,COLUMN`` are
    columns of several classes at once, ``?labels=none`` ignores all labels. With ``?classes=FILE``, which names the
    classes, a label may be a name.

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
    if wanted not in (None, "none") and "," not in wanted:
        raise SpecError(
            f"{name}: labels: expected none, or several columns that say 0 or 1 for a class each, found {wanted!r}; "
            "class numbers follow the paths, after a comma, or '?label=' names their column"
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
        labels=None if unlabelled else wanted,
        unlabelled=unlabelled,
        numbers=number_classes(class_names),
    )
    found = read_list(path, root, asked, name=name)
    labels = stack_parsed(found.labels, name)
    class_names = name_several(asked.labels, class_names, subject=name)
    check_labels_named(labels, class_names, subject=name)
    known = labels if is_labelled(labels).any() else None
    names = None if known is None else class_names
    source = FolderSource(Path(root), found.paths, known, names, name=name, kind="list", findings=found.findings)
    source.maybe_repeated_keys = True
    return source
