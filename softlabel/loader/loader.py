"""The loader that a training loop iterates: deterministic, resumable at any step, on any number of ranks.

Legend: B rows of a global batch, N samples, S rows of a rank's share.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.dataset import Source, open_source, report_source
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.inputs.base import InputTransform
from softlabel.labels.combine import Combination
from softlabel.loader.batch import Batch, BatchRequest
from softlabel.loader.dataset import JoinedDataset, Missing
from softlabel.loader.epochs import EpochSampler, Place, Plan
from softlabel.loader.label_stream import LabelStream, check_same_order
from softlabel.loader.order import BlockOrder, EpochOrder
from softlabel.loader.ranks import RankShare, Tail
from softlabel.loader.ratio_order import RatioOrder, ratio_order
from softlabel.loader.replay import ViewChoice, ViewOrder
from softlabel.loader.workers import BatchMaker, Failure, as_it_is
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.views import CropFlip

# Windows of a streamed epoch, unless the caller knows better.
_WINDOW_SAMPLES, _WINDOW_BLOCKS = 16_384, 8


class SoftLabelLoader:
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
        pin_memory: hand out batches in page-locked memory.
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
        pin_memory: bool = False,
        key_fn: Callable[[int], str | int] | None = None,
        ignore_labels: bool = False,
        combine: Combination | None = None,
        source_ratio: Sequence[int] | None = None,
        streaming: bool = False,
        window: int | None = None,
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
        if window is not None and (window < 1 or not streaming):
            raise UsageError(f"window: expected at least 1 block, and streaming, found {window} and {streaming}")
        if source_ratio is not None and streaming:
            raise UsageError(
                "source_ratio: data that is read block by block has one order; give the mixture as one source"
            )
        self.source = open_source(data, key_fn=key_fn, ignore_labels=ignore_labels)
        if self.source is not data and rank == 0:
            report_source(self.source)
        self.store = labels if labels is None or isinstance(labels, Store) else open_store(labels)
        self.batch_size, self.seed = batch_size, seed
        self.dataset = JoinedDataset(
            self.source,
            self.store,
            preprocessing=preprocessing,
            augment=augment,
            seed=seed,
            missing=missing,
            cache_bytes=cache_mb << 20,
            workers=workers,
            combine=combine,
            targets=not streaming,
            views=chosen_views,
        )
        self._combination = combine
        self._order: EpochOrder | BlockOrder | RatioOrder
        self._labels: LabelStream | None = None
        if streaming:
            self._order = self._block_order(window, shuffle)
            if self.store is not None:
                check_same_order(self.store, self.dataset.rows, self.source.name, self._key_at)
                self._labels = LabelStream(self.store, self._order, self.dataset.rows_of_epoch, combination=combine)
        elif source_ratio is not None:
            self._order = ratio_order(self.source, self.dataset.samples, source_ratio, seed=seed, shuffle=shuffle)
        else:
            self._order = EpochOrder(size=len(self.dataset), seed=seed, shuffle=shuffle)
        self._shares = replace(shares, samples=self._order.size)
        self._plan = Plan(self._order, self._shares)
        self._place = Place()
        self._live: object = None
        self._workers, self._pin = workers, pin_memory
        self._batches = self._new_batches()

    def _new_batches(self) -> BatchMaker:
        return BatchMaker(self.dataset, self._plan, workers=self._workers, pin_memory=self._pin)

    def __len__(self) -> int:
        """Batches in a whole epoch; the same on every rank."""
        return len(self._shares)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch over all ranks, those of a dropped tail included."""
        return self._order.size

    @property
    def epoch(self) -> int:
        """The epoch that is being iterated, or comes next."""
        return self._place.epoch

    @property
    def temperature(self) -> float:
        """The temperature of the labels, at which the loss needs no conversion; 1 without a store."""
        if self._combination is not None and self._combination.temperature is not None:
            return self._combination.temperature
        return self.store.manifest.run.temperature if self.store is not None else 1.0

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be this epoch, from this step on. Costs nothing, wherever it is."""
        if epoch < 0 or not 0 <= step <= len(self):
            raise UsageError(
                f"epoch and step: expected step 0 to {len(self)} of epoch 0 or later, found {epoch}, {step}"
            )
        self._enter(epoch, self._shares.after(0, step))

    def _enter(self, epoch: int, sample: int) -> None:
        self._place, self._live = Place(epoch=epoch, sample=sample), None

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch: the next one, unless `set_epoch` or `load_state_dict` has said which.

        Which epoch it is shows at the first batch: frameworks set it after they have asked for an iterator.

        Raises:
            UsageError: this iteration goes on after a newer one, or `set_epoch`, has taken its place.
        """
        live = self._begin()
        epoch, start, left = self._plan.epoch, self._plan.start, len(self._plan)
        try:
            for done, batch in enumerate(self._batches, 1):
                if isinstance(batch, Failure):
                    self.close()  # the garbage collector would wait 5 seconds for the worker processes
                    raise batch.error
                sample = self._shares.after(start, done)
                batch = self._with_target(batch, epoch, self._shares.after(start, done - 1), sample)
                self._place = Place(epoch=epoch, sample=sample, begun=True)
                yield batch
                if self._live is not live:
                    if done == left:
                        return
                    raise UsageError(
                        f"loader: this iteration of epoch {epoch} was ended after {done} of {left} batches by a newer "
                        "one, or by set_epoch; iterate once at a time, or use a second loader"
                    )
        except (RuntimeError, OSError, EOFError) as error:
            self.raise_if_worker_died(error)
            raise
        self.set_epoch(epoch + 1)

    def _begin(self) -> object:
        """Let a new iteration take the place of the one before; returns its identity."""
        if self._place.begun:
            self._enter(self._place.epoch + 1, 0)
        self._plan.epoch, self._plan.start = self._place.epoch, self._place.sample
        self._live = object()
        return self._live

    # ---- what frameworks look for ----

    @property
    def sampler(self) -> EpochSampler:
        """For Lightning, which calls its `set_epoch`."""
        return EpochSampler(len(self), self._set_epoch_from_outside, self._requests)

    @property
    def batch_sampler(self) -> EpochSampler:
        """For `skip_first_batches` of accelerate."""
        return self.sampler

    @property
    def collate_fn(self) -> Callable[[Any], Any]:
        """The identity: `dataset` gives whole batches."""
        return as_it_is

    @property
    def prefetch_factor(self) -> None:
        """For `skip_first_batches`, whose DataLoader has no worker processes."""
        return None

    def _set_epoch_from_outside(self, epoch: int) -> None:
        place = self._place
        if place.epoch != epoch or place.begun:
            self.set_epoch(epoch)

    def _requests(self) -> Iterator[BatchRequest]:
        if self._labels is not None:
            raise UsageError(
                "loader: labels that are streamed cannot be skipped from outside; resume with load_state_dict, or "
                "set_epoch(epoch, step)"
            )
        live = self._begin()
        epoch, start = self._plan.epoch, self._plan.start
        for done, request in enumerate(self._plan, 1):
            self._place = Place(epoch=epoch, sample=self._shares.after(start, done), begun=True)
            yield request
            if self._live is not live:
                return

    def _block_order(self, window: int | None, shuffle: bool) -> BlockOrder:
        # Samples that are left out move the edges: they are places among those that stay.
        stops = [0, *(stop for _, stop in self.source.blocks())]
        edges = np.unique(np.searchsorted(self.dataset.samples, stops))
        if window is None:
            blocks = len(edges) - 1
            window = max(_WINDOW_BLOCKS, -(-_WINDOW_SAMPLES * blocks // len(self.dataset)))
        return BlockOrder(edges, seed=self.seed, window=window, shuffle=shuffle)

    def _key_at(self, position: int) -> str:
        return self.dataset.keys(np.array([position]))[0]

    def _with_target(self, batch: Batch, epoch: int, start: int, stop: int) -> Batch:
        """The batch of the positions start to stop, with its labels where these are streamed."""
        if self._labels is None:
            return batch
        target = self._labels.target(epoch, start, stop, batch.rows.numpy())
        return replace(batch, target=target.pin_memory() if self._batches.pin_memory else target)

    def __getstate__(self) -> dict[str, Any]:
        """Without worker processes and iterations: a copy makes its own, and goes on with the rest of the epoch."""
        return {**self.__dict__, "_batches": None, "_live": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # What moves on with the epochs is a copy's own, also where the data is shared.
        self._plan = Plan(self._order, self._shares)
        self._labels = None if self._labels is None else copy.copy(self._labels)
        at_the_end = not self._shares.left(self._place.sample)
        self._place = replace(self._place, begun=self._place.begun and at_the_end)
        self._batches = self._new_batches()

    def state_dict(self) -> dict[str, int | str]:
        """Where the iteration is, after the last batch that was handed out; plain numbers and strings.

        Every rank has the same state: `sample` counts those of all of them.
        """
        return {
            "epoch": self._place.epoch,
            "sample": self._place.sample,
            "seed": self.seed,
            "samples": len(self.dataset),
            "store": self.store.manifest.store_id if self.store is not None else "",
            "order": self._order.name,
            "views": self.dataset.views,
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue where `state_dict` was called: with the next sample of the epoch, whatever the batch size, the
        number of ranks and the number of workers were and are. Where nothing is left of that epoch, the next one
        begins.

        Raises:
            MismatchError: the state is of another seed, dataset size, store, order or number of views.
        """
        mine = self.state_dict()
        before = state.get("views", mine["views"])
        if before != mine["views"]:
            raise MismatchError(
                f"loader state: used {before} views of each sample, found {mine['views']}: the epochs to come would be "
                f"other ones; go on with SoftLabelLoader(..., views={before})"
            )
        different = [
            f"{name}: {state.get(name)!r} in the state, {value!r} here"
            for name, value in mine.items()
            if name not in ("epoch", "sample", "views") and state.get(name) != value
        ]
        if different:
            raise MismatchError(f"loader state of another loader: {'; '.join(different)}")
        epoch, sample = state.get("epoch"), state.get("sample")
        if not (isinstance(epoch, int) and isinstance(sample, int) and epoch >= 0 and 0 <= sample <= self.num_samples):
            raise MismatchError(
                f"loader state: expected sample 0 to {self.num_samples} of epoch 0 or later, found {sample!r} of "
                f"{epoch!r}"
            )
        if self._shares.left(sample):
            self._enter(epoch, sample)
        else:
            self._enter(epoch + 1, 0)

    def raise_if_worker_died(self, error: Exception) -> None:
        """The death of a worker process shows as a RuntimeError wherever the main process happens to be, or as a broken
        connection: make one clear error of it.

        Raises:
            DataError: a worker has died.
        """
        try:
            reason = self._batches.death(error)
        except RuntimeError as death:  # of torch's signal handler, which may raise anywhere after a connection broke
            reason = self._batches.death(death)
        if reason is not None:
            # Until it is forgotten, the dead worker is reported again whenever any child process ends.
            with contextlib.suppress(RuntimeError):
                self.close()
            raise DataError(
                f"{self.source.name}: a loader process died ({reason}); it may have run out of memory: use fewer "
                "workers"
            ) from error

    def close(self) -> None:
        """End the worker processes and the reading of labels. A loader can be iterated again afterwards."""
        if self._labels is not None:
            self._labels.close()
        self._batches.close()
