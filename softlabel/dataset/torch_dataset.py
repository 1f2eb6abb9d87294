"""Datasets that decode by themselves: torch datasets, torchvision's, scikit-learn's digits.

Legend: N samples.
"""

import operator
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from softlabel.common.multi_hot import UNKNOWN, Labels, stack_labels
from softlabel.common.spec import literal
from softlabel.dataset.findings import Findings
from softlabel.dataset.hard_labels import checked_labels, checked_multi_hot, choose_label
from softlabel.dataset.huggingface import stored_bytes, undecoded
from softlabel.dataset.image_folder import FolderSource
from softlabel.dataset.source import ListedSource, Source, span
from softlabel.errors import BadImageError, DataError, SoftLabelError, SpecError, one_line
from softlabel.inputs.base import IGNORE, InputKind, Sample
from softlabel.inputs.image_decode import IMAGES
from softlabel.inputs.tensor import TENSORS
from softlabel.inputs.text import TEXTS

_TRIED = 100  # items tried until one can be read
# As Hugging Face datasets have them; a pair before its halves.
_TEXT_NAMES = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",))
_IMAGE_NAMES = ("image", "img", "pixel_values")


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
            candidates = (self._read_items([index])[0] for index in range(min(self._length, _TRIED)))
            first = next((item for item in candidates if not isinstance(item, BadImageError)), None)
        if kind == "dataset" and first is not None:
            self.inputs = _find_kind(stored_bytes(_split_item(first, self.name)[0]))
        if ignore_labels or not self._length:
            self.has_labels = False
        elif self._labels is not None:
            self.has_labels = bool((self._labels != IGNORE).any())
        else:
            raw = _NO_LABEL if first is None else _split_item(first, self.name)[1]
            self.has_labels = raw is not _NO_LABEL
            self.label_width = _count_flags(raw)
        self.class_names = _read_class_names(dataset) if self.has_labels else None
        self.findings = self._make_findings(ignore_labels, first)

    def _make_findings(self, ignore_labels: bool, first: Any) -> Findings:
        if not self.has_labels:
            why = "its items are only images"
            if isinstance(first, Mapping):
                why = f"its items have no 'label', they have {', '.join(map(str, first))}"
            return Findings(without_labels="labels are ignored, as requested" if ignore_labels else why)
        if self._labels is not None:
            return Findings(labels_from="the dataset's list of labels")
        if not isinstance(first, Mapping):
            return Findings(labels_from="its items")
        chosen, others = _choose_label(tuple(first), self.name)
        left_out = tuple(
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
        if self._labels is None and (start, stop) != (0, self._length):
            return stack_labels([sample.label for sample in self.read(range(start, stop))], self.label_width)
        if self._labels is None:
            found = [self.read([index])[0].label for index in range(self._length)]
            self._labels = stack_labels(found, self.label_width)
        return self._labels[start:stop].copy()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        numbers = [int(index) for index in indices]
        samples = []
        for index, item in zip(numbers, self._read_items(numbers), strict=True):
            key = self.key_at(index)
            if isinstance(item, BadImageError):
                # The list may have the label of an unreadable image.
                samples.append(Sample(key=key, raw=item, label=self._known_label(index)))
                continue
            image, raw = _split_item(item, self.name)
            image = stored_bytes(image)
            if image is None:
                image = BadImageError("the dataset returns None as its image")
            label: Any = IGNORE if self._ignore_labels else _parse_label(raw, self.name, key, self.label_width)
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


class _NoLabel:
    """Marks an item without a label: None itself is an unknown label."""


_NO_LABEL = _NoLabel()


def _split_item(item: Any, name: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        chosen, _ = _choose_label(tuple(item), name)
        label = _NO_LABEL if chosen is None else item[chosen]
        holding = next((k for k in _IMAGE_NAMES if k in item), None)
        if holding is not None:
            return item[holding], label
        if (texts := next((names for names in _TEXT_NAMES if all(name in item for name in names)), None)) is not None:
            return item[texts[0]] if len(texts) == 1 else tuple(item[name] for name in texts), label
        inputs = {key: value for key, value in item.items() if key != chosen}
        if not inputs or not all(_is_numbers(value) and not _is_pixels(value) for value in inputs.values()):
            raise DataError(
                f"{name}: expected items with 'image', 'text', or arrays named like a network's inputs, found "
                f"{', '.join(map(str, item))}"
            )
        return inputs, label
    if isinstance(item, tuple | list):
        if not item:
            raise DataError(f"{name}: expected (image,) or (image, label), found an empty {type(item).__name__}")
        return item[0], item[1] if len(item) > 1 else _NO_LABEL
    return item, _NO_LABEL


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor | int | float | np.number)


def _find_kind(value: Any) -> InputKind:
    """Return whether items are images, uint8 (H, W) or (H, W, C), or other numbers."""
    if isinstance(value, Mapping):
        return TENSORS
    if isinstance(value, str | tuple):
        return TEXTS
    if isinstance(value, np.ndarray | Tensor):
        return IMAGES if _is_pixels(value) else TENSORS
    return IMAGES


def _is_pixels(value: Any) -> bool:
    return str(getattr(value, "dtype", "")).removeprefix("torch.") == "uint8" and value.ndim in (2, 3)


@lru_cache(maxsize=16)  # items of one dataset have the same names
def _choose_label(names: tuple[Any, ...], subject: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the name in a mapping that holds the label, and others that suggest labels."""
    remedy = "return (image, label) instead, or remove the others"
    return choose_label((name for name in names if isinstance(name, str)), subject=subject, remedy=remedy)


def _count_flags(raw: Any) -> int | None:
    """Count the classes of a label that is 0 or 1 for each; None for a class number."""
    if not isinstance(raw, Tensor | np.ndarray | list | tuple):
        return None
    shape = np.shape(raw)
    return shape[0] if len(shape) == 1 and shape[0] else None


def _parse_label(raw: Any, name: str, key: str, width: int | None) -> Any:
    if width is not None:
        found = np.full(width, UNKNOWN) if raw is _NO_LABEL or raw is None else np.asarray(raw)
        if found.shape != (width,):
            raise DataError(
                f"{name}: sample {key!r}: expected a label of {width} numbers, 0 or 1 for each class, as the first one "
                f"has, found {type(raw).__name__} of shape {found.shape}; return such, or None where nothing is known"
            )
        return checked_multi_hot(found[None], name, f"sample {key!r}")[0]
    if raw is _NO_LABEL or raw is None:
        return IGNORE
    try:
        value = np.asarray(raw)
        if value.ndim == 0 and value.dtype.kind in "iub":
            return int(checked_labels(value.astype(np.int64)[None], name, f"sample {key!r}")[0])
    except (TypeError, ValueError, RuntimeError):
        pass
    raise DataError(
        f"{name}: sample {key!r}: expected a class number, found {type(raw).__name__}; return one as the second part "
        "of the item (or 0 and 1 for every class, in the first item too), or ignore labels"
    )


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
