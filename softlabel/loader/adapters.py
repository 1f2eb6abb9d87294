"""Soft labels for loops that have their data already: attached by key, a whole batch at a time.

Legend: B rows of a batch, N samples, W elements of a column in one row.

    a map-style dataset and a plain DataLoader    with_soft_labels(dataset, store, key_fn=...)
    a WebDataset pipeline, batched                pipeline.map(LabelJoin(store, key="__key__"))
    Hugging Face datasets                         dataset.with_transform(LabelJoin(store, key="name").columns)

They join by key. That an image is the one that was labelled is checked by `SoftLabelLoader`, which reads the files;
here they are read elsewhere, and `LabelJoin(image=...)` checks those that a batch holds as they were read.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from softlabel.common.multi_hot import Labels, stack_labels, to_multi_hot
from softlabel.dataset import listed_labels, stored_bytes
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.content import changed_content, hashes_of, why_not_comparable
from softlabel.inputs.tensor import BANDS
from softlabel.inputs.transforms import KINDS
from softlabel.labels.combine import Combination
from softlabel.loader.hard_labels import find_contradictions, read_hard_labels
from softlabel.loader.join import refuse_positions
from softlabel.loader.target import make_target
from softlabel.loss.targets import Target
from softlabel.store.manifest import Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store

log = logging.getLogger("softlabel")


class LabelJoin:
    """Finds the soft labels of samples by their keys. Picklable; forked workers share its memory.

    Args:
        labels: a store or its path.
        key: where in a batch the keys are: a name, or a place in a tuple.
        target: under which name a dict gets its target.
        combine: rule, weights and temperature for the members of a store that keeps them apart.
        image: where in a batch the images are as the labelled data gave them (encoded bytes, or pixels before any
            transform): each is compared with what was labelled. None: keys alone join.
        label: where in a batch its hard labels are, to be compared with those of the store, where both have some.

    Raises:
        StoreError: the store cannot be opened.
        UsageError: its rows are views of images, which only `SoftLabelLoader` replays.
        MismatchError: its rows are documents, which `TokenLoader` joins.
    """

    def __init__(
        self,
        labels: str | Path | Store,
        *,
        key: str | int = "__key__",
        target: str = "target",
        combine: Combination | None = None,
        image: str | int | None = None,
        label: str | int | None = None,
    ) -> None:
        self.store = labels if isinstance(labels, Store) else open_store(labels)
        self.store.require_labels("labels")
        self.key, self.name, self._combination, self.image, self.label = key, target, combine, image, label
        self._warned = False
        refuse_positions(self.store)
        if self.store.run.views.count > 1 or self.store.run.view_columns:
            raise UsageError(
                f"{self.store.url}: its rows are views of the images; SoftLabelLoader shows the student the same "
                "views, labels that are joined by key alone do not fit"
            )
        self._names = [column.name for column in self.store.run.label_columns]
        # Labels and keys that are read and indexed now are shared by all workers that are forked later.
        self.store.lookup([""], missing="mask")
        self.of_rows(np.zeros(min(1, len(self.store)), dtype=np.int64))

    @property
    def temperature(self) -> float:
        """The temperature of the labels, at which the loss needs no conversion."""
        temperature = None if self._combination is None else self._combination.temperature
        return self.store.run.temperature if temperature is None else temperature

    def target(self, keys: Any) -> Target:
        """The target of a batch of keys: strings, or integers, which count as their decimal digits.

        Raises:
            DataError: it is one key alone, or holds what is none.
            MissingKeyError: a key has no row in the store; the first ones are named.
        """
        return self.of_rows(self.store.lookup(_texts(keys)))

    def of_rows(self, rows_B: NDArray[np.int64]) -> Target:
        """The target of these rows of the store."""
        stored = self.store.take(rows_B, self._names)
        return make_target(self.store.run, stored.columns, extra=self.store.extra, combination=self._combination)

    def __call__(self, batch: Any) -> Any:
        """A batch with its target: a dict gets one more entry, a tuple or list one more place at its end.

        For WebDataset, behind `.batched(...)`: ``pipeline.map(join)``. Raises as `target` does, and:

        Raises:
            MismatchError: an image is not the one that was labelled (see `image`), or a hard label differs (`label`).
        """
        target = self.of_rows(self._rows(batch))
        return {**batch, self.name: target} if isinstance(batch, Mapping) else (*batch, target)

    def columns(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch with the store's columns as tensors (B, W), named ``soft_...``: what Hugging Face datasets can cut
        into rows and collate again. `from_columns` makes a target of them, best in the collate function.

        For ``dataset.with_transform(join.columns)`` and ``dataset.map(join.columns, batched=True)``.
        """
        stored = self.store.take(self._rows(batch), self._names)
        return {**batch, **{f"soft_{name}": torch.from_numpy(np.array(a)) for name, a in stored.columns.items()}}

    def from_columns(self, batch: dict[str, Any]) -> Target:
        """The target that `columns` has put into a batch; takes its entries out of it.

        Raises:
            DataError: they are not there.
        """
        absent = [f"soft_{name}" for name in self._names if f"soft_{name}" not in batch]
        if absent:
            raise DataError(
                f"batch: expected the column {absent[0]!r} that LabelJoin.columns adds, found {', '.join(batch)}; keep "
                "it (remove_unused_columns=False)"
            )
        taken = {name: batch.pop(f"soft_{name}") for name in self._names}
        device = next((value.device for value in taken.values() if isinstance(value, Tensor)), torch.device("cpu"))
        dtypes = {column.name: column.numpy for column in self.store.run.columns}
        columns = {name: torch.as_tensor(value).cpu().numpy().astype(dtypes[name]) for name, value in taken.items()}
        return make_target(self.store.run, columns, extra=self.store.extra, combination=self._combination).to(device)

    def _rows(self, batch: Any) -> NDArray[np.int64]:
        keys = _texts(self._part(batch, self.key, "key"))
        rows_B = self.store.lookup(keys)
        if self.image is not None:
            self._compare(keys, self._part(batch, self.image, "image"), rows_B)
        if self.label is not None:
            labels = self._part(batch, self.label, "label")
            if len(labels) != len(rows_B):
                raise DataError(f"batch: expected a label for each of its {len(rows_B)} keys, found {len(labels)}")
            labels_B = _convert_given_labels(labels, self.store.run)
            _refuse_other_labels(self.store, rows_B, labels_B, "batch", "join with the keys of these samples")
        return rows_B

    def _compare(self, keys: Sequence[str], given: Any, rows_B: NDArray[np.int64]) -> None:
        now_B, stored_B = self._hash(given, rows_B), self.store.content[rows_B]
        changed = np.flatnonzero(changed_content(now_B, stored_B))
        if len(changed):
            raise MismatchError(
                f"batch: sample {keys[int(changed[0])]!r} is not the one that was labelled in {self.store.url} (its "
                f"content, xxh3-64, differs; {len(changed)} of {len(keys)} in its batch); join before any transform, "
                "with the keys of these samples"
            )
        if not self._warned and (why := why_not_comparable(now_B, stored_B)) is not None:
            self._warned = True
            log.warning("warning: %s: samples cannot be compared with those of the batches: %s", self.store.url, why)

    def _hash(self, given: Any, rows_B: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Content hashes of the samples of a batch, as those of the store's kind of samples."""
        kind = self.store.run.input
        if isinstance(given, Mapping):  # several arrays by name
            given = [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]
        samples = [stored_bytes(sample) for sample in given] if kind == "image" else list(given)
        if len(samples) != len(rows_B):
            raise DataError(
                f"batch: expected a sample for each of its {len(rows_B)} keys, found {len(samples)} of them"
            )
        now_B = hashes_of(samples, KINDS[kind].content_hash)
        if kind == "image":
            # Images of several channels are hashed as (C, H, W), whatever their layout in a file.
            changed = np.flatnonzero(changed_content(now_B, self.store.content[rows_B])).tolist()
            arrays = [place for place in changed if isinstance(samples[place], np.ndarray | Tensor)]
            now_B[arrays] = hashes_of([samples[place] for place in arrays], BANDS.content_hash)
        return now_B

    def _part(self, batch: Any, place: str | int, name: Literal["key", "image", "label"]) -> Any:
        try:
            return batch[place]
        except (KeyError, IndexError, TypeError):
            found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"{len(batch)} places"
            raise DataError(
                f"batch: expected its {name}s under {place!r}, found {found}; say where they are with {name}="
            ) from None


class SoftLabelled(Dataset[tuple[Any, int]]):
    """A map-style dataset whose items come with their row of the store; made by `with_soft_labels`.

    An item is (what the dataset gives, row). `collate` turns a list of them into (collated items, target), with one
    gather from the store: hand it to a DataLoader.
    """

    def __init__(
        self,
        dataset: "Dataset[Any]",
        join: LabelJoin,
        indices: NDArray[np.int64],
        rows: NDArray[np.int64],
        collate_fn: Callable[[list[Any]], Any],
        check_labels: bool = True,
    ) -> None:
        self.dataset, self.join, self._collate, self._check_labels = dataset, join, collate_fn, check_labels
        self._indices, self._rows = indices, rows

    @property
    def temperature(self) -> float:
        """That of the labels."""
        return self.join.temperature

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[tuple[Any, int]]:
        indices = self._indices[np.asarray(places, dtype=np.int64)].tolist()
        many = getattr(self.dataset, "__getitems__", None)
        items = many(indices) if many is not None else [self.dataset[index] for index in indices]
        rows_B = self._rows[np.asarray(places, dtype=np.int64)]
        if self._check_labels:
            labels_B = _convert_given_labels([_hard_label(item) for item in items], self.join.store.run)
            _refuse_other_labels(self.join.store, rows_B, labels_B, type(self.dataset).__name__)
        return list(zip(items, rows_B.tolist(), strict=True))

    def collate(self, items: Sequence[tuple[Any, int]]) -> tuple[Any, Target]:
        """(collated items, target), for ``DataLoader(collate_fn=...)``."""
        rows_B = np.array([row for _, row in items], dtype=np.int64)
        return self._collate([item for item, _ in items]), self.join.of_rows(rows_B)


def with_soft_labels(
    dataset: "Dataset[Any]",
    labels: str | Path | Store,
    *,
    key_fn: Callable[[int], str | int] | None = None,
    missing: Literal["error", "skip"] = "error",
    combine: Combination | None = None,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    check_labels: bool = True,
) -> SoftLabelled:
    """Attach soft labels to any map-style dataset, for a plain DataLoader.

        data = with_soft_labels(dataset, "labels/cifar10", key_fn=lambda index: paths[index])
        for (images, labels), target in DataLoader(data, batch_size=128, shuffle=True, collate_fn=data.collate):
            loss = distillation_loss(student(images), target, labels, temperature=data.temperature, ...)

    Args:
        dataset: anything with `__len__` and `__getitem__`; its items are left as they are.
        labels: a store or its path.
        key_fn: index -> key; the decimal index when absent. That of a `Subset` is its own number, not the number of the
            sample in the dataset behind it.
        missing: what happens to samples without a row: ``error`` names them, ``skip`` leaves them out.
        combine: see `LabelJoin`.
        collate_fn: of the dataset's items.
        check_labels: hold the hard labels that the dataset lists (`targets`, `labels`), and those of its items, against
            the store's, where both have some. False: the dataset's second elements are something else.

    Raises:
        MismatchError: a hard label is not the store's: the keys belong to other samples.
        MissingKeyError: see `missing`.
        DataError: nothing is left.
        StoreError, UsageError: see `LabelJoin`.
    """
    if missing not in ("error", "skip"):
        raise UsageError(f"missing: expected 'error' or 'skip', found {missing!r}")
    store = labels if isinstance(labels, Store) else open_store(labels)
    store.require_labels("labels")
    count = len(dataset)  # type: ignore[arg-type]
    keys = [str(index) if key_fn is None else key_fn(index) for index in range(count)]
    rows_N = store.lookup(keys, missing="error" if missing == "error" else "mask")
    kept = np.flatnonzero(rows_N >= 0)
    if not len(kept):
        raise DataError(
            f"{type(dataset).__name__}: none of its {count} samples has a row in {store.url}; give the key_fn that the "
            "labels were made with"
        )
    listed_N, classes = listed_labels(dataset) if check_labels else None, store.run.num_classes
    if listed_N is not None:
        listed = listed_N[kept] if store.run.activation == "softmax" else to_multi_hot(listed_N[kept], classes)
        _refuse_other_labels(store, rows_N[kept], listed, type(dataset).__name__)
    elif isinstance(dataset, Subset) and key_fn is None and _lacks_hard_labels(store):
        log.warning(
            "warning: Subset: its keys are its own numbers, 0 to %d, and no hard label says whether %s counts in the "
            "same way; with the store of the whole dataset, give key_fn=lambda index: str(subset.indices[index])",
            count - 1,
            store.url,
        )
    return SoftLabelled(dataset, LabelJoin(store, combine=combine), kept, rows_N[kept], collate_fn, check_labels)


def _lacks_hard_labels(store: Store) -> bool:
    if store.run.activation == "sigmoid":
        return not store.run.dataset.has_labels
    return bool((store.labels == IGNORE).all())


def _convert_given_labels(labels: Sequence[Any], run: Run) -> Labels:
    """Hard labels of a batch as the store has them: int64 (B,), or int8 (B, C) of independent outputs.

    Args:
        labels: class numbers, None or -100 for none; of independent outputs also a row of 1, 0 and -1 each.
    """
    if run.activation == "softmax":
        return np.array([IGNORE if one is None else int(one) for one in labels], dtype=np.int64)
    rows = [np.asarray(IGNORE if one is None else one) for one in labels]
    found = [to_multi_hot(row[None], run.num_classes)[0] for row in rows]
    if (wrong := next((row for row in found if row.shape != (run.num_classes,)), None)) is not None:
        raise DataError(f"batch: expected labels of {run.num_classes} classes, found one of shape {wrong.shape}")
    return stack_labels(found, run.num_classes)


def _hard_label(item: Any) -> Any:
    """The class of an item (image, class, ...) or {"label": class}; -100 where it has none. Of several classes at once
    the row that says 1, 0 or -1 for each."""
    if isinstance(item, Mapping):
        found = item.get("label")
    else:
        found = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
    if isinstance(found, Tensor | np.ndarray | np.generic) and found.ndim == 0:
        found = found.item()
    if isinstance(found, Tensor | np.ndarray) and found.ndim == 1:
        return found
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else IGNORE


_KEYS = (
    "give the key_fn that the labels were made with (a Subset counts from 0 again: its indices are the numbers), or "
    "check_labels=False if its items hold something else"
)


def _refuse_other_labels(
    store: Store, rows_B: NDArray[np.int64], labels_B: Labels, name: str, remedy: str = _KEYS
) -> None:
    stored_B = read_hard_labels(store, rows_B)
    other = np.flatnonzero(find_contradictions(labels_B, stored_B))
    if len(other):
        place = int(other[0])
        raise MismatchError(
            f"{name}: {len(other)} of {len(rows_B)} samples have another hard label than in {store.url}, the first "
            f"{store.keys[int(rows_B[place])]!r}: {labels_B[place]} here, {stored_B[place]} there; {remedy}"
        )


def _texts(keys: Any) -> list[str]:
    values = keys.tolist() if hasattr(keys, "tolist") else keys
    if isinstance(values, str | bytes | int | float) or not isinstance(values, Iterable):
        raise DataError(
            f"keys: expected those of a whole batch, found one alone, {values!r}; join behind .batched(...) or in the "
            "collate function, or give a list"
        )
    texts = [str(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"keys: expected texts, or integers for their digits, found {text!r}")
    return texts
