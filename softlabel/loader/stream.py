"""The loader that a training loop iterates: deterministic, resumable at any step.

Legend: B batch, N samples.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from softlabel.dataset import Source, open_source
from softlabel.errors import DataError, MismatchError, SoftLabelError, UsageError
from softlabel.labels import Mix
from softlabel.loader.batch import Batch, BatchRequest
from softlabel.loader.joined import JoinedDataset, Missing
from softlabel.order import EpochOrder
from softlabel.store.reader import Store, open_store
from softlabel.teacher import Preprocessing
from softlabel.views import CropFlip

# Working out an order costs a hundred calls of numpy, however short it is.
_STEPS_AT_ONCE = 64


class SoftLabelLoader:
    """Batches of images, hard labels and soft labels, joined by key.

        loader = SoftLabelLoader("images.parquet", "labels/cifar10", batch_size=128)
        loss = DistillationLoss(temperature=loader.temperature, soft_weight=0.9, hard_weight=0.1)
        for epoch in range(10):
            for batch in loader:
                loss(student(batch.images.float() / 255), batch.target, batch.labels).backward()

    Every complete iteration is one epoch, and the next one is shuffled anew. The order and the augmentation are a pure
    function of (seed, epoch, step): `set_epoch` reaches any of them, `state_dict` and `load_state_dict` resume there.

    Args:
        data: a SOURCE (see `open_source`), or a map-style dataset.
        labels: a store or its path; None: hard labels only.
        batch_size: samples a batch.
        seed: of order and augmentation.
        shuffle: False gives the source's own order.
        tail: what becomes of the samples that do not fill the last batch; ``keep`` gives a smaller batch, ``drop``
            leaves them out of this epoch (unless there is no other batch).
        augment: drawn anew in every epoch; None: none. The soft labels are those of the un-augmented image.
        preprocessing: whose geometry brings images to one size; None: they are of one size.
        missing: ``error``, ``skip`` or ``hard-only``, for samples that the store has no row for.
        workers: processes that read and decode; 0 does it in this one, which is best once images are cached.
        cache_mb: memory for decoded images, in MiB; all or none are kept.
        pin_memory: hand out batches in page-locked memory.
        key_fn: index -> key, for a map-style dataset; the decimal index when absent.
        ignore_labels: hand out -100 for every hard label.
        mix: rule, weights and temperature for the members of a store that keeps them apart.

    Raises:
        SoftLabelError: data or store cannot be opened, or do not belong together (see `JoinedDataset`).
    """

    def __init__(
        self,
        data: "str | Path | Source | Dataset[Any]",
        labels: str | Path | Store | None = None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        shuffle: bool = True,
        tail: Literal["keep", "drop"] = "keep",
        augment: CropFlip | None = None,
        preprocessing: Preprocessing | None = None,
        missing: Missing = "error",
        workers: int = 0,
        cache_mb: int = 4096,
        pin_memory: bool = False,
        key_fn: Callable[[int], str] | None = None,
        ignore_labels: bool = False,
        mix: Mix | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, found {batch_size}")
        if workers < 0:
            raise UsageError(f"workers: expected at least 0, found {workers}")
        self.source = open_source(data, key_fn=key_fn, ignore_labels=ignore_labels)
        self.store = labels if labels is None or isinstance(labels, Store) else open_store(labels, verify="full")
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
        )
        self._mix = mix
        self._drop_tail = tail == "drop" and len(self.dataset) >= batch_size
        order = EpochOrder(size=len(self.dataset), seed=seed, shuffle=shuffle)
        self._plan = _Plan(order, batch_size, len(self))
        self._place = _Place()
        self._start_step = 0
        # Its own generator: workers are seeded from it, and the global one stays as the training loop left it.
        self._batches = DataLoader(
            _Guarded(self.dataset),
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
        """Batches in an epoch."""
        samples = len(self.dataset)
        return samples // self.batch_size if self._drop_tail else -(-samples // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, those of a dropped tail included."""
        return len(self.dataset)

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
        self._place = _Place(epoch=epoch, step=step)
        self._start_step = step

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch. An iteration that is left early begins again, one that ends moves on."""
        epoch, start = self._place.epoch, self._start_step
        self._plan.epoch, self._plan.start = epoch, start
        self._place = _Place(epoch=epoch, step=start)
        try:
            for step, batch in enumerate(self._batches, start + 1):
                if isinstance(batch, _Failure):
                    raise batch.error
                self._place = _Place(epoch=epoch, step=step)
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            self.raise_if_worker_died(error)
            raise
        self.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, int | str]:
        """Where the iteration is, after the last batch that was handed out; plain numbers and strings."""
        store_id = self.store.manifest.store_id if self.store is not None else ""
        place = self._place
        return {
            "epoch": place.epoch,
            "sample": min(place.step * self.batch_size, len(self.dataset)),
            "seed": self.seed,
            "samples": len(self.dataset),
            "store": store_id,
        }

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue where `state_dict` was called, also with another batch size if the place is a multiple of it.

        Raises:
            MismatchError: the state is of another seed, dataset size or store.
        """
        mine = self.state_dict()
        different = [
            f"{name}: {state.get(name)!r} in the state, {mine[name]!r} here"
            for name in ("seed", "samples", "store")
            if state.get(name) != mine[name]
        ]
        if different:
            raise MismatchError(f"loader state of another loader: {'; '.join(different)}")
        epoch, sample = int(state["epoch"]), int(state["sample"])
        step, rest = divmod(sample, self.batch_size)
        if rest and sample != len(self.dataset):
            raise MismatchError(
                f"loader state: sample {sample} of the epoch is not at the start of a batch of {self.batch_size}; "
                "resume with a batch size that divides it"
            )
        self.set_epoch(epoch, min(step + bool(rest), len(self)))

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
        """End the worker processes. A loader can be iterated again afterwards."""
        iterator = getattr(self._batches, "_iterator", None)
        if iterator is not None:
            self._batches._iterator = None
            iterator._shutdown_workers()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way out of a worker process, which would otherwise arrive wrapped into a traceback's text."""

    error: SoftLabelError


class _Plan(Sampler[Any]):
    """The requests of one epoch, from `start` on."""

    def __init__(self, order: EpochOrder, batch_size: int, steps: int) -> None:
        self.order, self.batch_size, self.steps = order, batch_size, steps
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, size = self.epoch, self.batch_size
        for start in range(self.start, self.steps, _STEPS_AT_ONCE):
            stop = min(start + _STEPS_AT_ONCE, self.steps)
            samples = self.order.samples(epoch, start * size, stop * size)
            for first in range(0, (stop - start) * size, size):
                yield BatchRequest(positions=samples[first : first + size], view=epoch)


class _Guarded(Dataset[Batch]):
    """Hands errors over as values; see `_Failure`."""

    def __init__(self, dataset: JoinedDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, request: BatchRequest | Sequence[int]) -> "Batch | _Failure":
        try:
            return self.dataset.__getitems__(request)
        except SoftLabelError as error:
            return _Failure(error)


def _as_it_is(batch: Any) -> Any:
    return batch
