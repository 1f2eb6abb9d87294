"""Samples as the rows of one array: HDF5 datasets, `.npy` files and `.npz` archives.

Legend: N samples, H and W height and width, C channels.

Without ``inputs=`` they are images of uint8: (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels, which are
the last axis if its length is 1, 3 or 4, else the second one. With ``inputs=`` they are numbers of any type and shape,
and with ``layout=`` too images of 1 to 64 channels. The content hash is that of the row.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from softlabel.common.multi_hot import Labels, is_labelled
from softlabel.dataset.array_files import H5, H5_SUFFIXES, Container, Npy, Npz
from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import (
    check_labels_named,
    checked_labels,
    checked_multi_hot,
    choose_label,
    read_classes,
    usual_labels,
)
from softlabel.dataset.source import BLOCK, ListedSource, span
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE, InputKind, Raw, Sample
from softlabel.inputs.image_decode import IMAGES
from softlabel.inputs.tensor import BANDS, TENSORS, check_bands

ARRAY_SUFFIXES = frozenset({".npy", ".npz"}) | H5_SUFFIXES
_CHANNELS = (1, 3, 4)


class ArraySource(ListedSource):
    """Rows of one array. Keys are the row numbers, or the strings of another array.

    Raises:
        SpecError: an option contradicts another one, or names an array that is missing, or of the wrong shape or type.
        DataError: the file cannot be read, or holds labels or keys that are none.
    """

    kind = "array"
    repeated_keys_remedy = "fix the keys, or leave keys= out to number the samples"

    def __init__(self, path: str, options: dict[str, str], *, name: str, ignore_labels: bool = False) -> None:
        self.name = name
        self._path = path
        images, labels, keys = (options.pop(word, None) for word in ("images", "labels", "keys"))
        inputs, layout = options.pop("inputs", None), options.pop("layout", None)
        if inputs is not None:
            if images is not None:
                raise SpecError(f"{name}: images= are pixels of 8 bits, inputs= any numbers; give one of them")
            images = inputs
        elif layout is not None:
            raise SpecError(f"{name}: layout= says where inputs= has its channels; name the array with 'inputs=NAME'")
        suffix = os.path.splitext(path)[1].lower()
        if suffix in H5_SUFFIXES:
            container: Container = H5(path)
        elif suffix == ".npz":
            container = Npz(path)
        else:
            if images is not None and inputs is None:
                raise SpecError(f"{name}: a .npy file is one array, so images= has nothing to choose; leave it out")
            container = Npy(path)
        self._container = container
        self._images = container.images(images, name)
        shape, dtype = container.shape_of(self._images, name)
        self._layout = layout
        if inputs is None:
            self._shape, self._channels_first = _check_shape(shape, dtype, f"{name}: {self._images}")
        else:
            self._shape, self._channels_first = shape, False
            self.inputs = _find_kind(shape, dtype, layout, f"{name}: {self._images}")
        ignored, named = ignore_labels or labels == "none", labels is not None
        names = container.arrays(name)
        others: tuple[str, ...] = ()
        if ignored:
            labels = None
        elif labels is None:
            # An array with more than one number per row, such as boxes, does not hold labels.
            flat = [one for one in usual_labels(names) if one != self._images and self._is_flat(one)]
            labels, others = choose_label(flat, subject=name, remedy="choose with '?labels=NAME' or '?labels=none'")
        self._labels_N = self._read_labels(labels, named=named)
        if self._labels_N is not None and self._labels_N.ndim == 2:
            self.label_width = self._labels_N.shape[1]
        self.findings = _describe_labels(labels, names, others, ignored)
        if (memory := container.describe_memory(self._images, name)) is not None:
            self.findings = replace(self.findings, left_out=(*self.findings.left_out, memory))
        self.has_labels = self._labels_N is not None and bool(is_labelled(self._labels_N).any())
        classes = options.pop("classes", None)
        if classes is not None and not ignore_labels:
            self.class_names = read_classes(classes, subject=name)
            if self._labels_N is not None:
                check_labels_named(self._labels_N, self.class_names, subject=name)
        if keys is not None:
            self._keys = self._read_keys(keys)
            self.maybe_repeated_keys = self.keys_are_named = True

    def _is_flat(self, array: str) -> bool:
        shape, dtype = self._container.shape_of(array, self.name)
        return shape in ((len(self),), (len(self), 1)) and dtype.kind in "iufb"

    def _read_labels(self, path: str | None, *, named: bool) -> Labels | None:
        if path is None:
            return None
        found = self._container.whole(path, self.name)
        if found.ndim == 2 and len(found) == len(self) and found.shape[1] > 1:
            return checked_multi_hot(np.asarray(found), self.name, f"labels in {path}")
        shape, dtype = found.shape, found.dtype
        if dtype.kind in "fb" and bool(np.all(np.isnan(found) | (found == np.floor(found)))):
            found = np.nan_to_num(found.astype(np.float64), nan=IGNORE).astype(np.int64)
        if found.dtype.kind not in "iu" or shape not in ((len(self),), (len(self), 1)):
            raise (SpecError if named else DataError)(
                f"{self.name}: labels in {path}: expected {len(self)} integers, found {dtype} of shape "
                f"{shape}; name others with '?labels=' (of several classes at once (N, C) of 0 and 1), or go without "
                "with '?labels=none'"
            )
        return checked_labels(found.reshape(-1).astype(np.int64), self.name)

    def _read_keys(self, path: str) -> pa.Array:
        found = self._container.whole(path, self.name)
        if found.shape != (len(self),) or found.dtype.kind not in "iuUSO":
            raise SpecError(
                f"{self.name}: keys in {path}: expected {len(self)} strings or integers, found {found.dtype} of shape "
                f"{found.shape}; leave keys= out to number the samples"
            )
        try:
            # HDF5 returns strings as UTF-8 bytes.
            texts = [one.decode() if isinstance(one, bytes) else str(one) for one in found.tolist()]
            return pa.array(texts, type=pa.large_string())
        except UnicodeError as error:
            raise DataError(f"{self.name}: keys in {path}: not valid Unicode: {error}") from error

    def __len__(self) -> int:
        return self._shape[0]

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        start, stop = span(start, stop, len(self))
        if self._labels_N is None:
            return np.full(stop - start, IGNORE, dtype=np.int64)
        return self._labels_N[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        rows_B = np.asarray(indices, dtype=np.int64)
        assert not len(rows_B) or (rows_B.min() >= 0 and rows_B.max() < len(self)), (rows_B.min(), rows_B.max())
        if (found := self._container.shape_of(self._images, self.name)[0]) != self._shape:
            raise DataError(
                f"{self.name}: expected images of shape {self._shape}, found {found}; the file was replaced while in "
                "use, rerun the command"
            )
        images = self._container.rows(self._images, rows_B, self.name)
        return [
            Sample(key=self.key_at(row), raw=self._convert_row(image), label=self._label(row))
            for row, image in zip(rows_B.tolist(), images, strict=True)
        ]

    def _label(self, row: int) -> int | NDArray[np.int8]:
        if self._labels_N is None:
            return IGNORE
        return int(self._labels_N[row]) if self.label_width is None else self._labels_N[row].astype(np.int8)

    def _convert_row(self, image: NDArray[Any]) -> Raw:
        if self._layout == "channels-last":
            image = np.moveaxis(image, -1, 0)
        if self.inputs != IMAGES:
            return np.array(image)
        # `decode_image` takes channels first only as a tensor. Copied, because a memory map is read-only.
        return torch.from_numpy(np.array(image)) if self._channels_first else image

    def blocks(self) -> list[tuple[int, int]]:
        """Return whole chunks of an HDF5 dataset (see `Source`)."""
        chunk = self._container.chunk(self._images)
        return self.even_blocks(max(chunk, BLOCK // chunk * chunk))


def _find_kind(shape: tuple[int, ...], dtype: np.dtype[Any], layout: str | None, where: str) -> InputKind:
    """Return the kind of the rows: images of several bands if a layout is given, else numbers of any shape."""
    if not shape or dtype.kind not in "fiub":
        found = f"a compound type of {', '.join(dtype.names)}" if dtype.names else dtype
        raise SpecError(
            f"{where}: expected an array of numbers with a row for each sample, found {found} of shape {shape}; name "
            "another, or write the numbers as one array"
        )
    if layout is None:
        return TENSORS
    if layout not in ("channels-first", "channels-last") or len(shape) != 4:
        raise SpecError(
            f"{where}: layout: expected channels-first or channels-last, of four axes, found {layout!r} and {shape}"
        )
    try:
        check_bands(dtype)
    except DataError as error:
        raise SpecError(f"{where}: {error}") from None
    return BANDS


def _describe_labels(labels: str | None, names: Sequence[str], others: Sequence[str], ignored: bool) -> Findings:
    left_out = tuple(f"array {one!r} may hold labels too; '?labels={one}' takes it" for one in others)
    if ignored:
        return Findings(without_labels="labels are ignored, as requested")
    if labels is not None:
        return Findings(labels_from=labels, without_labels=f"{labels} holds none", left_out=left_out)
    listed = f"no array is called labels, '?labels=NAME' takes one of {', '.join(names)}" if len(names) > 1 else None
    return Findings(without_labels=listed or "'?labels=FILE.npy' gives some")


def _check_shape(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> tuple[tuple[int, ...], bool]:
    """Return the shape, and whether the channels come before height and width."""
    if dtype != np.uint8:
        raise SpecError(
            f"{where}: expected uint8 pixels from 0 to 255, found {dtype}; take the numbers as they are with "
            "'?inputs=NAME', and of images of several channels with '&layout=channels-first' or channels-last too"
        )
    if len(shape) == 3 or (len(shape) == 4 and shape[3] in _CHANNELS):
        return shape, False
    if len(shape) == 4 and shape[1] in _CHANNELS:
        return shape, True
    raise DataError(
        f"{where}: expected images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels C, found "
        f"{shape}; reshape them"
    )
