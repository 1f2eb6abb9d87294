"""Folders of image files, labelled by their sub-folders or unlabelled."""

import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.common.multi_hot import Labels, is_labelled, one_label
from softlabel.common.spec import quote_path
from softlabel.dataset.file_list_lines import peek_list
from softlabel.dataset.findings import Findings, count_suffixes, some
from softlabel.dataset.hard_labels import read_classes, usual_labels
from softlabel.dataset.source import ListedSource, span
from softlabel.dataset.suffixes import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, LIST_SUFFIXES, suffix_of
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE, Sample

# Folders made by archives (macOS), file systems (ext4, NTFS) and network drives (Synology, QNAP).
SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "#recycle", "@Recycle"}
) | {"__pycache__"}
_LISTS_LOOKED_INTO = 20
# Errors of the machine or the share: skipping the image would skip all following ones.
_NOT_THE_IMAGES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}


class FolderSource(ListedSource):
    """Files below a root; the key is the relative path with forward slashes.

    Raises:
        DataError: a file name is not valid Unicode.
    """

    kind = "folder"
    repeated_keys_remedy = "name each file once"

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Labels | None = None,
        class_names: tuple[str, ...] | None = None,
        *,
        name: str,
        kind: str = "folder",
        findings: Findings | None = None,
    ) -> None:
        self.findings = findings or Findings()
        self.root, self.name, self.kind = root, name, kind
        try:
            self._keys = pa.array(paths, type=pa.large_string())
        except UnicodeEncodeError as error:
            remedy = "rename the file"
            if sys.getfilesystemencoding().lower() != "utf-8":
                remedy = f"the locale reads names as {sys.getfilesystemencoding()}: start with PYTHONUTF8=1"
            raise DataError(f"{name}: a file name is not valid Unicode: {error.object!r}; {remedy}") from error
        self._length = len(paths)
        self._labels = labels
        self.class_names = class_names
        self.label_width = labels.shape[1] if labels is not None and labels.ndim == 2 else None
        self.has_labels = labels is not None and bool(is_labelled(labels).any())

    def __len__(self) -> int:
        return self._length

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        if self._labels is None:
            return np.full(stop - start, IGNORE, dtype=np.int64)
        return self._labels[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        samples = []
        for index in map(int, indices):
            key = self.key_at(index)
            label = IGNORE if self._labels is None else one_label(self._labels, index)
            samples.append(Sample(key=key, raw=self._bytes(key), label=label))
        return samples

    def _bytes(self, key: str) -> bytes | BadImageError:
        try:
            with open(self.root / key, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            if error.errno in _NOT_THE_IMAGES_FAULT or not self.root.is_dir():
                raise DataError(f"{self.root / key}: cannot be read: {error.strerror}") from error
            return BadImageError(f"cannot be read: {error.strerror}")


def open_folder(
    root: Path,
    paths: Sequence[str],
    name: str,
    options: dict[str, str],
    *,
    others: Sequence[str] = (),
    skipped: Sequence[str] = (),
    ignore_labels: bool = False,
) -> FolderSource:
    """Make a source of image files.

    Sub-folders are **class folders** if at least two direct ones hold images and most images lie directly in one. The
    label is then the index of the path's first folder among the sub-folders with images, sorted by name, as in
    torchvision; images outside of them are unlabelled. ``?labels=folders`` uses the first folder of the path as the
    class at any depth; ``?labels=none`` ignores folders; ``?classes=FILE`` names the class folders in label order, one
    per line, with or without images.

    Args:
        root: the folder.
        paths: image files found by `walk`.
        name: the source, for errors.
        options: of the SOURCE; the ones used are removed.
        others: other files, to report.
        skipped: hidden and system files and folders, to report.
        ignore_labels: leave all samples unlabelled.

    Raises:
        SpecError: an option is wrong, such as ``labels=folders`` with an image outside of folders, or `classes`
            without a folder.
    """
    wanted, classes = options.pop("labels", "auto"), options.pop("classes", None)
    if wanted not in ("auto", "folders", "none"):
        raise SpecError(f"{name}: labels: expected folders or none, found {wanted!r}")
    if wanted == "none" and classes is not None:
        raise SpecError(f"{name}: classes= names the class folders, labels=none ignores them; give one of them")
    named = None if classes is None or ignore_labels else read_classes(classes, subject=name)
    paths = sorted(paths)
    left_out, notes = _report_others(others, skipped)
    if not ignore_labels and wanted != "none":
        left_out += _offer_lists(root, others)
    if ignore_labels:
        wanted = "none"
    without = "labels are ignored, as requested" if wanted == "none" else "its images lie in no sub-folders"
    loose = [path for path in paths if "/" not in path]
    if wanted == "folders" and loose and not ignore_labels:
        raise SpecError(f"{name}: labels=folders, but {loose[0]!r} lies in no sub-folder; move it into one")
    deep = [path for path in paths if path.count("/") > 1]
    if wanted == "auto":
        wanted = "folders" if named or _are_classes(paths, len(loose), len(deep)) else "none"
        if wanted == "none" and len(loose) < len(paths):
            without = "its sub-folders are not used as classes"
            left_out.append(
                "its sub-folders are not used as classes (most images do not lie directly in one of two or more); "
                "'?labels=folders' uses the first folder of a path as the class, '?labels=none' confirms that there "
                "are none"
            )
        for some_of, what, remedy in (
            (loose, f"in no class folder and {_conjugate_get(loose)} no hard label", "move them into one, or away"),
            (
                deep,
                f"deeper than in a class folder and {_conjugate_get(deep)} the label of the first folder of the path",
                "'?labels=none' ignores folders",
            ),
        ):
            if wanted == "folders" and some_of:
                lie = "1 image lies" if len(some_of) == 1 else f"{len(some_of):,} images lie"
                left_out.append(f"{lie} {what}: {some(some_of)}; {remedy}")
    if wanted == "none":
        findings = Findings(without_labels=without, left_out=tuple(left_out), notes=tuple(notes))
        return FolderSource(root, paths, name=name, findings=findings)
    holding = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if named is None:
        if empty := sorted(set(_list_folders(root)) - set(holding)):
            left_out.append(
                f"sub-folders without images are not classes: {some(empty)}; '?classes=FILE' names the class folders, "
                "one per line, with or without images"
            )
    elif odd := sorted(set(holding) - set(named)):
        raise SpecError(
            f"{name}: classes={classes}: expected a line for each of the {len(holding)} folders with images, found "
            f"none for {some(odd)}; add it, or move the folder away"
        )
    class_names = tuple(holding) if named is None else named
    number = {class_name: label for label, class_name in enumerate(class_names)}
    labels = np.array([number[path.partition("/")[0]] if "/" in path else IGNORE for path in paths], dtype=np.int64)
    findings = Findings(labels_from="the class folders", left_out=tuple(left_out), notes=tuple(notes))
    return FolderSource(root, paths, labels, class_names, name=name, findings=findings)


def _are_classes(paths: Sequence[str], loose: int, deep: int) -> bool:
    """Whether at least two folders directly hold images, and most images lie in such a folder."""
    direct = {path.partition("/")[0] for path in paths if path.count("/") == 1}
    return len(direct) > 1 and 2 * (len(paths) - loose - deep) > len(paths)


def _conjugate_get(some_of: Sequence[str]) -> str:
    return "gets" if len(some_of) == 1 else "get"


def _list_folders(root: Path) -> list[str]:
    return [entry.name for entry in os.scandir(root) if entry.is_dir() and not is_technical(entry.name)]


def _report_others(others: Sequence[str], skipped: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return warnings about files that may be images, and notes about other files."""
    left_out, notes = [], []
    images = [name for name in others if suffix_of(name) in FOREIGN_SUFFIXES]
    bare = [name for name in others if not suffix_of(name)]
    rest = [name for name in others if suffix_of(name) and suffix_of(name) not in FOREIGN_SUFFIXES]
    if images:
        left_out.append(
            f"{len(images):,} image{'s' if len(images) > 1 else ''} of formats that are not read left out "
            f"({count_suffixes(images)}), the first: {images[0]!r}; convert to JPEG or PNG"
        )
    if bare:
        left_out.append(
            f"{len(bare):,} file{'s' if len(bare) > 1 else ''} without a suffix left out, the first: {bare[0]!r}; if "
            "they are images, name them in a list: '--data LIST.txt', one path per line"
        )
    if rest:
        notes.append(f"other files, not read: {count_suffixes(rest)}")
    if skipped:
        notes.append(f"hidden and system files, never read: {some(sorted(skipped))}")
    return left_out, notes


def _offer_lists(root: Path, others: Sequence[str]) -> list[str]:
    """Return warnings about lists with labels beside the images, such as the `metadata.csv` of Hugging Face."""
    offers = []
    lists = sorted(
        (name for name in others if suffix_of(name) in LIST_SUFFIXES), key=lambda name: (name.count("/"), name)
    )
    for name in lists[:_LISTS_LOOKED_INTO]:
        columns = peek_list(str(root / name))
        if columns is None:
            continue
        taken = quote_path(str(root / name))
        if not columns or usual_labels(columns):
            offers.append(
                f"{name!r} lists images with labels, which are not read; --data {shlex.quote(taken)} uses them"
            )
        else:
            offers.append(
                f"{name!r} lists images with columns {', '.join(columns)}, which are not read; if one of them is the "
                f"label, --data {shlex.quote(f'{taken}?label=COLUMN')} uses it"
            )
    return offers


def is_technical(name: str) -> bool:
    """Whether a file or folder is hidden, or made by an archive or a file system."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def walk(
    root: Path, *, below: str = "", above: frozenset[tuple[int, int]] = frozenset(), skipped: list[str] | None = None
) -> Iterator[str]:
    """Yield the paths of all files below a root, relative to it, with forward slashes, except those `is_technical`.

    Links to folders are followed, except to a folder that contains them.

    Args:
        root: the folder.
        below, above: for the recursion.
        skipped: receives technical folders and hidden images.

    Raises:
        DataError: a folder cannot be read.
    """
    folder = root / below
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        try:
            is_folder = entry.is_dir()
        except OSError as error:
            if is_technical(entry.name):
                continue
            raise DataError(f"{root / path}: cannot be read: {error.strerror}; remove it") from error
        if is_technical(entry.name) and (is_folder or entry.name.startswith(".")):
            # macOS writes "._x.jpg" beside x.jpg.
            of_images = suffix_of(entry.name) in IMAGE_SUFFIXES and not entry.name.startswith("._")
            if skipped is not None and (is_folder or of_images):
                skipped.append(f"{path}/" if is_folder else path)
        elif is_folder:
            yield from walk(root, below=path, above=above | {identity}, skipped=skipped)
        elif entry.is_file():
            yield path
