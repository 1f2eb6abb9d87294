"""Keys of rows as two flat arrays, without a Python object for each."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabel.errors import DataError, StoreCorruptError

KEY_LIMIT = 65_535  # bytes of UTF-8; hashing takes a step per 8 bytes


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """N keys: `offsets_N1` int64 (N + 1,), `data` uint8; key i is the UTF-8 in data[offsets_N1[i]:offsets_N1[i + 1]].

    `words[i]` is the word at byte i (see `hashing.word_view`); None until a lookup needs it.
    """

    offsets_N1: npt.NDArray[np.int64]  # noqa: N815
    data: npt.NDArray[np.uint8]
    words: npt.NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @staticmethod
    def of(keys: "Keys | Sequence[str] | npt.NDArray[Any] | pa.Array") -> "Keys":
        """Convert strings.

        Raises:
            DataError: a key is null, not Unicode text, or longer than 65,535 bytes.
        """
        if isinstance(keys, Keys):
            return keys
        try:
            array = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.large_string())
            if array.null_count:
                raise DataError("a key is null; every sample needs a text key")
            found = Keys._of_arrow(array.cast(pa.large_string()))
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, TypeError) as error:
            raise DataError(f"keys must be Unicode text: {error}") from None
        lengths_N = np.diff(found.offsets_N1)
        if len(lengths_N) and lengths_N.max() > KEY_LIMIT:
            worst = found.slice(int(lengths_N.argmax()), int(lengths_N.argmax()) + 1).to_list()[0]
            raise DataError(f"key {worst[:60]!r}...: {lengths_N.max()} bytes of UTF-8, at most {KEY_LIMIT} are allowed")
        return found

    @staticmethod
    def read(array: Any) -> "Keys":
        """Convert an Arrow string array read from a file, unchecked.

        Raises:
            ValueError: a key is null.
        """
        if array.null_count:
            raise ValueError("a key is null")
        if len(array) == 0 or array.type != pa.string():
            return Keys._of_arrow(array.cast(pa.large_string()))
        offsets_buffer, data_buffer = array.buffers()[1:3]
        narrow_N1 = np.frombuffer(offsets_buffer, np.int32)[array.offset : array.offset + len(array) + 1]
        data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
        return Keys._rebased(narrow_N1.astype(np.int64), data)

    @staticmethod
    def _of_arrow(array: Any) -> "Keys":
        """Convert a large_string array without nulls, sharing its memory."""
        offsets_buffer, data_buffer = array.buffers()[1:3]
        if len(array) == 0 or offsets_buffer is None:
            return Keys(np.zeros(1, np.int64), np.zeros(0, np.uint8))
        offsets_N1 = np.frombuffer(offsets_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
        data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
        return Keys._rebased(offsets_N1, data)

    @staticmethod
    def _rebased(offsets_N1: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]) -> "Keys":
        first, last = int(offsets_N1[0]), int(offsets_N1[-1])
        return Keys(offsets_N1 - first if first else offsets_N1, data[first:last])

    @staticmethod
    def join(parts: Iterable["Keys"]) -> "Keys":
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        base, offsets = 0, [np.zeros(1, np.int64)]
        for part in parts:
            offsets.append(part.offsets_N1[1:] + base)
            base += int(part.offsets_N1[-1])
        return Keys(np.concatenate(offsets), np.concatenate([np.zeros(0, np.uint8), *(part.data for part in parts)]))

    def slice(self, start: int, stop: int) -> "Keys":
        return Keys._rebased(self.offsets_N1[start : stop + 1], self.data)

    def arrow(self) -> Any:
        """Return a pyarrow large_string array that shares the memory."""
        buffers = [None, pa.py_buffer(np.ascontiguousarray(self.offsets_N1)), pa.py_buffer(self.data)]
        return pa.Array.from_buffers(pa.large_string(), len(self), buffers)

    def take(self, rows: npt.NDArray[np.int64]) -> "Keys":
        lengths = self.offsets_N1[rows + 1] - self.offsets_N1[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.arange(offsets[-1]) + np.repeat(self.offsets_N1[rows] - offsets[:-1], lengths)
        return Keys(offsets, self.data[positions])

    def to_list(self) -> list[str]:
        """Return the keys as strings.

        Raises:
            StoreCorruptError: the bytes, read from a damaged store, are not UTF-8.
        """
        data, offsets = self.data.tobytes(), self.offsets_N1.tolist()
        try:
            return [data[a:b].decode() for a, b in itertools.pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise StoreCorruptError(f"keys are not UTF-8 ({error}); run 'softlabel verify' on the store") from None

    def __getitem__(self, row: int) -> str:
        return self.data[self.offsets_N1[row] : self.offsets_N1[row + 1]].tobytes().decode()

    def check(self) -> Self:
        """Return self after checking it.

        Raises:
            ValueError: the offsets do not tile the data, or the data is not UTF-8 (a damaged file).
        """
        if len(self.offsets_N1) < 1 or self.offsets_N1[0] != 0 or self.offsets_N1[-1] != len(self.data):
            raise ValueError("key offsets do not span the key bytes")
        lengths_N = np.diff(self.offsets_N1)
        if len(lengths_N) and (lengths_N.min() < 0 or lengths_N.max() > KEY_LIMIT):
            raise ValueError(f"key offsets must rise by 0 to {KEY_LIMIT}")
        try:
            self.arrow().validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"keys are not UTF-8: {error}") from None
        return self


class PickedKeys:
    """Some rows of a key table, copied on first use; a pickle holds these rows, not the table."""

    __slots__ = ("_keys", "_rows")

    def __init__(self, keys: Keys, rows: npt.NDArray[np.int64] | None = None) -> None:
        self._keys, self._rows = keys, rows

    def get(self) -> Keys:
        return self._keys if self._rows is None else self._keys.take(self._rows)

    def __reduce__(self) -> tuple[Any, ...]:
        found = self.get()
        return PickedKeys, (Keys(found.offsets_N1, found.data),)
