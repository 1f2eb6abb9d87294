"""Tar shards in the layout of WebDataset: the files of a sample are adjacent and share the name up to its first dot.

Legend: N samples.

One pass over the headers builds an index of 24 bytes and the key per sample; images are then read by offset, in any
order.
"""

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.common.multi_hot import Labels, is_labelled, one_label
from softlabel.dataset.hard_labels import (
    check_labels_named,
    checked_labels,
    name_several,
    number_classes,
    read_classes,
)
from softlabel.dataset.source import ListedSource, span
from softlabel.dataset.storage import Files
from softlabel.dataset.suffixes import IMAGE_SUFFIXES
from softlabel.dataset.tarfile_internals import forget_members
from softlabel.dataset.webdataset_labels import LABEL_BYTES, LabelMember, find_labels
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import Sample

log = logging.getLogger("softlabel")

_NAMES_LOOKED_AT = 10_000  # to find folders that may be classes

# WebDataset's rule: split at the first dot of the last part of the path.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_IMAGES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
_BLOCK = 512
# tar pads to 20 blocks; a concatenated archive begins within this range.
_AFTER_END = 64 << 10
# Bytes that a reader may hold.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """The members of a sample that are its image (None: any image) and its label."""

    image: str | None
    label: LabelMember


@dataclass(slots=True)
class _Group:
    """The members of one sample while its shard is scanned: extension -> (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """The index of one tar file.

    Attributes:
        others: extension -> number of members that are neither image nor label.
        examples: extension -> the first of them, truncated to `LABEL_BYTES`; empty if labels were found.
    """

    keys: pa.Array
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: Labels
    without_image: tuple[str, int] | None
    others: Counter[str]
    examples: dict[str, bytes]


class TarSource(ListedSource):
    """One or several plain tar files, in turn. The key is the path inside, up to the first dot of the name.

    Raises:
        SpecError: an option is wrong.
        DataError: a file is damaged, or a sample, key or label cannot be used.
    """

    kind = "tar"
    repeated_keys_remedy = (
        "put the tar file's name before its keys with '?key=shard', or number the samples with '?key=index'; samples "
        "must differ before the first dot of their names, and their files must follow each other"
    )

    def __init__(self, files: Files, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name, self._files = name, files
        asked, several, classes = options.get("label"), options.get("labels"), options.pop("classes", None)
        names = None if classes is None or ignore_labels else read_classes(classes, subject=name)
        wanted, key = _take_wanted(options, name, ignore_labels, names)
        shards = _scan_files(files, wanted, by_shard=key == "shard")
        self._sizes_F = np.array([files.size(number) for number in range(len(files))], dtype=np.int64)
        counts = [len(shard.offsets) for shard in shards]
        # starts_F[f] is the first sample of file f; the last entry is the length.
        self._starts_F = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._offsets_N = np.concatenate([shard.offsets for shard in shards])
        self._bytes_N = np.concatenate([shard.sizes for shard in shards])
        found = np.concatenate([shard.labels for shard in shards])
        self._labels: Labels = found if wanted.label.fields else checked_labels(found, name)
        if key != "index":
            self._keys = pa.concat_arrays([shard.keys for shard in shards])
        _report_without_image([shard.without_image for shard in shards if shard.without_image], len(self), wanted, name)
        self.has_labels = bool(is_labelled(self._labels).any())
        unknown = [field for at, field in enumerate(wanted.label.fields) if not (found[:, at] >= 0).any()]
        examples = [example for shard in shards for example in shard.examples.items()]
        others = sum((shard.others for shard in shards), Counter[str]())
        first = [] if key == "index" else self.keys(0, min(len(self), _NAMES_LOOKED_AT))
        self.findings = find_labels(wanted.label, self.has_labels, examples, others, first, unknown)
        if (
            (asked is not None or several is not None)
            and wanted.label.extension is not None
            and len(self)
            and not self.has_labels
        ):
            offers = "".join(f"; {offer}" for offer in self.findings.left_out)
            raise SpecError(
                f"{name}: {f'labels={several}' if asked is None else f'label={asked}'}: "
                f"{self.findings.without_labels}; by default a .cls member is the label{offers}"
            )
        self.label_width = len(wanted.label.fields) or None
        self.class_names = name_several(several if wanted.label.fields else None, names, subject=name)
        check_labels_named(self._labels, self.class_names, subject=name)
        if self._keys is not None:
            self.maybe_repeated_keys = True

    def __len__(self) -> int:
        return int(self._starts_F[-1])

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        return self._labels[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows_B = np.asarray(indices, dtype=np.int64)
        assert not len(rows_B) or (rows_B.min() >= 0 and rows_B.max() < len(self)), (rows_B.min(), rows_B.max())
        numbers_B = np.searchsorted(self._starts_F, rows_B, side="right") - 1
        images = self._files.read(numbers_B, self._offsets_N[rows_B], self._bytes_N[rows_B])
        return [
            Sample(key=self.key_at(row), raw=image, label=one_label(self._labels, row))
            for row, image in zip(rows_B.tolist(), images, strict=True)
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


def _take_wanted(
    options: dict[str, str], name: str, ignore_labels: bool, class_names: Sequence[str] | None
) -> tuple[_Wanted, str | None]:
    key = options.pop("key", None)
    if key not in (None, "shard", "index"):
        raise SpecError(
            f"{name}: key: expected 'shard' (the tar's name and '/' before each key) or 'index', found {key!r}"
        )
    label, labels, image = (options.pop(word, None) for word in ("label", "labels", "image"))
    wanted = _Wanted(
        image=image.removeprefix(".").lower() if image is not None else None,
        label=LabelMember.asked(label, labels, number_classes(class_names), name=name, ignored=ignore_labels),
    )
    return wanted, key


def _scan_files(files: Files, wanted: _Wanted, *, by_shard: bool) -> list[_Shard]:
    scan = partial(_scan_file, files, wanted, by_shard=by_shard)
    if files.is_local:
        return [scan(number) for number in range(len(files))]
    # Several files at once hide the latency of each header.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(scan, range(len(files))))


def _scan_file(files: Files, wanted: _Wanted, number: int, *, by_shard: bool) -> _Shard:
    where = files.where(number)
    prefix = f"{files.names[number].rpartition('.')[0]}/" if by_shard else ""
    keys: list[pa.Array] = []
    chunk: list[str] = []
    offsets, sizes, labels, has_label = _Numbers(), _Numbers(), _Numbers(), _Numbers()
    lost, example = 0, ""
    late = _LateLabels(where)
    others: Counter[str] = Counter()
    first: dict[str, tuple[int, int]] = {}
    with files.open(number) as file:
        for group in _iter_groups(file, where, partial(files.describe, number)):
            image = _find_image(group, wanted, where)
            label = _find_label(file, group, wanted.label, where)
            rest = [one for one, place in group.members.items() if place != image and one != wanted.label.extension]
            others.update(rest)
            for extension in rest:
                first.setdefault(extension, group.members[extension])
            if image is None:
                lost, example = lost + 1, example or f"{group.key} with {', '.join(group.members)}"
                if label is not None:
                    late.add(prefix + group.key, label)
                continue
            chunk.append(prefix + group.key)
            offsets.add(image[0])
            sizes.add(image[1])
            stored = wanted.label.none if label is None else label
            for number_or_flag in stored if isinstance(stored, list) else [stored]:
                labels.add(number_or_flag)
            has_label.add(label is not None)
            if len(chunk) == _Numbers.CHUNK:
                keys.append(_make_keys(chunk, where))
                chunk = []
        keys.append(_make_keys(chunk, where))
        all_keys, found = pa.concat_arrays(keys), labels.array()
        classes = len(wanted.label.fields)
        labels_N: Labels = found.astype(np.int8).reshape(-1, classes) if classes else found
        lost -= late.join(all_keys, labels_N, has_label.array().astype(np.bool_))
        unknown = wanted.label.extension is not None and not is_labelled(labels_N).any()
        examples = {extension: _read_head(file, place) for extension, place in first.items()} if unknown else {}
    return _Shard(
        keys=all_keys,
        offsets=offsets.array(),
        sizes=sizes.array(),
        labels=labels_N,
        without_image=(f"{where}: {example}", lost) if lost else None,
        others=others,
        examples=examples,
    )


def _read_head(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(min(place[1], LABEL_BYTES))


def _iter_groups(file: BinaryIO, where: str, describe: Callable[[], str | None]) -> Iterator[_Group]:
    """Yield adjacent members that share a key, in the order of the file."""
    group: _Group | None = None
    for member in _iter_members(file, where, describe):
        found = None if _META.match(member.name) else _NAME.fullmatch(member.name)
        if not member.isreg():
            if found is not None and found[2].lower() in _IMAGES and (member.islnk() or member.issym()):
                raise DataError(
                    f"{where}: {member.name}: expected a file, found a link to {member.linkname}; write the archive "
                    "with 'tar --dereference --hard-dereference'"
                )
            continue
        if found is None:
            continue
        # "tar cf x.tar ." writes "./a.jpg": the same file as "a.jpg".
        key, extension = found[1].removeprefix("./"), found[2].lower()
        if member.issparse():
            raise DataError(f"{where}: {member.name} is a sparse file; write the archive without 'tar --sparse'")
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = _Group(key)
        if extension in group.members:
            raise DataError(
                f"{where}: {key}.{extension} occurs twice; WebDataset splits names at the first dot, so the names of "
                "samples must differ before it"
            )
        group.members[extension] = (member.offset_data, member.size)
    if group is not None:
        yield group


def _iter_members(file: BinaryIO, where: str, describe: Callable[[], str | None]) -> Iterator[tarfile.TarInfo]:
    """Yield all members and check the end of the archive: tarfile treats a damaged header as the end."""
    damaged = f"{where}: expected a tar file, found a damaged or truncated one"
    remedy = "fetch or write it again"
    try:
        with tarfile.TarFile(fileobj=file, mode="r", errorlevel=2) as archive:
            while (member := archive.next()) is not None:
                forget_members(archive)
                yield member
            end = archive.offset
        file.seek(end)
        rest = file.read(_AFTER_END)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if (what := describe()) is not None:
            raise DataError(f"{where}: expected a tar file, found {what}") from None
        raise DataError(f"{damaged}: {error}; {remedy}") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
    if len(rest) < _BLOCK or rest[:_BLOCK].strip(b"\0"):
        raise DataError(f"{damaged} at byte {end}: no end-of-archive mark; {remedy}")
    if rest.strip(b"\0"):
        raise DataError(f"{where}: another archive follows at byte {end}; write each archive to a separate file")


def _find_image(group: _Group, wanted: _Wanted, where: str) -> tuple[int, int] | None:
    if wanted.image is not None:
        return group.members.get(wanted.image)
    images = [extension for extension in group.members if extension in _IMAGES]
    if len(images) > 1:
        raise DataError(f"{where}: {group.key} has several images: {', '.join(images)}; choose with '?image=EXTENSION'")
    return group.members[images[0]] if images else None


def _find_label(file: BinaryIO, group: _Group, wanted: LabelMember, where: str) -> int | list[int] | None:
    """Return the label in the members of a sample (see `LabelMember.parse`); None without a label member."""
    place = group.members.get(wanted.extension) if wanted.extension is not None else None
    if place is None:
        return None
    file.seek(place[0])
    return wanted.parse(file.read(min(place[1], LABEL_BYTES)), f"{where}: {group.key}.{wanted.extension}")


class _LateLabels:
    """Labels that are not adjacent to their images, as `tar cf x.tar *.jpg *.cls` writes them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._labels: dict[str, int | list[int]] = {}

    def add(self, key: str, label: int | list[int]) -> None:
        if self._labels.setdefault(key, label) != label:
            raise DataError(f"{self._where}: {key} has two labels, {self._labels[key]} and {label}; keep one")

    def join(self, keys: pa.Array, labels_N: Labels, has_label_N: NDArray[np.bool_]) -> int:
        """Set the labels of their samples in place; return how many."""
        if not self._labels:
            return 0
        joined = 0
        for place, key in enumerate(keys):  # a list of all keys would need far more memory
            label = self._labels.get(str(key))
            if label is None:
                continue
            if has_label_N[place] and np.any(labels_N[place] != label):
                raise DataError(f"{self._where}: {key} has two labels, {labels_N[place]} and {label}; keep one")
            labels_N[place] = label
            joined += 1
        return joined


def _report_without_image(lost: list[tuple[str, int]], found: int, wanted: _Wanted, name: str) -> None:
    """Warn about samples without an image; raise DataError if no sample has one, SpecError if ``image=`` chose them."""
    if not lost:
        return
    number, example = sum(count for _, count in lost), lost[0][0]
    if not found:
        raise (SpecError if wanted.image else DataError)(
            f"{name}: none of the {number} samples has {f'a .{wanted.image} member' if wanted.image else 'an image'}, "
            f"the first: {example}; name it with '?image=EXTENSION' (WebDataset splits names at the first dot)"
        )
    log.warning("%s: %d samples without an image are left out, the first: %s", name, number, example)


def _make_keys(keys: list[str], where: str) -> pa.Array:
    try:
        return pa.array(keys, type=pa.large_string())
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a name is not valid Unicode: {error.object!r}; rename the file") from error


class _Numbers:
    """A growing int64 array, with 8 bytes per number of a full chunk."""

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
