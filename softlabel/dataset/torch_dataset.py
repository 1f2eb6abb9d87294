"""Datasets that decode by themselves: torch datasets, torchvision's, scikit-learn's digits.

Legend: N samples.
"""

import operator
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, Subset

from softlabel.common.multi_hot import Labels, stack_labels
from softlabel.common.spec import literal
from softlabel.dataset.dataset_items import (
    NO_LABEL,
    choose_item_label,
    count_flags,
    find_kind,
    find_unread_texts,
    parse_item_label,
    split_item,
)
from softlabel.dataset.documents import NO_LABELS, read_chat
from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import checked_labels
from softlabel.dataset.huggingface import read_integers, stored_bytes, undecoded
from softlabel.dataset.image_folder import FolderSource
from softlabel.dataset.source import TRIED, ListedSource, Source, span
from softlabel.errors import BadImageError, DataError, SoftLabelError, SpecError, one_line
from softlabel.inputs.base import IGNORE, Sample
from softlabel.inputs.chat import CHATS

_CHUNK = 64  # items read at once for their labels


class DatasetSource(ListedSource):
    """Any object with `__len__` and `__getitem__`.

    Labels come from the items. If the dataset also lists them (`targets` or `labels`, as in torchvision), the list
    saves a pass over all images, and each item that is read is checked against it.

    Raises:
        DataError: the object is not a map-style dataset, or its keys or labels are wrong.
    """

    kind = "dataset"

    def __init__(
        self,
        dataset: Any,
        *,
        key_fn: Callable[[int], str | int] | None = None,
        ignore_labels: bool = False,
        name: str | None = None,
        kind: str = "dataset",
    ) -> None:
        self.kind, self.name = kind, name or type(dataset).__name__
        if isinstance(dataset, Mapping):  # for example Hugging Face's DatasetDict
            parts = ", ".join(map(repr, list(dataset)[:5]))
            raise DataError(
                f"{self.name}: expected one dataset, found several by name: {parts or 'none'}; give one of them"
                + (f", such as data[{next(iter(dataset))!r}]" if parts else "")
            )
        streams = isinstance(dataset, IterableDataset)
        if streams or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{self.name}: expected a map-style dataset with __len__ and __getitem__, found "
                f"{'a stream, which has no order and no random access' if streams else 'one without'}; "
                "write its samples to tar shards or files first"
            )
        self.dataset = undecoded(dataset)
        self._length = len(dataset)
        self._ignore_labels = ignore_labels
        if key_fn is not None:
            self._keys = self._make_keys(key_fn)
            self.maybe_repeated_keys = True
        self._labels: Labels | None = None if ignore_labels else self._check_listed_labels()
        first: Any = None
        if kind == "dataset" or (self._labels is None and not ignore_labels):
            # Skip unreadable items.
            candidates = (self._read_items([index])[0] for index in range(min(self._length, TRIED)))
            first = next((item for item in candidates if not isinstance(item, BadImageError)), None)
        if kind == "dataset" and first is not None:
            self.inputs = find_kind(stored_bytes(split_item(first, self.name)[0]))
        if self.inputs == CHATS:  # the next token is the label
            self._ignore_labels, self._labels = True, None
            ignore_labels = True
        listed = self._labels is not None
        if not ignore_labels and not listed and isinstance(first, Mapping):
            column = read_integers(self.dataset, choose_item_label(tuple(first), self.name)[0])
            self._labels = None if column is None else checked_labels(column, self.name)
        if ignore_labels or not self._length:
            self.has_labels = False
        elif self._labels is not None:
            self.has_labels = bool((self._labels != IGNORE).any())
        else:
            raw = NO_LABEL if first is None else split_item(first, self.name)[1]
            self.has_labels = raw is not NO_LABEL
            self.label_width = count_flags(raw)
        self.class_names = _read_class_names(dataset) if self.has_labels else None
        self.findings = self._make_findings(ignore_labels, first, listed=listed)

    def _make_findings(self, ignore_labels: bool, first: Any, *, listed: bool) -> Findings:
        left_out = find_unread_texts(first, self.name)
        if not self.has_labels:
            why = f"its items are only {self.inputs.noun}"
            if isinstance(first, Mapping):
                why = f"its items have no 'label', they have {', '.join(map(str, first))}"
            why = "labels are ignored, as requested" if ignore_labels else why
            why = NO_LABELS if self.inputs == CHATS else why
            return Findings(without_labels=why, left_out=left_out)
        if listed:
            return Findings(labels_from="the dataset's list of labels", left_out=left_out)
        if not isinstance(first, Mapping):
            return Findings(labels_from="its items")
        chosen, others = choose_item_label(tuple(first), self.name)
        left_out += tuple(
            f"{other!r} of an item may be a label too; the dataset may return it alone" for other in others
        )
        return Findings(labels_from=f"{chosen!r} of its items", left_out=left_out)

    def count_labelled(self) -> int | None:
        return None if self.has_labels and self._labels is None else super().count_labelled()

    def _make_keys(self, key_fn: Callable[[int], str | int]) -> pa.Array:
        keys = [_normalise_key(key_fn(index)) for index in range(self._length)]
        wrong = next((index for index, key in enumerate(keys) if not isinstance(key, str)), None)
        if wrong is not None:
            raise DataError(
                f"{self.name}: key_fn({wrong}): expected a string or an integer, found "
                f"{type(keys[wrong]).__name__}; return a name of the sample, for example its path"
            )
        try:
            return pa.array(keys, type=pa.large_string())
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.name}: key_fn: expected valid Unicode, found {error.object!r}; give keys that are text"
            ) from error

    def _check_listed_labels(self) -> NDArray[np.int64] | None:
        found = listed_labels(self.dataset)
        return None if found is None else checked_labels(found, self.name)

    def __len__(self) -> int:
        return self._length

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        """Return labels (see `Source`); reads all items once if the dataset does not list its labels."""
        start, stop = span(start, stop, self._length)
        if not self.has_labels:
            return np.full(stop - start, IGNORE, dtype=np.int64)
        if self._labels is not None:
            return self._labels[start:stop].copy()
        # In chunks, because the items of all samples may exceed memory.
        chunks = (range(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK))
        labels = stack_labels([sample.label for chunk in chunks for sample in self.read(chunk)], self.label_width)
        if len(labels) == self._length:
            self._labels = labels.copy()
        return labels

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        numbers = [int(index) for index in indices]
        samples = []
        for index, item in zip(numbers, self._read_items(numbers), strict=True):
            key = self.key_at(index)
            if isinstance(item, BadImageError):
                # The list may have the label of an unreadable image.
                samples.append(Sample(key=key, raw=item, label=self._known_label(index)))
                continue
            image, raw = split_item(item, self.name)
            image = stored_bytes(image)
            if self.inputs == CHATS:
                image = read_chat(image)
            if image is None:
                image = BadImageError("the dataset returns None as its image")
            label: Any = IGNORE if self._ignore_labels else parse_item_label(raw, self.name, key, self.label_width)
            if self._labels is not None and not np.array_equal(label, self._labels[index]):
                raise DataError(
                    f"{self.name}: sample {key!r}: expected label {self._labels[index]} as in the dataset's list of "
                    f"labels, found {label}; make them agree"
                )
            samples.append(Sample(key=key, raw=image, label=label))
        return samples

    def _known_label(self, index: int) -> Any:
        if self._labels is None:
            return stack_labels([IGNORE], self.label_width)[0]
        return self._labels[index] if self.label_width is not None else int(self._labels[index])

    def _read_items(self, numbers: list[int]) -> list[Any]:
        """Read items as a batch if the dataset supports it; an unreadable file fails only its own sample."""
        if hasattr(self.dataset, "__getitems__"):
            try:
                return list(self.dataset.__getitems__(numbers))
            except Exception as error:  # read one by one to find the sample
                if isinstance(error, SoftLabelError | MemoryError):
                    raise
        items: list[Any] = []
        for number in numbers:
            try:
                item = self.dataset[number]
            except OSError as error:  # PIL raises it for damaged images too
                item = BadImageError(f"the dataset cannot read it: {error}")
            except (SoftLabelError, MemoryError):
                raise
            except Exception as error:
                raise DataError(
                    f"{self.name}: sample {number}: the dataset raised {one_line(error, with_type=True)}"
                    f"{_locate(error)}; fix the dataset, or remove the sample"
                ) from error
            items.append(BadImageError("the dataset returns None for it") if item is None else item)
        return items


