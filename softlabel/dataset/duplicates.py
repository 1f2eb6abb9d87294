"""Find equal numbers among many in bounded memory, by distributing them over temporary files. N numbers."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Self

import numpy as np
from numpy.typing import NDArray

_TOGETHER = 1 << 20  # numbers per file
_FILES = 256  # maximal number of open files
_IN_MEMORY = 8 << 20  # bytes of all files that stay in memory


class Repeated:
    """Finds repeated hashes. Use it as a context manager."""

    def __init__(self, expected: int) -> None:
        files = min(max(1, -(-expected // _TOGETHER)), _FILES)
        self._stack = ExitStack()
        most = _IN_MEMORY // files
        spooled = [tempfile.SpooledTemporaryFile(max_size=most) for _ in range(files)]  # noqa: SIM115 - the stack's
        self._files = [self._stack.enter_context(file) for file in spooled]

    def add(self, hashes_N: NDArray[np.uint64]) -> None:
        """Add hashes uint64 (N,)."""
        """Add hashes uint64 (N,)."""
        file_N = hashes_N % np.uint64(len(self._files))
        order_N = np.argsort(file_N, kind="stable")
        bounds = np.searchsorted(file_N[order_N], np.arange(len(self._files) + 1, dtype=np.uint64))
        for file, first, last in zip(self._files, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            file.write(hashes_N[order_N[first:last]].tobytes())

    def found(self) -> Iterator[NDArray[np.uint64]]:
        """Yield arrays of the hashes that were added more than once."""
        for file in self._files:
            file.seek(0)
            sorted_N = np.sort(np.frombuffer(file.read(), dtype=np.uint64))
            if len(repeated := np.unique(sorted_N[1:][sorted_N[1:] == sorted_N[:-1]])):
                yield repeated

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
