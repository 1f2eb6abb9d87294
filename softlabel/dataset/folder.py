"""Folders of image files, labelled by their sub-folders or not at all."""

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.dataset.base import IGNORE, Sample, span
from softlabel.dataset.listed import ListedSource
from softlabel.errors import BadImageError, DataError, SpecError

log = logging.getLogger("softlabel")

_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif .mpo"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
# The machine's or the share's trouble, not the image's: to skip the image would skip all that follow.
_NOT_THE_IMAGES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}


class FolderSource(ListedSource):
    """Files below a root; the key is the path relative to it, with forward slashes. One Arrow array holds the paths."""

    kind = "folder"
    against_equal_keys = "name each file once"

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: NDArray[np.int64] | None = None,
        class_names: tuple[str, ...] | None = None,
        *,
        name: str,
        kind: str = "folder",
    ) -> None:
        self.root, self.name, self.kind = root, name, kind
        try:
            self._keys = pa.array(paths, type=pa.large_string())
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: a file name is not valid Unicode: {error.object!r}; rename the file") from error
        self._length = len(paths)
        self._labels = labels
        self.class_names = class_names
        self.has_labels = labels is not None and bool((labels != IGNORE).any())

    def __len__(self) -> int:
        return self._length

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        start, stop = span(start, stop, len(self))
        if self._labels is None:
            return np.full(stop - start, IGNORE, dtype=np.int64)
        return self._labels[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        samples = []
        for index in map(int, indices):
            key = self.key_at(index)
            label = IGNORE if self._labels is None else int(self._labels[index])
            samples.append(Sample(key=key, image=self._bytes(key), label=label))
        return samples

    def _bytes(self, key: str) -> bytes | BadImageError:
        try:
            with open(self.root / key, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            if error.errno in _NOT_THE_IMAGES_FAULT or not self.root.is_dir():
                raise DataError(f"{self.root / key}: cannot be read: {error.strerror}") from error
            return BadImageError(f"cannot be read: {error.strerror}")


def open_folder(root: Path, paths: Sequence[str], name: str, options: dict[str, str]) -> FolderSource:
    """A source out of the image files that `walk` has found below `root`.

    They are **class folders** if every image lies in a direct sub-folder of the root and at least two of these hold
    images: the label is the folder's place among all sub-folders sorted by name, empty ones included, as torchvision's.
    Else they are unlabelled. ``?labels=folders`` takes the first folder of the path as the class at any depth;
    ``?labels=none`` leaves them unlabelled.

    Raises:
        SpecError: `labels` is something else.
        DataError: ``labels=folders`` and an image that lies in none.
    """
    wanted = options.pop("labels", "auto")
    if wanted not in ("auto", "folders", "none"):
        raise SpecError(f"{name}: labels: expected folders or none, found {wanted!r}")
    paths = sorted(paths)
    if wanted == "auto":
        depths = {path.count("/") for path in paths}
        with_images = {path.partition("/")[0] for path in paths}
        wanted = "folders" if depths == {1} and len(with_images) > 1 else "none"
        if wanted == "none" and depths != {0}:
            log.warning(
                "%s: its sub-folders are not taken for classes (some image lies elsewhere than in one of two or more); "
                "'?labels=folders' takes the first folder of a path as the class, '?labels=none' says that it is not",
                name,
            )
    if wanted == "none":
        return FolderSource(root, paths, name=name)
    loose = next((path for path in paths if "/" not in path), None)
    if loose is not None:
        raise DataError(f"{name}: labels=folders, but {loose!r} lies in no sub-folder; move it into one")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    number = {class_name: label for label, class_name in enumerate(classes)}
    labels = np.array([number[path.partition("/")[0]] for path in paths], dtype=np.int64)
    return FolderSource(root, paths, labels, tuple(classes), name=name)


def walk(root: Path, *, below: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Paths of all files below a root, relative to it, with forward slashes; nothing whose name begins with a dot.

    Links to folders are followed, unless they lead back to a folder on the way.
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
        if entry.name.startswith("."):
            continue
        path = f"{below}/{entry.name}" if below else entry.name
        try:
            is_folder = entry.is_dir()
        except OSError as error:
            raise DataError(f"{root / path}: cannot be read: {error.strerror}; remove it") from error
        if is_folder:
            yield from walk(root, below=path, above=above | {identity})
        elif entry.is_file():
            yield path
