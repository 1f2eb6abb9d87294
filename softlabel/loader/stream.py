"""The loader that a training loop iterates: deterministic, resumable at any step, on any number of ranks.

Legend: B rows of a global batch, N samples, S rows of a rank's share.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from softlabel.dataset import Source, open_source, report_source
from softlabel.errors import DataError, MismatchError, SoftLabelError, UsageError
from softlabel.labels import Mix
from softlabel.loader.batch import Batch, BatchRequest
from softlabel.loader.joined import JoinedDataset, Missing
from softlabel.loader.labelstream import LabelStream, check_same_order
from softlabel.loader.mixed import MixedOrder, mixed_order
from softlabel.loader.replay import ViewOrder
from softlabel.loader.shares import Shares, Tail
from softlabel.order import BlockOrder, EpochOrder
from softlabel.store.reader import Store, open_store
from softlabel.teacher import Preprocessing
from softlabel.views import CropFlip

# Working out an order costs a hundred calls of numpy, however short it is.
_STEPS_AT_ONCE = 64
# Windows of a streamed epoch, unless the caller knows better.
_WINDOW_SAMPLES, _WINDOW_BLOCKS = 16_384, 8


class SoftLabelLoader:
    """Batches of images, hard labels and soft labels, joined by key.

        loader = SoftLabelLoader("images.parquet", "labels/cifar10", batch_size=128)
        loss = DistillationLoss(temperature=loader.temperature, soft_weight=0.9, hard_weight=0.1)
        for epoch in range(10):
            for batch in loader:
                loss(student(batch.images.float() / 255), batch.target, batch.labels).backward()

    Every complete iteration is one epoch, and the next one is shuffled anew. The order and the augmentation are a pure
    function of (seed, epoch, step): `set_epoch` reaches any of them, `state_dict` and `load_state_dict` resume there.

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
        augment: drawn anew in every epoch; None: none. The soft labels are those of the un-augmented image. A store
            whose rows are views takes none: its images are the views that the teacher saw.
        preprocessing: whose geometry brings images to one size; None: they are of one size.
        missing: ``error``, ``skip`` or ``hard-only``, for samples that the store has no row for.
        workers: processes that read and decode; 0 does it in this one, which is best once images are cached.
        cache_mb: memory for decoded images, in MiB; all or none are kept.
        pin_memory: hand out batches in page-locked memory.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        ignore_labels: hand out -100 for every hard label.
        mix: rule, weights and temperature for the members of a store that keeps them apart.
        streaming: read labels in step with the images, a window of blocks at a time and the next one ahead, and keep
            nothing: for stores that neither memory nor the local disk holds. The epoch is then shuffled block-locally
            (see `BlockOrder` for how well), so that images come block by block too. Data and store must list their
            samples in one order.
        ratio: a whole number for each of several sources: so many samples of each there are for one another, evenly
            spread; an epoch ends where the first source has been seen once. None: an epoch is every sample of all.
        window: with `streaming`, how many blocks are shuffled together and held in memory (up to three times); None:
            as many as hold 16,384 samples, at least 8.
        view_order: which views of a store that has several an epoch uses: ``cycle`` (epoch e: view e mod V) or
            ``random`` (each sample its own, which follows from (seed, key, epoch)).
        check_views: the pixels of one in so many replayed views are compared with what the teacher saw; 0: none.
        rank: which of the processes this is, from 0.
        world_size: how many processes train together.

    Raises:
        UsageError: numbers that make no sense, or a tail that several ranks cannot have.
        SoftLabelError: data or store cannot be opened, or do not belong together (see `JoinedDataset`).
    """

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
        preprocessing: Preprocessing | None = None,
        missing: Missing = "error",
        workers: int = 0,
        cache_mb: int = 4096,
        pin_memory: bool = False,
        key_fn: Callable[[int], str] | None = None,
        ignore_labels: bool = False,
        mix: Mix | None = None,
        ratio: Sequence[int] | None = None,
        streaming: bool = False,
        window: int | None = None,
        view_order: ViewOrder = "cycle",
        check_views: int = 256,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        # Before anything is opened: wrong numbers cost nothing.
        shares = Shares(samples=0, batch_size=batch_size, tail=tail, rank=rank, world_size=world_size)
        if workers < 0:
            raise UsageError(f"workers: expected at least 0, found {workers}")
        if window is not None and (window < 1 or not streaming):
            raise UsageError(f"window: expected at least 1 block, and streaming, found {window} and {streaming}")
        if ratio is not None and streaming:
            raise UsageError("ratio: data that is read block by block has one order; give the mixture as one source")
        self.source = open_source(data, key_fn=key_fn, ignore_labels=ignore_labels)
        if self.source is not data and rank == 0:
            report_source(self.source)
        self.store = labels if labels is None or isinstance(labels, Store) else open_store(labels, verify="once")
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
            mix=mix,
            targets=not streaming,
            view_order=view_order,
            check_views=check_views,
        )
        self._mix = mix
        self._order: EpochOrder | BlockOrder | MixedOrder
        self._labels: LabelStream | None = None
        if streaming:
            self._order = self._block_order(window, shuffle)
            if self.store is not None:
                check_same_order(self.store, self.dataset.rows, self.source.name, self._key_at)
                self._labels = LabelStream(self.store, self._order, self.dataset.rows_of_epoch, mix=mix)
        elif ratio is not None:
            self._order = mixed_order(self.source, self.dataset.samples, ratio, seed=seed, shuffle=shuffle)
        else:
            self._order = EpochOrder(size=len(self.dataset), seed=seed, shuffle=shuffle)
        self._shares = replace(shares, samples=self._order.size)
        self._plan = _Plan(self._order, self._shares)
        self._place = _Place()
        self._start = 0
        self._guarded = _Guarded(self.dataset)
        # Its own generator: workers are seeded from it, and the global one stays as the training loop left it.
        self._batches = DataLoader(
            self._guarded,
            batch_sampler=self._plan,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
            # Forked workers share the cache of decoded images.
            multiprocessing_context="fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None,
        )

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
        if self._mix is not None and self._mix.temperature is not None:
            return self._mix.temperature
        return self.store.manifest.run.temperature if self.store is not None else 1.0

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be this epoch, from this step on. Costs nothing, wherever it is."""
        if epoch < 0 or not 0 <= step <= len(self):
            raise UsageError(
                f"epoch and step: expected step 0 to {len(self)} of epoch 0 or later, found {epoch}, {step}"
            )
        self._enter(epoch, self._shares.after(0, step))

    def _enter(self, epoch: int, sample: int) -> None:
        self._place = _Place(epoch=epoch, sample=sample)
        self._start = sample

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch. An iteration that is left early begins again, one that ends moves on."""
        epoch, start = self._place.epoch, self._start
        self._plan.epoch, self._plan.start = epoch, start
        self._place = _Place(epoch=epoch, sample=start)
        try:
            for done, batch in enumerate(self._loaded(), 1):
                if isinstance(batch, _Failure):
                    raise batch.error
                batch = self._with_target(batch, epoch, self._place.sample, self._shares.after(start, done))
                self._place = _Place(epoch=epoch, sample=self._shares.after(start, done))
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            self.raise_if_worker_died(error)
            raise
        self.set_epoch(epoch + 1)

    def _loaded(self) -> "Iterator[Batch | _Failure]":
        """The batches of the plan, made by workers or right here, where a DataLoader would only take time."""
        if self._batches.num_workers:
            yield from self._batches
            return
        pin = self._batches.pin_memory and torch.cuda.is_available()
        for request in self._plan:
            made = self._guarded.__getitems__(request)
            yield made.pin_memory() if pin and isinstance(made, Batch) else made

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
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue where `state_dict` was called: with the next sample of the epoch, whatever the batch size, the
        number of ranks and the number of workers were and are.

        Raises:
            MismatchError: the state is of another seed, dataset size, store or order.
        """
        mine = self.state_dict()
        different = [
            f"{name}: {state.get(name)!r} in the state, {value!r} here"
            for name, value in mine.items()
            if name not in ("epoch", "sample") and state.get(name) != value
        ]
        if different:
            raise MismatchError(f"loader state of another loader: {'; '.join(different)}")
        epoch, sample = state.get("epoch"), state.get("sample")
        if not (isinstance(epoch, int) and isinstance(sample, int) and epoch >= 0 and 0 <= sample <= self.num_samples):
            raise MismatchError(
                f"loader state: expected sample 0 to {self.num_samples} of epoch 0 or later, found {sample!r} of "
                f"{epoch!r}"
            )
        self._enter(epoch, sample)

    def raise_if_worker_died(self, error: Exception) -> None:
        """The death of a worker process shows as a RuntimeError wherever the main process happens to be, or as a broken
        connection: make one clear error of it.

        Raises:
            DataError: a worker has died.
        """
        iterator = getattr(self._batches, "_iterator", None)
        workers = getattr(iterator, "_workers", ())
        try:
            if isinstance(error, OSError | EOFError):
                # The connection breaks an instant before the process is known to be dead.
                for worker in workers:
                    worker.join(timeout=0.5)
        except RuntimeError as death:  # of torch's signal handler
            error = death
        if "DataLoader worker" in str(error) or any(worker.exitcode not in (None, 0) for worker in workers):
            # Until it is forgotten, the dead worker is reported again whenever any child process ends.
            with contextlib.suppress(RuntimeError):
                self.close()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self.source.name}: a loader process died ({reason}); is there memory for so many workers?"
            ) from error

    def close(self) -> None:
        """End the worker processes and the reading of labels. A loader can be iterated again afterwards."""
        if self._labels is not None:
            self._labels.close()
        iterator = getattr(self._batches, "_iterator", None)
        if iterator is not None:
            self._batches._iterator = None
            iterator._shutdown_workers()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    epoch: int = 0
    sample: int = 0  # of the epoch, over all ranks: how many were handed out


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way out of a worker process, which would otherwise arrive wrapped into a traceback's text."""

    error: SoftLabelError


