"""The interface of sources: ordered samples with unique string keys, read in batches.

Legend: N samples. Labels are int64, `IGNORE` for none, or multi-hot.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from softlabel.common.hashing import Hasher
from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, is_labelled
from softlabel.dataset.duplicates import Repeated
from softlabel.dataset.findings import Findings
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import AS_USUAL, Decoding, InputKind, Sample
from softlabel.inputs.image_decode import IMAGES

BLOCK = 4096
TRIED = 100  # samples tried until one can be read
COLUMN_REMEDY = "name another column with '?key=COLUMN', or number the samples with '?key=index'"  # of repeated keys
_CHUNK = 65536
_KINDS = {"parquet", "table", "text", "tar", "array", "list", "folder", "torchvision", "digits"}


# Path, bytes and time of the last change in nanoseconds.
FileStamp: TypeAlias = tuple[str, int, int]


def stamp_files(paths: Sequence[str]) -> tuple[FileStamp, ...] | None:
    """Return the stamps of files; None if one cannot be found."""
    try:
        found = [(path, os.stat(path)) for path in paths]
    except OSError:
        return None
    return tuple((path, status.st_size, status.st_mtime_ns) for path, status in found)


class Source(ABC):
    """An ordered collection of samples. Picklable; opens its files in the process that reads.

    The order is fixed: sample i is the same in every process and run. Data without an order, such as a stream, is
    refused.

    Attributes:
        kind: parquet, table, text, tar, array, list, folder, torchvision, digits or dataset.
        name: as the user wrote it.
        resolved_name: the same as a store records it, if what the user wrote depends on the file (``inputs=*``).
        class_names: if known; label i is class_names[i].
        has_labels: whether a sample has a label.
        label_width: number of classes if a sample may have several at once, and its label is 1, 0 or -1 (unknown) for
            each; None if a label is a class number.
        findings: where the labels come from, and what was left out.
        decoding: how images are decoded.
        inputs: kind of the samples.
        maybe_repeated_keys: whether two keys may be equal, before `fingerprint` checks them.
        keys_are_named: whether the user named what holds the keys: equal ones are then a wrong option.
        repeated_keys_remedy: what a user can do about equal keys.
        lengths: of documents of tokens, int32 (N,): how many tokens each has, 0 for a bad one; None for other samples.
    """

    kind: str
    name: str
    resolved_name: str | None = None
    class_names: tuple[str, ...] | None = None
    has_labels: bool = False
    label_width: int | None = None
    findings: Findings = Findings()
    decoding: Decoding = AS_USUAL
    inputs: InputKind = IMAGES
    maybe_repeated_keys: bool = False
    keys_are_named: bool = False
    repeated_keys_remedy: str = "give a key_fn that distinguishes them"
    lengths: NDArray[np.int32] | None = None
    _fingerprint: str | None = None

    def copy_attributes(self, base: "Source") -> None:
        """Take over the attributes of a source that this one wraps."""
        self.kind, self.name, self.findings = base.kind, base.name, base.findings
        self.resolved_name = base.resolved_name
        self.decoding, self.inputs = base.decoding, base.inputs
        self.class_names, self.has_labels, self.label_width = base.class_names, base.has_labels, base.label_width

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return the keys of samples `start` to `stop`, which are unique in the source."""

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        """Return the same keys as two flat arrays, which is fast if the source has them in this form.

        Raises:
            DataError: a key is not Unicode text, or longer than a store takes.
        """
        return Keys.of(self.keys(start, stop))

    @abstractmethod
    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        """Return the labels of samples `start` to `stop`: int64 (n,), -100 for none; or int8 (n, `label_width`)."""

    def highest_label(self) -> int:
        """Return the highest class number, also of samples that the whole data has and this part has not; -1 for none.

        It says how many classes there are where they have no names; the labels are not multi-hot.
        """
        return int(self.labels().max(initial=-1))

    def count_labelled(self) -> int | None:
        """Count labelled samples; None if this needs to read every sample."""
        return int(np.count_nonzero(is_labelled(self.labels()))) if self.has_labels else 0

    @property
    def is_users(self) -> bool:
        """Whether reading runs code of the user's: of a dataset, or of another class of sources."""
        return any(part.kind not in _KINDS for part in self.parts())

    def parts(self) -> "tuple[Source, ...]":
        """Return the sources that this one concatenates, else itself."""
        return (self,)

    @abstractmethod
    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        """Read samples by index, in the given order.

        An unreadable image does not raise: the sample holds the BadImageError that `decode_image` raises.

        Raises:
            DataError: the source cannot be read.
        """

    def blocks(self) -> list[tuple[int, int]]:
        """Return consecutive non-empty ranges (start, stop) that cover all samples.

        A block is best read in sequence: a row group of a Parquet file, a tar file or 64 MiB of one, whole chunks of an
        HDF5 dataset, else `BLOCK` samples. Reading block by block, in any order of blocks, reads each byte once.
        """
        return self.even_blocks(BLOCK)

    def even_blocks(self, samples: int) -> list[tuple[int, int]]:
        """Return blocks of a number of samples; the last one may be shorter."""
        return [(start, min(start + samples, len(self))) for start in range(0, len(self), samples)]

    def fingerprint(self) -> str:
        """Return the hex xxh3-128 of all keys, each as its UTF-8 length (uint32, little-endian) and its bytes.

        Raises:
            DataError: two keys are equal, or a key is not valid Unicode.
        """
        if self._fingerprint is None:
            self._fingerprint = check_keys(self)
        return self._fingerprint

    def stamp(self) -> tuple[FileStamp, ...] | None:
        """Return what changes when the data do, without reading them; None where only reading says it."""
        return None

    def digest(self, start: int, stop: int) -> str:
        """Return the same hash for samples `start` to `stop`, without checking."""
        digest = xxhash.xxh3_128()
        for _, keys in _iter_tables(self, start, stop):
            digest.update(_prefix_lengths(keys).data)
        return digest.hexdigest()


