"""What every source of samples promises: an order, a unique string key for each sample, whole batches at a time.

Legend: N samples. Labels are int64, `IGNORE` where there is none.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from softlabel.common.hashing import Hasher
from softlabel.common.keys import Keys
from softlabel.dataset.duplicates import Repeated
from softlabel.dataset.findings import Findings
from softlabel.errors import DataError
from softlabel.inputs.base import AS_USUAL, IGNORE, Decoding, InputKind, Sample
from softlabel.inputs.image_decode import IMAGES

BLOCK = 4096

_CHUNK = 65536


class Source(ABC):
    """An ordered collection of samples. It can be pickled, and opens its files again in the process that reads.

    The order is a promise: sample i is the same in every process and every run as long as the data is. What cannot
    promise one, a stream or the page of a web server, is refused when it is opened.

    Attributes:
        kind: parquet, tar, array, list, folder, torchvision, digits or dataset.
        name: what the user wrote.
        class_names: where the source knows them; label i is class_names[i].
        has_labels: at least one sample has a label.
        findings: where the labels come from, and what was left out.
        decoding: how its images are decoded.
        inputs: what its samples are.
    """

    kind: str
    name: str
    class_names: tuple[str, ...] | None = None
    has_labels: bool = False
    findings: Findings = Findings()
    decoding: Decoding = AS_USUAL
    inputs: InputKind = IMAGES
    # Whether two keys may be equal, as far as is known before `fingerprint` has looked.
    doubtful_keys: bool = False
    # What a user can do about two samples of one key.
    against_equal_keys: str = "give a key_fn that tells them apart"
    _fingerprint: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The keys of samples start to stop, in order; no two in the source are equal."""

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        """The same keys as two flat arrays: a million of them in milliseconds, where the source can give them so.

        Raises:
            DataError: a key is not Unicode text, or longer than a store takes.
        """
        return Keys.of(self.keys(start, stop))

    @abstractmethod
    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """The labels of samples start to stop, -100 for none."""

    def count_labelled(self) -> int | None:
        """How many samples have a label; None where only reading every sample would show it."""
        return int(np.count_nonzero(self.labels() != IGNORE)) if self.has_labels else 0

    def parts(self) -> "tuple[Source, ...]":
        """The sources that this one consists of, itself if it is one alone."""
        return (self,)

    @abstractmethod
    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        """The samples of these indices, in their order.

        Raises:
            DataError: the source cannot be read. An image that cannot be is not an error here: its `image` is what
                `decode_image` raises.
        """

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges (start, stop) that follow each other from the first sample to the last, none of them empty.

        The samples of one are best read in one go, one after the other: a row group of a Parquet file, a tar file or
        64 MiB of one, whole chunks of an HDF5 dataset. Who reads block by block, in any order of the blocks, touches
        each byte once. Where the medium has no such parts they are `BLOCK` samples long.
        """
        return self.even_blocks(BLOCK)

    def even_blocks(self, samples: int) -> list[tuple[int, int]]:
        """Blocks of so many samples, the last one shorter."""
        return [(start, min(start + samples, len(self))) for start in range(0, len(self), samples)]

    def fingerprint(self) -> str:
        """Hex xxh3-128 of the keys in order, each as its length in UTF-8 (uint32, little-endian) and its bytes."""
        if self._fingerprint is None:
            self._fingerprint = check_keys(self)
        return self._fingerprint

    def digest(self, start: int, stop: int) -> str:
        """The same of the keys of samples start to stop alone."""
        digest = xxhash.xxh3_128()
        for _, keys in _tables(self, start, stop):
            digest.update(_with_lengths(keys).data)
        return digest.hexdigest()


def span(start: int, stop: int | None, length: int) -> tuple[int, int]:
    """`start` and `stop` of a source of this length, `stop` filled in and cut off."""
    stop = length if stop is None else min(stop, length)
    assert start >= 0, start
    return min(start, stop), stop


def runs(indices: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Indices as ranges of neighbours that follow each other."""
    if not len(indices):
        return []
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(indices, cuts)]


def check_keys(source: Source, *, unique: bool = True) -> str:
    """Read all keys once: their fingerprint, and an error where two are equal.

    Raises:
        DataError: two samples have one key, or a key is not valid Unicode.
    """
    digest, hasher = xxhash.xxh3_128(), Hasher()
    # 64-bit hashes find the candidates; the keys themselves decide.
    with Repeated(len(source) if unique else 0) as repeated:
        for _, keys in _tables(source, 0, len(source)):
            digest.update(_with_lengths(keys).data)
            if unique:
                repeated.add(hasher(keys, 0))
        for hashes in repeated.found():
            _refuse_equal(source, hasher, hashes)
    return digest.hexdigest()


def _tables(source: Source, start: int, stop: int) -> Iterator[tuple[int, Keys]]:
    """The keys of samples start to stop, and the number of the first of each table."""
    for first in range(start, stop, _CHUNK):
        last = min(first + _CHUNK, stop)
        try:
            yield first, source.key_table(first, last)
        except DataError as error:
            raise DataError(f"{source.name}: samples {first} to {last - 1}: {error}") from error


def _with_lengths(keys: Keys) -> NDArray[np.uint8]:
    """Every key behind its length in bytes, as uint32, little-endian."""
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
    """Raises DataError if two of the keys with these hashes are equal."""
    first: dict[str, int] = {}
    twice: dict[str, tuple[int, int]] = {}
    for start, keys in _tables(source, 0, len(source)):
        for place in np.flatnonzero(np.isin(hasher(keys, 0), hashes)).tolist():
            key = keys[place]
            if key in first:
                twice.setdefault(key, (first[key], start + place))
            first.setdefault(key, start + place)
        if len(twice) >= 2:
            break
    if twice:
        listed = " and ".join(f"{key!r} (samples {a} and {b})" for key, (a, b) in list(twice.items())[:2])
        raise DataError(
            f"{source.name}: expected a key of its own for every sample, found more than once: {listed}; "
            f"{source.against_equal_keys}"
        )


class ListedSource(Source):
    """Keys are `_keys`, an Arrow array of large_string, or the decimal row numbers where it is None."""

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
        """The key of one sample."""
        return str(row) if self._keys is None else str(self._keys[row])