def listed_labels(dataset: Any) -> NDArray[np.int64] | None:
    """Return the labels that a dataset lists, int64 (N,), also of `Subset`s; None if they may differ from its items."""
    if type(dataset) is Subset:
        whole = listed_labels(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if found is None or callable(found) or isinstance(found, str):
            continue
        try:
            labels_N = np.asarray(found)
        except (ValueError, TypeError):
            continue
        if labels_N.shape == (len(dataset),) and labels_N.dtype.kind in "iu":
            return labels_N.astype(np.int64)
    return None


def _locate(error: Exception) -> str:
    """Return where an error was raised, for a message without traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _normalise_key(key: object) -> object:
    """Convert an integer to its decimal digits; return other values unchanged."""
    if isinstance(key, bool | np.bool_ | str):
        return key
    try:
        return str(operator.index(key))  # type: ignore[arg-type]
    except TypeError:
        return key


def _read_class_names(dataset: Any) -> tuple[str, ...] | None:
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple) or not classes:
        return None
    # ImageNet's are tuples of synonyms.
    names = tuple(", ".join(c) if isinstance(c, tuple) else c for c in classes)
    return names if all(isinstance(name, str) for name in names) else None


def open_torchvision(text: str, name: str, options: dict[str, str], ignore_labels: bool) -> Source:
    """Open ``torchvision:NAME?argument=value``; downloads only with ``download=true``.

    The keys of a dataset of files (`ImageFolder`, `ImageNet`, `Imagenette`) are paths.

    Raises:
        SpecError: the class is unknown, or refuses its arguments.
        DataError: the data is missing.
    """
    from torchvision import datasets

    cls = getattr(datasets, name, None) if name in datasets.__all__ else None
    if cls is None:
        raise SpecError(f"{text}: torchvision.datasets has no {name!r}")
    arguments = {key: literal(value) for key, value in options.items()}
    # A root of "2024" is still a folder.
    arguments |= {key: options[key] for key in ("root",) if key in options}
    try:
        dataset = cls(**arguments)
    except TypeError as error:
        raise SpecError(f"{text}: {error}; give arguments after '?', as in '?root=FOLDER&train=true'") from error
    except ValueError as error:
        raise SpecError(f"{text}: {error}") from error
    except (RuntimeError, OSError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise DataError(f"{text}: {reason}; give its folder as root=, or download it with download=true") from error
    if isinstance(dataset, datasets.DatasetFolder):
        root = Path(dataset.root)
        paths = [Path(path).relative_to(root).as_posix() for path, _ in dataset.samples]
        labels_N = np.array(dataset.targets, dtype=np.int64)
        if ignore_labels:
            ignored = Findings(without_labels="labels are ignored, as requested")
            return FolderSource(root, paths, name=text, kind="torchvision", findings=ignored)
        findings = Findings(labels_from="the dataset's class folders")
        names = _read_class_names(dataset)
        return FolderSource(root, paths, labels_N, names, name=text, kind="torchvision", findings=findings)
    return DatasetSource(dataset, name=text, kind="torchvision", ignore_labels=ignore_labels)


def open_digits(text: str, ignore_labels: bool) -> Source:
    """Open scikit-learn's 1,797 handwritten digits, 8x8, with their 17 levels of grey scaled to 0 to 255.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"{text}: needs scikit-learn; pip install 'softlabel[digits]'") from error
    found = load_digits()
    images_NHW = np.rint(found.images * (255 / 16)).astype(np.uint8)
    items = _Digits(images_NHW, found.target.astype(np.int64))
    return DatasetSource(items, name=text, kind="digits", ignore_labels=ignore_labels)


class _Digits:
    classes = tuple("0123456789")

    def __init__(self, images_NHW: NDArray[np.uint8], targets: NDArray[np.int64]) -> None:
        self.images_NHW, self.targets = images_NHW, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images_NHW[index], int(self.targets[index])