class _Plan(Sampler[Any]):
    """This rank's requests of one epoch, from position `start` on."""

    def __init__(self, order: EpochOrder | BlockOrder | MixedOrder, shares: Shares) -> None:
        self.order, self.shares = order, shares
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.shares.left(self.start)

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, shares, sample, left = self.epoch, self.shares, self.start, len(self)
        while left:
            steps = min(_STEPS_AT_ONCE, left)
            cuts = list(shares.cut(sample, steps))
            samples = self.order.at(epoch, np.concatenate([cut.places for cut in cuts]))
            first = 0
            for cut in cuts:
                stop = first + len(cut.places)
                yield BatchRequest(positions=samples[first:stop], view=epoch, counted=cut.counted)
                first = stop
            sample, left = shares.after(sample, steps), left - steps


class _Guarded(Dataset[Batch]):
    """Hands errors over as values; see `_Failure`."""

    def __init__(self, dataset: JoinedDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, request: BatchRequest | Sequence[int]) -> "Batch | _Failure":
        try:
            batch = self.dataset.__getitems__(request)
            if isinstance(request, BatchRequest) and request.counted is not None:
                weight_S = (torch.arange(len(batch)) < request.counted).float()
                batch = replace(batch, weight=weight_S)
            return batch
        except SoftLabelError as error:
            return _Failure(error)


def _as_it_is(batch: Any) -> Any:
    return batch
