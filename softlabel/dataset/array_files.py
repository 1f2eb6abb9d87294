"""Files of named arrays: HDF5, `.npy`, `.npz`. Rows are read in place; only compressed members of `.npz` are loaded.

Legend: B rows.
"""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from softlabel.dataset.source import runs
from softlabel.dataset.storage import PerProcess
from softlabel.errors import DataError, SpecError

H5_SUFFIXES = frozenset({".h5", ".hdf5", ".hdf", ".he5"})
_H5_CACHE_BYTES = 64 << 20
_LARGE = 1 << 30


class Container(ABC):
    """One or several files of named arrays; `subject` begins error messages."""

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def images(self, asked: str | None, subject: str) -> str:
        """Return the name of the images' array, `asked` if given."""

    def arrays(self, subject: str) -> tuple[str, ...]:
        """Return the names of all arrays; empty for `.npy`."""
        return ()

    @abstractmethod
    def shape_of(self, array: str, subject: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return the shape and dtype of an array."""

    @abstractmethod
    def rows(self, array: str, rows_B: NDArray[np.int64], subject: str) -> list[NDArray[Any]]:
        """Read rows int64 (B,) of an array."""

    @abstractmethod
    def whole(self, array: str, subject: str) -> NDArray[Any]:
        """Read an array."""

    def describe_memory(self, array: str, subject: str) -> str | None:
        """Return a warning if every process that reads rows of an array holds a large one whole."""
        return None

    def chunk(self, array: str) -> int:
        """Return the number of rows in a storage chunk."""
        return 1


class Npy(Container):
    """Memory-mapped `.npy` files; labels and keys are separate files."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._mapped: PerProcess[dict[str, NDArray[Any]]] = PerProcess(dict)

    def images(self, asked: str | None, subject: str) -> str:
        return self.path

    def whole(self, array: str, subject: str) -> NDArray[Any]:
        mapped = self._mapped.get()
        if array not in mapped:
            mapped[array] = self._map(array, subject)
        return mapped[array]

    def _map(self, array: str, subject: str) -> NDArray[Any]:
        try:
            found: NDArray[Any] = np.load(array, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise SpecError(f"{subject}: {array}: no such file; paths in options start at the working folder") from None
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{subject}: {array}: expected a .npy file, found: {error}; use numpy.save") from error
        if not isinstance(found, np.ndarray):
            raise DataError(f"{subject}: {array}: expected a .npy file of one array, found an .npz archive")
        return found

    def shape_of(self, array: str, subject: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        found = self.whole(array, subject)
        return found.shape, found.dtype

    def rows(self, array: str, rows_B: NDArray[np.int64], subject: str) -> list[NDArray[Any]]:
        found = self.whole(array, subject)
        return [found[row] for row in rows_B.tolist()]


class Npz(Npy):
    """An archive of `.npy` files: uncompressed members (numpy.savez) are memory-mapped, compressed ones loaded."""

    def _names(self, subject: str) -> tuple[str, ...]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return tuple(one.removesuffix(".npy") for one in archive.namelist() if one.endswith(".npy"))
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{subject}: expected an .npz archive, found: {error}; use numpy.savez") from error

    def images(self, asked: str | None, subject: str) -> str:
        return _require_name(self._names(subject), asked or "images", subject)

    def arrays(self, subject: str) -> tuple[str, ...]:
        return self._names(subject)

    def _map(self, array: str, subject: str) -> NDArray[Any]:
        with self._open_member(array, subject) as (info, file):
            if info.compress_type != zipfile.ZIP_STORED:
                unpacked: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
                return unpacked
            shape, fortran, dtype = _read_header(file)
            header = file.tell()
            with open(self.path, "rb") as raw:
                # The lengths in the local header may differ from those in the directory.
                raw.seek(info.header_offset + 26)
                lengths = np.frombuffer(raw.read(4), dtype="<u2")
            begin = info.header_offset + 30 + int(lengths.sum()) + header
            return np.memmap(self.path, dtype, "r", begin, shape, "F" if fortran else "C")

    def shape_of(self, array: str, subject: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if array not in self._mapped.get():
            with self._open_member(array, subject) as (info, file):
                if info.compress_type != zipfile.ZIP_STORED:
                    shape, _, dtype = _read_header(file)
                    return shape, dtype
        return super().shape_of(array, subject)

    def describe_memory(self, array: str, subject: str) -> str | None:
        with self._open_member(array, subject) as (info, _):
            if info.compress_type == zipfile.ZIP_STORED or info.file_size < _LARGE:
                return None
            return (
                f"array {array!r} is compressed: every process that reads it holds all of its "
                f"{info.file_size / 2**30:.1f} GiB; write it with numpy.savez, which does not compress"
            )

    @contextmanager
    def _open_member(self, array: str, subject: str) -> Iterator[tuple[zipfile.ZipInfo, IO[bytes]]]:
        """Open an array; errors within the block are reported as those of the array."""
        member = f"{_require_name(self._names(subject), array, subject)}.npy"
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                yield archive.getinfo(member), file
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{subject}: {member}: cannot be read: {error}; write it with numpy.savez") from error


class H5(Container):
    """An HDF5 file, opened in each process: the library's state does not survive a fork."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._file: PerProcess[Any] = PerProcess(partial(_open_h5, path))

    def _dataset(self, array: str, subject: str) -> Any:
        import h5py

        found = self._file.get().get(array)
        if not isinstance(found, h5py.Dataset):
            raise SpecError(
                f"{subject}: no dataset {array!r}; the file has {', '.join(self.arrays(subject)) or 'none'}; "
                "name it with inputs=, images=, labels= or keys="
            )
        return found

    def images(self, asked: str | None, subject: str) -> str:
        self._dataset(asked or "images", subject)
        return asked or "images"

    def arrays(self, subject: str) -> tuple[str, ...]:
        import h5py

        names: list[str] = []
        self._file.get().visititems(lambda name, one: names.append(name) if isinstance(one, h5py.Dataset) else None)
        return tuple(names)

    def shape_of(self, array: str, subject: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        found = self._dataset(array, subject)
        return found.shape, found.dtype

    def chunk(self, array: str) -> int:
        chunks = self._dataset(array, self.path).chunks
        return int(chunks[0]) if chunks else 1

    def rows(self, array: str, rows_B: NDArray[np.int64], subject: str) -> list[NDArray[Any]]:
        found = self._dataset(array, subject)
        images: list[NDArray[Any]] = []
        try:
            for first, last in runs(rows_B):
                images += list(found[first:last])
        except OSError as error:
            raise DataError(f"{subject}: {array}: cannot be read: {error}; fetch the file again") from error
        return images

    def whole(self, array: str, subject: str) -> NDArray[Any]:
        try:
            found: NDArray[Any] = self._dataset(array, subject)[()]
        except OSError as error:
            raise DataError(f"{subject}: {array}: cannot be read: {error}; fetch the file again") from error
        return np.asarray(found)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, whether it is in Fortran's order, and dtype of a `.npy` file; raises ValueError for objects."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:  # field names beyond Latin-1: not an array of numbers
        raise ValueError("it is a structured array")
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, fortran, dtype


def _open_h5(path: str) -> Any:
    import h5py

    try:
        return h5py.File(path, "r", rdcc_nbytes=_H5_CACHE_BYTES)
    except OSError as error:
        raise DataError(f"{path}: expected an HDF5 file, found: {error}; fetch it again") from error


def _require_name(names: Sequence[str], wanted: str, subject: str) -> str:
    if wanted not in names:
        raise SpecError(
            f"{subject}: no array {wanted!r}; the archive has {', '.join(names) or 'none'}; name it with "
            "inputs=, images=, labels= or keys="
        )
    return wanted
