"""Tar shards as WebDataset writes them: the files of a sample follow each other and share a name up to its first dot.

Legend: N samples.

One pass over the headers notes where each image lies; afterwards images are read by offset, in any order. The index
takes 24 bytes and the key for each sample, in numpy and Arrow arrays.
"""

import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.dataset.annotated import checked_classes, checked_labels, read_classes
from softlabel.dataset.base import IGNORE, Sample, span
from softlabel.dataset.files import Files
from softlabel.dataset.folder import IMAGE_SUFFIXES
from softlabel.dataset.listed import ListedSource
from softlabel.errors import DataError, SpecError

log = logging.getLogger("softlabel")

# WebDataset's own rule: everything up to the first dot of the last part, and what follows that dot.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
_BLOCK = 512
# tar fills up to 20 blocks; a second archive behind the first one begins within.
_AFTER_END = 64 << 10
_LABEL_BYTES = 1 << 20
# What a reader may hold at a time.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """Which members of a sample are its image and its label; None: any image, `.cls`, no label."""

    image: str | None
    field: str | None
    labelled: bool


@dataclass(slots=True)
class _Group:
    """The members of one sample while its shard is scanned: extension -> (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """The index of one tar file."""

    keys: pa.Array
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    without_image: tuple[str, int] | None


class TarSource(ListedSource):
    """One or several plain tar files, one after the other. The key is the path inside, up to the name's first dot."""

    kind = "tar"
    against_equal_keys = (
        "put the tar file's name before its keys with '?key=shard', or number the samples with '?key=index'; samples "
        "must differ before the first dot of their names, and their files must follow each other"
    )

    def __init__(self, files: Files, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name, self._files = name, files
        wanted, key = _take_wanted(options, name, ignore_labels)
        classes = options.pop("classes", None)
        shards = _scan_all(files, wanted, by_shard=key == "shard")
        self._sizes_F = np.array([files.size(number) for number in range(len(files))], dtype=np.int64)
        counts = [len(shard.offsets) for shard in shards]
        # starts_F[f] is the first sample of file f; one more at the end for the length.
        self._starts_F = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._offsets_N = np.concatenate([shard.offsets for shard in shards])
        self._bytes_N = np.concatenate([shard.sizes for shard in shards])
        self._labels_N = checked_labels(np.concatenate([shard.labels for shard in shards]), name)
        if key != "index":
            self._keys = pa.concat_arrays([shard.keys for shard in shards])
        _tell_without_image([shard.without_image for shard in shards if shard.without_image], len(self), wanted, name)
        self.has_labels = bool((self._labels_N != IGNORE).any())
        if wanted.field is not None and len(self) and not self.has_labels:
            raise DataError(
                f"{name}: label={wanted.field}: no sample has a .json member with an integer there; a .cls member is "
                "the label without any option"
            )
        if classes is not None and not ignore_labels:
            self.class_names = read_classes(classes, subject=name)
            checked_classes(self._labels_N, self.class_names, subject=name)
        if self._keys is not None:
            self.doubtful_keys = True

    def __len__(self) -> int:
        return int(self._starts_F[-1])

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        start, stop = span(start, stop, len(self))
        return self._labels_N[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows_B = np.asarray(indices, dtype=np.int64)
        assert not len(rows_B) or (rows_B.min() >= 0 and rows_B.max() < len(self)), (rows_B.min(), rows_B.max())
        numbers_B = np.searchsorted(self._starts_F, rows_B, side="right") - 1
        images = self._files.read(numbers_B, self._offsets_N[rows_B], self._bytes_N[rows_B])
        return [
            Sample(key=self.key_at(row), image=image, label=label)
            for row, image, label in zip(rows_B.tolist(), images, self._labels_N[rows_B].tolist(), strict=True)
        ]

    def blocks(self) -> list[tuple[int, int]]:
        """As in `Source`: a tar file, or as much of one as fits into `BLOCK_BYTES`."""
        found = []
        for first, last in zip(self._starts_F[:-1].tolist(), self._starts_F[1:].tolist(), strict=True):
            while first < last:
                # Offsets grow within a file, so the bytes from the first one on say where the block is full.
                taken = self._offsets_N[first:last] + self._bytes_N[first:last] - self._offsets_N[first]
                stop = first + max(int(np.searchsorted(taken, BLOCK_BYTES, side="right")), 1)
                found.append((first, stop))
                first = stop
        return found


def _take_wanted(options: dict[str, str], name: str, ignore_labels: bool) -> tuple[_Wanted, str | None]:
    key = options.pop("key", None)
    if key not in (None, "shard", "index"):
        raise SpecError(
            f"{name}: key: expected 'shard' (the tar's name and '/' before each key) or 'index', found {key!r}"
        )
    label, image = options.pop("label", None), options.pop("image", None)
    wanted = _Wanted(
        image=image.removeprefix(".").lower() if image is not None else None,
        field=None if ignore_labels or label == "none" else label,
        labelled=not ignore_labels and label != "none",
    )
    return wanted, key


# ---- one pass over the headers ----


def _scan_all(files: Files, wanted: _Wanted, *, by_shard: bool) -> list[_Shard]:
    scan = partial(_scan, files, wanted, by_shard=by_shard)
    if files.is_local:
        return [scan(number) for number in range(len(files))]
    # Behind a URL each header waits for the network, so several files are on the way at once.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(scan, range(len(files))))


def _scan(files: Files, wanted: _Wanted, number: int, *, by_shard: bool) -> _Shard:
    where = files.where(number)
    prefix = f"{files.names[number].rpartition('.')[0]}/" if by_shard else ""
    keys: list[pa.Array] = []
    chunk: list[str] = []
    offsets, sizes, labels = _Numbers(), _Numbers(), _Numbers()
    lost, example = 0, ""
    with files.open(number) as file:
        for group in _groups(file, where):
            image = _image_of(group, wanted, where)
            if image is None:
                lost, example = lost + 1, example or f"{group.key} with {', '.join(group.members)}"
                continue
            chunk.append(prefix + group.key)
            offsets.add(image[0])
            sizes.add(image[1])
            labels.add(_label_of(file, group, wanted, where))
            if len(chunk) == _Numbers.CHUNK:
                keys.append(_strings(chunk, where))
                chunk = []
    keys.append(_strings(chunk, where))
    return _Shard(
        keys=pa.concat_arrays(keys),
        offsets=offsets.array(),
        sizes=sizes.array(),
        labels=labels.array(),
        without_image=(f"{where}: {example}", lost) if lost else None,
    )


def _groups(file: BinaryIO, where: str) -> Iterator[_Group]:
    """Members that follow each other and share a key, in the order of the file."""
    group: _Group | None = None
    for member in _members(file, where):
        found = None if _META.match(member.name) else _NAME.fullmatch(member.name)
        if not member.isreg():
            if found is not None and found[2].lower() in _IMAGES and (member.islnk() or member.issym()):
                raise DataError(
                    f"{where}: {member.name} is a link to {member.linkname}, which has no bytes of its own here; write "
                    "it with 'tar --dereference --hard-dereference'"
                )
            continue
        if found is None:
            continue
        # "tar cf x.tar ." writes "./a.jpg": the same file as "a.jpg".
        key, extension = found[1].removeprefix("./"), found[2].lower()
        if member.issparse():
            raise DataError(f"{where}: {member.name} is stored as a sparse file; write it without 'tar --sparse'")
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key)
        if extension in group.members:
            raise DataError(
                f"{where}: {key}.{extension} is there twice; WebDataset cuts names at the first dot, so the names of "
                "samples must differ before it"
            )
        group.members[extension] = (member.offset_data, member.size)
    if group is not None:
        yield group


def _members(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    """All members, and an error unless the archive ends as one does: tarfile takes a damaged header for its end."""
    damaged = f"{where}: expected a tar file, found one that is damaged or cut off"
    cure = "fetch or write it again"
    try:
        with tarfile.TarFile(fileobj=file, mode="r", errorlevel=2) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                yield member
            end = archive.offset
        file.seek(end)
        rest = file.read(_AFTER_END)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"{damaged}: {error}; {cure}") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
    if len(rest) < _BLOCK or rest[:_BLOCK].strip(b"\0"):
        raise DataError(f"{damaged} at byte {end}: no end-of-archive mark; {cure}")
    if rest.strip(b"\0"):
        raise DataError(
            f"{where}: another archive follows behind the end of the first one, at byte {end}; put each into a file of "
            "its own"
        )


def _image_of(group: _Group, wanted: _Wanted, where: str) -> tuple[int, int] | None:
    if wanted.image is not None:
        return group.members.get(wanted.image)
    images = [extension for extension in group.members if extension in _IMAGES]
    if len(images) > 1:
        raise DataError(f"{where}: {group.key} has several images: {', '.join(images)}; choose with '?image=EXTENSION'")
    return group.members[images[0]] if images else None


def _label_of(file: BinaryIO, group: _Group, wanted: _Wanted, where: str) -> int:
    extension = "json" if wanted.field is not None else "cls"
    place = group.members.get(extension) if wanted.labelled else None
    if place is None:
        return IGNORE
    file.seek(place[0])
    raw = file.read(min(place[1], _LABEL_BYTES))
    member = f"{where}: {group.key}.{extension}"
    if wanted.field is None:
        try:
            return _class_number(int(raw))
        except ValueError:
            raise DataError(
                f"{member}: expected a class number, found {raw[:20]!r}; mend it, or go without: '?label=none'"
            ) from None
    try:
        found = json.loads(raw)
        value = found.get(wanted.field) if isinstance(found, dict) else found
    except ValueError as error:
        raise DataError(f"{member}: expected JSON: {error}") from None
    if value is None:
        return IGNORE
    try:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        return _class_number(value)
    except ValueError:
        raise DataError(
            f"{member}: {wanted.field}: expected a class number or null, found {str(value)[:20]!r}; name another field"
        ) from None


def _class_number(value: int) -> int:
    if abs(value) >= 1 << 31:
        raise ValueError
    return value


def _tell_without_image(lost: list[tuple[str, int]], found: int, wanted: _Wanted, name: str) -> None:
    """Other files may lie beside the images; but not instead of them."""
    if not lost:
        return
    number, example = sum(count for _, count in lost), lost[0][0]
    if not found:
        raise DataError(
            f"{name}: none of the {number} samples has {f'a .{wanted.image} member' if wanted.image else 'an image'}, "
            f"the first: {example}; name it with '?image=EXTENSION' (WebDataset cuts names at the first dot)"
        )
    log.warning("%s: %d samples without an image are left out, the first: %s", name, number, example)


def _strings(keys: list[str], where: str) -> pa.Array:
    try:
        return pa.array(keys, type=pa.large_string())
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a name is not valid Unicode: {error.object!r}; rename the file") from error


class _Numbers:
    """A growing int64 array, 8 bytes a number once a chunk is full."""

    CHUNK = 1 << 16

    def __init__(self) -> None:
        self._full: list[NDArray[np.int64]] = []
        self._last: list[int] = []

    def add(self, number: int) -> None:
        self._last.append(number)
        if len(self._last) == self.CHUNK:
            self._full.append(np.array(self._last, dtype=np.int64))
            self._last = []

    def array(self) -> NDArray[np.int64]:
        return np.concatenate([*self._full, np.array(self._last, dtype=np.int64)])
