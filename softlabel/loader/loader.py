"""The loader that a training loop iterates: deterministic, resumable at any step, on any number of ranks.

Legend: B rows of a global batch, N samples, S rows of a rank's share.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.dataset import Source, open_source, report_source
from softlabel.errors import MismatchError, UsageError
from softlabel.inputs.base import InputTransform
from softlabel.labels.combine import Combination
from softlabel.loader.batch import Batch
from softlabel.loader.dataset import JoinedDataset
from softlabel.loader.epoch_loader import EpochLoader
from softlabel.loader.features import BatchFeature
from softlabel.loader.join import Missing
from softlabel.loader.label_stream import LabelStream, check_same_order
from softlabel.loader.order import BlockOrder, EpochOrder
from softlabel.loader.ranks import RankShare, Tail
from softlabel.loader.ratio_order import RatioOrder, ratio_order
from softlabel.loader.replay import ViewChoice, ViewOrder
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.views import CropFlip

# Windows of a streamed epoch, unless the caller knows better.
_WINDOW_SAMPLES, _WINDOW_BLOCKS = 16_384, 8


class SoftLabelLoader(EpochLoader[Batch]):
    """Batches of images, hard labels and soft labels, joined by key.

        loader = SoftLabelLoader("images.parquet", "labels/cifar10", batch_size=128)
        loss = DistillationLoss(temperature=loader.temperature, soft_weight=0.9, hard_weight=0.1)
        for epoch in range(10):
            for batch in loader:
                loss(student(batch.inputs.float() / 255), batch.target, batch.labels).backward()

    Every iteration is one epoch, in an order of its own. The next one is the next epoch, also where the loop took
    `len(loader)` batches with `next()`, or stopped before (a look at one batch counts: `set_epoch(0)` takes it back).
    The order and the augmentation are a pure function of (seed, epoch, step): `set_epoch` reaches any of them,
    `state_dict` and `load_state_dict` resume there. Lightning, accelerate and the Trainer of transformers find the
    methods that they set epochs and resume with. One iteration at a time: a newer one ends those before it.

    Several processes train together when each has a loader with its own `rank`: every global batch is the same
    `batch_size` samples whatever the number of ranks, and each rank gets its part of it, in as many steps and as many
    rows as every other. Rows with `Batch.weight` 0 are there for that alone and must not count.

    Args:
        data: a SOURCE (see `open_source`), several of them, or a map-style dataset.
        labels: a store or its path; None: hard labels only.
        batch_size: samples a batch, over all ranks together.
        seed: of order and augmentation.
        shuffle: False gives the source's own order.
        tail: what becomes of the samples that do not fill the last batch; ``keep`` gives a smaller batch (one rank
            only), ``drop`` leaves them out of this epoch (unless there is no other batch), ``pad`` fills the batch with
            rows of weight 0.
        augment: drawn again in every epoch; None: none. The soft labels are those of the un-augmented image. A store
            whose rows are views takes none: its images are the views that the teacher saw.
        preprocessing: whose geometry brings images to one size; None: they are of one size.
        missing: ``error``, ``skip`` or ``hard-only``, for samples that the store has no row for.
        workers: processes that read and decode; 0 does it in this one, which is best once images are cached.
        cache_mb: memory for decoded images, in MiB; all or none are kept.
        cache_device: where decoded samples are kept instead, and augmented: inputs of batches are then there. All must
            fit, and `workers` be 0. On the CPU `cache_mb` is the limit, on a GPU half of what is free.
        pin_memory: hand out batches in page-locked memory, for a GPU, and make the next one in a thread meanwhile.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        ignore_labels: hand out -100 (of independent outputs -1) for every hard label.
        combine: rule, weights and temperature for the members of a store that keeps them apart.
        streaming: read labels in step with the images, a window of blocks at a time and the next one ahead, and keep
            nothing: for stores that neither memory nor the local disk holds. The epoch is then shuffled block-locally
            (see `BlockOrder` for how well), so that images come block by block too. Data and store must list their
            samples in one order.
        source_ratio: a whole number for each of several sources: so many samples of each there are for one another,
            evenly spread; an epoch ends where the first source has been seen once. None: an epoch is every sample of
            all.
        window: with `streaming`, how many blocks are shuffled together and held in memory (up to three times); None:
            as many as hold 16,384 samples, at least 8.
        also: what batches have of the teacher beside its logits, from a store that has it: ``embedding`` and
            ``attention``; nothing of them is read otherwise.
        view_order: which views of a store that has several an epoch uses: ``cycle`` (epoch e: view e mod V) or
            ``random`` (each sample its own, which follows from (seed, key, epoch)).
        check_views: the pixels of one in so many replayed views are compared with what the teacher saw; 0: none.
        views: how many of the store's views are used, from the first one on, so that a loop that goes on sees what it
            began with though views have been added since; None: all.
        rank: which of the processes this is, from 0.
        world_size: how many processes train together.

    Raises:
        UsageError: numbers that make no sense, or a tail that several ranks cannot have.
        SoftLabelError: data or store cannot be opened, or do not belong together (see `JoinedDataset`).
    """

    dataset: JoinedDataset

    @check_arguments
    def __init__(
        self,
        data: "str | Path | Source | list[str] | Dataset[Any]",
        labels: str | Path | Store | None = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "keep",
        augment: CropFlip | None = None,
        preprocessing: InputTransform | None = None,
        missing: Missing = "error",
        workers: int = 0,
        cache_mb: int = 4096,
        cache_device: torch.device | str | None = None,
        pin_memory: bool = False,
        key_fn: Callable[[int], str | int] | None = None,
        ignore_labels: bool = False,
        combine: Combination | None = None,
        source_ratio: Sequence[int] | None = None,
        streaming: bool = False,
        window: int | None = None,
        also: Sequence[BatchFeature] = (),
        view_order: ViewOrder = "cycle",
        check_views: int = 256,
        views: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # Before anything is opened: wrong numbers cost nothing.
        shares = RankShare(samples=0, batch_size=batch_size, tail=tail, rank=rank, world_size=world_size)
        chosen_views = ViewChoice(order=view_order, check=check_views, count=views)
        if workers < 0:
            raise UsageError(f"workers: expected at least 0, found {workers}")
        if workers and cache_device is not None:
            raise UsageError(f"workers: expected 0 with a cache on a device, which this process fills, found {workers}")
        if window is not None and (window < 1 or not streaming):
            raise UsageError(f"window: expected at least 1 block, and streaming, found {window} and {streaming}")
        if source_ratio is not None and streaming:
            raise UsageError(
                "source_ratio: data that is read block by block has one order; give the mixture as one source"
            )
        source = open_source(data, key_fn=key_fn, ignore_labels=ignore_labels)
        if source is not data and rank == 0:
            report_source(source)
        store = labels if labels is None or isinstance(labels, Store) else open_store(labels)
        self.batch_size = batch_size
        joined = JoinedDataset(
            source,
            store,
            preprocessing=preprocessing,
            augment=augment,
            seed=seed,
            missing=missing,
            cache_bytes=cache_mb << 20,
            workers=workers,
            combine=combine,
            targets=not streaming,
            device=None if cache_device is None else torch.device(cache_device),
            also=also,
            views=chosen_views,
        )
        order: EpochOrder | BlockOrder | RatioOrder
        self._labels: LabelStream | None = None
        if streaming:
            order = _order_blocks(joined, seed=seed, window=window, shuffle=shuffle)
            if store is not None:
                check_same_order(store, joined.rows, source.name, lambda place: joined.keys(np.array([place]))[0])
                self._labels = LabelStream(store, order, joined.rows_of_epoch, combination=combine, also=also)
        elif source_ratio is not None:
            order = ratio_order(source, joined.samples, source_ratio, seed=seed, shuffle=shuffle)
        else:
            order = EpochOrder(size=len(joined), seed=seed, shuffle=shuffle)
        super().__init__(
            source=source,
            store=store,
            dataset=joined,
            order=order,
            shares=shares,
            seed=seed,
            workers=workers,
            pin_memory=pin_memory,
            ahead=pin_memory and cache_device is None,
            combine=combine,
        )

    def _complete(self, batch: Batch, epoch: int, start: int, stop: int) -> Batch:
        """With its labels where these are streamed."""
        if self._labels is None:
            return batch
        members_B = self.dataset.choose_members(batch.keys, epoch)
        target, found = self._labels.take(epoch, start, stop, batch.rows.numpy(), members_B)
        if self._batches.pin_memory:
            target = None if target is None else target.pin_memory()
            found = {name: one.pin_memory() for name, one in found.items()}
        features: dict[str, Any] = dict(found)
        return replace(batch, target=target, **features)

    def _identity(self) -> dict[str, int | str]:
        return {
            "seed": self.seed,
            "samples": len(self.dataset),
            "store": self.store.manifest.store_id if self.store is not None else "",
            "order": self._order.name,
            "views": self.dataset.views,
        }

    def _check_state(self, state: Mapping[str, int | str]) -> None:
        before = state.get("views", self.dataset.views)
        if before != self.dataset.views:
            raise MismatchError(
                f"loader state: used {before} views of each sample, found {self.dataset.views}: the epochs to come "
                f"would be other ones; go on with SoftLabelLoader(..., views={before})"
            )

    def _refuse_skipping(self) -> None:
        if self._labels is not None:
            raise UsageError(
                "loader: labels that are streamed cannot be skipped from outside; resume with load_state_dict, or "
                "set_epoch(epoch, step)"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What moves on with the epochs is a copy's own.
        self._labels = None if self._labels is None else copy.copy(self._labels)

    def close(self) -> None:
        """End the worker processes and the reading of labels. A loader can be iterated again afterwards."""
        if self._labels is not None:
            self._labels.close()
        super().close()


def _order_blocks(joined: JoinedDataset, *, seed: int, window: int | None, shuffle: bool) -> BlockOrder:
    # Samples that are left out move the edges: they are places among those that stay.
    stops = [0, *(stop for _, stop in joined.source.blocks())]
    edges = np.unique(np.searchsorted(joined.samples, stops))
    if window is None:
        blocks = len(edges) - 1
        window = max(_WINDOW_BLOCKS, -(-_WINDOW_SAMPLES * blocks // len(joined)))
    return BlockOrder(edges, seed=seed, window=window, shuffle=shuffle)