def span(start: int, stop: int | None, length: int) -> tuple[int, int]:
    """Return `start` and `stop` limited to a length; `stop` defaults to it."""
    stop = length if stop is None else min(stop, length)
    assert start >= 0, start
    return min(start, stop), stop


def runs(indices: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Split indices int64 (N,) into ranges of consecutive ones."""
    if not len(indices):
        return []
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(indices, cuts)]


def check_keys(source: Source, *, unique: bool = True) -> str:
    """Return the fingerprint of all keys, and check with `unique` that they differ.

    Raises:
        DataError: two keys are equal, or a key is not valid Unicode.
    """
    digest, hasher = xxhash.xxh3_128(), Hasher()
    # 64-bit hashes give candidates, whose keys are compared.
    with Repeated(len(source) if unique else 0) as repeated:
        for _, keys in _iter_tables(source, 0, len(source)):
            digest.update(_prefix_lengths(keys).data)
            if unique:
                repeated.add(hasher(keys, 0))
        for hashes in repeated.found():
            _refuse_equal(source, hasher, hashes)
    return digest.hexdigest()


def _iter_tables(source: Source, start: int, stop: int) -> Iterator[tuple[int, Keys]]:
    """Yield (first sample, keys) for tables of samples `start` to `stop`."""
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        try:
            yield first, source.key_table(first, last)
        except DataError as error:
            raise DataError(f"{source.name}: samples {first} to {last - 1}: {error}") from error


def _prefix_lengths(keys: Keys) -> NDArray[np.uint8]:
    """Return every key preceded by its length in bytes as uint32, little-endian."""
    lengths_N = np.diff(keys.offsets_N1)
    places_N = keys.offsets_N1[:-1] + 4 * np.arange(len(keys))
    mixed = np.empty(4 * len(keys) + len(keys.data), dtype=np.uint8)
    is_key = np.ones(len(mixed), dtype=np.bool_)
    places_N4 = places_N[:, None] + np.arange(4)
    is_key[places_N4] = False
    mixed[places_N4] = lengths_N.astype("<u4").view(np.uint8).reshape(-1, 4)
    mixed[is_key] = keys.data
    return mixed


def _refuse_equal(source: Source, hasher: Hasher, hashes: NDArray[np.uint64]) -> None:
    """Raise DataError if two of the keys with these hashes are equal."""
    first: dict[str, int] = {}
    twice: dict[str, tuple[int, int]] = {}
    for start, keys in _iter_tables(source, 0, len(source)):
        for place in np.flatnonzero(np.isin(hasher(keys, 0), hashes)).tolist():
            key = keys[place]
            if key in first:
                twice.setdefault(key, (first[key], start + place))
            first.setdefault(key, start + place)
        if len(twice) >= 2:
            break
    if twice:
        listed = " and ".join(f"{key!r} (samples {a} and {b})" for key, (a, b) in list(twice.items())[:2])
        raise (SpecError if source.keys_are_named else DataError)(
            f"{source.name}: expected a unique key for every sample, found repeated: {listed}; "
            f"{source.repeated_keys_remedy}"
        )


class ListedSource(Source):
    """A source whose keys are `_keys`, an Arrow array of large_string, or decimal row numbers if it is None."""

    _keys: pa.Array | None = None

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        start, stop = span(start, stop, len(self))
        if self._keys is None:
            return [str(row) for row in range(start, stop)]
        keys: list[str] = self._keys.slice(start, stop - start).to_pylist()
        return keys

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        start, stop = span(start, stop, len(self))
        if self._keys is None:
            return Keys.of(pa.array(np.arange(start, stop)))
        return Keys.of(self._keys.slice(start, stop - start))

    def key_at(self, row: int) -> str:
        """Return the key of one sample."""
        return str(row) if self._keys is None else str(self._keys[row])


def first_samples(source: Source) -> Iterator[Sample]:
    """Yield the first samples one by one; a few of them say what all are like, even if some cannot be read."""
    for index in range(min(len(source), TRIED)):
        yield from source.read([index])
