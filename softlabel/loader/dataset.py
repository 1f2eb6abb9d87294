"""A map-style dataset of whole batches: the images of a source, joined to the rows of a store by key.

Legend: B batch, C classes, H and W pixels, N samples of the source, K samples that are kept.

The join is done once, for all samples, when the dataset is made; a batch then costs a read of its images, a gather of
its labels, and nothing per row that Python has to loop over once the images are cached.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from softlabel.dataset import Source, detect_decoding, first_samples, require_samples
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.inputs.base import Images, Inputs, InputTransform, form_of
from softlabel.inputs.batch import collate_samples, decode_samples, refuse_failed
from softlabel.inputs.content import changed_content, hashes_of, why_not_comparable
from softlabel.inputs.transforms import default_transform
from softlabel.labels.combine import Combination
from softlabel.loader.batch import Batch, BatchKeys, BatchRequest
from softlabel.loader.cache import SampleCache
from softlabel.loader.device_cache import DeviceCache, open_device_cache, refuse_views
from softlabel.loader.features import BatchFeature, check_also, decode_features, list_columns
from softlabel.loader.hard_labels import (
    check_classes,
    choose_activation,
    convert_labels,
    find_contradictions,
    read_hard_labels,
)
from softlabel.loader.join import Int64s, Kept, Missing, choose_kept, describe_changed, read_keys, refuse_positions
from softlabel.loader.replay import Replay, ViewChoice, rows_of_views
from softlabel.loader.target import choose_members, make_target
from softlabel.store.reader import Store
from softlabel.store.view_columns import DIFFERENCE
from softlabel.views import CropFlip, Views, stacked

log = logging.getLogger("softlabel")

_COMPARED = 8  # images that are compared before the first batch
_ALL_VIEWS = ViewChoice()


class JoinedDataset(Dataset[Batch]):
    """Samples of a source with the soft labels that a store has for their keys.

    Args:
        source: where images and hard labels come from.
        store: where soft labels come from; None: hard labels only.
        preprocessing: brings every image to one size (its geometry; normalisation is left to the training loop).
            None: the images are of one size already.
        augment: drawn again for every view (epoch); None: none.
        seed: of the augmentation.
        missing: what happens to a sample whose key is not in the store. ``error`` names such keys, ``skip`` leaves the
            samples out, ``hard-only`` keeps them with their hard label alone. Samples that the store lists as
            unreadable images are left out in any case.
        cache_bytes: memory for decoded images; they are kept if all of them fit.
        workers: how many processes will share the dataset.
        combine: how a store's members become one teacher, where it keeps them apart.
        targets: False leaves `Batch.target` to who reads labels in another way; `Batch.rows` says which they are.
        device: where decoded samples are kept, and augmented; None: in main memory.
        also: what a batch has of a teacher beside its logits: "embedding", "attention", "difference".
        views: of a store whose rows are views: which of them. The images are then the views that the teacher saw, and
            hard labels are left out where two images are mixed into one.

    Raises:
        UsageError: an augmentation beside a store that has views of its own, or of samples that are no images.
        MissingKeyError: see `missing`.
        MismatchError: the source's classes are not those of the store.
        DataError: nothing is left to train on.
    """

    def __init__(
        self,
        source: Source,
        store: Store | None = None,
        *,
        preprocessing: InputTransform | None = None,
        augment: CropFlip | None = None,
        seed: int = 0,
        missing: Missing = "error",
        cache_bytes: int = 4 << 30,
        workers: int = 0,
        combine: Combination | None = None,
        targets: bool = True,
        device: torch.device | None = None,
        also: Sequence[BatchFeature] = (),
        views: ViewChoice = _ALL_VIEWS,
    ) -> None:
        source = detect_decoding(source, None if store is None else store.manifest.recorded)
        self.source, self.store, self._combination = source, store, combine
        self._targets = targets
        self._also = check_also(also, store)
        self._label_names = [] if store is None else [column.name for column in store.run.label_columns]
        self._feature_names = [] if store is None else list_columns(store.run, self._also)
        require_samples(source)
        if store is not None:
            refuse_positions(store)
        self._transform = preprocessing or default_transform(source.inputs, first_samples(source))
        self._reported = False  # that texts are truncated
        self._augment, self._seed = augment, seed
        if augment is not None and not source.inputs.takes("crop-flip"):
            raise UsageError(
                f"augment: crops and mirror images are of images, which the samples of {source.name} are not; leave "
                "it out"
            )
        keys = read_keys(source)
        labels_N = source.labels()
        made = None if store is None else Views.of(store.run)
        if made is not None and augment is not None:
            raise UsageError(
                f"augment: the views of {'' if store is None else store.url} are what its teacher saw, and another "
                "augmentation on top of them it did not see; leave it out"
            )
        rows_VN: Int64s | None = None
        self.views = 1
        if store is None:
            stay, rows_N = Kept(samples=np.arange(len(keys))), np.full(len(keys), -1)
        else:
            check_classes(source, store.manifest.run)
            if made is None and views.count not in (None, store.run.views.count):
                raise UsageError(f"views: the rows of {store.url} are of the samples as they are, found {views.count}")
            self.views = store.run.views.count if views.count is None else views.count
            rows_VN = rows_of_views(store, keys, self.views) if made is not None else None
            rows_N = store.lookup(keys, missing="mask") if rows_VN is None else rows_VN[0]
            stay = choose_kept(source, store, keys, rows_N, missing)
        kept = stay.samples
        self.skipped_bad, self.skipped_missing = stay.skipped_bad, stay.skipped_missing
        self.samples: Int64s = kept
        self.activation = choose_activation(source, None if store is None else store.run)
        self.labels = convert_labels(labels_N[kept], source, None if store is None else store.run)
        self.rows: Int64s = rows_N[kept].astype(np.int64)
        self._keys = keys if len(kept) == len(keys) else keys.take(kept)
        self._all_have_rows = bool((self.rows >= 0).all())
        if store is not None:
            self._check_same_samples(store)
        if store is not None and targets and len(store):
            # Reads the columns into memory, which forked workers then share.
            store.take([0], [*self._label_names, *self._feature_names])
        self._replay: Replay | None = None
        if store is not None and made is not None and rows_VN is not None:
            self._replay = Replay(
                store,
                made,
                self._keys,
                np.ascontiguousarray(rows_VN[:, kept], dtype=np.int64),
                seed=seed,
                choice=views,
                decode=self._sources,
                preprocessing=preprocessing,
                name=source.name,
            )
        self._cache: SampleCache | DeviceCache | None = None
        if device is not None and made is not None:
            refuse_views(made)
        self._cache = self._new_cache(cache_bytes, workers, device)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, wanted: BatchRequest | Sequence[int]) -> Batch:
        """A whole batch. Plain positions, without the number of a view, are not augmented; or are view 0 of a store."""
        if isinstance(wanted, BatchRequest):
            positions, view = wanted.positions, wanted.view
        else:
            positions, view = np.asarray(wanted, dtype=np.int64), None
        copies: Tensor | None = None
        keys = BatchKeys(self._keys, positions)
        labels_B = self.labels[positions]
        if self._replay is not None:
            views_B = self._replay.views_of(view, keys)
            rows_B = self._replay.rows(positions, views_B)
            labels_B = self._replay.labels(labels_B, rows_B)
            with_copies = DIFFERENCE in self._also
            images, copies = self._replay.images(positions, keys, views_B, rows_B, view, with_copies=with_copies)
            inputs = Inputs.single(images)
        else:
            rows_B = self.rows[positions]
            inputs = self._transform.cut(self._inputs(positions, keys))
            if self._augment is not None and view is not None:
                inputs = Inputs.single(self._augment(inputs.only, keys, seed=self._seed, view=view))
        counted = wanted.counted if isinstance(wanted, BatchRequest) else None
        return Batch(
            inputs=inputs.plain,
            labels=torch.from_numpy(labels_B),
            keys=keys,
            samples=torch.from_numpy(self.samples[positions]),
            rows=torch.from_numpy(rows_B),
            **({} if self.store is None or not self._targets else self._take(self.store, rows_B, keys, view)),
            has_target=None if self.store is None or self._all_have_rows else torch.from_numpy(rows_B >= 0),
            copies=copies,
            weight=None if counted is None else (torch.arange(len(keys)) < counted).float(),
        )

    def runs_user_code(self, wanted: BatchRequest) -> bool:
        """Whether a batch needs samples of a dataset of the user's that are not cached."""
        if not self.source.is_users:
            return False
        return self._replay is not None or self._cache is None or bool(len(self._cache.unknown(wanted.positions)))

    def choose_members(self, keys: Sequence[str], epoch: int | None) -> Int64s | None:
        """Which member of the store each sample has in an epoch, where each has one."""
        if self.store is None:
            return None
        return choose_members(self._combination, self.store.run, keys, seed=self._seed, epoch=epoch or 0)

    def rows_of_epoch(self, epoch: int, positions: Int64s) -> Int64s:
        """The rows of the store that these samples are joined to in an epoch, -1 for none."""
        if self._replay is None:
            return self.rows[positions]
        return self._replay.rows(positions, self._replay.views_of(epoch, self.keys(positions)))

    def keys(self, positions: Int64s) -> list[str]:
        return self._keys.take(positions).to_list()

    def _check_same_samples(self, store: Store) -> None:
        """Compare a few samples now, before anything is trained; each is compared when it is read.

        Where no content hash can tell them apart, the hard labels must: keys such as "17" fit any dataset.
        """
        joined = np.flatnonzero(self.rows >= 0)
        if not len(joined):
            return
        picked = joined[np.unique(np.linspace(0, len(joined) - 1, _COMPARED).astype(np.int64))]
        raws = [sample.raw for sample in self.source.read(self.samples[picked].tolist())]
        hashes = hashes_of(raws, self.source.inputs.content_hash)
        self._check_content(picked, BatchKeys(self._keys, picked), hashes)
        stored = store.content[self.rows[picked]]
        without = int((store.content[self.rows[joined]] == 0).sum())
        if without:
            why = "their rows have no content hash: they were labelled before samples of this kind got one"
        elif (
            other := why_not_comparable(hashes, stored, kinds=(self.source.inputs.name, store.run.input))
        ) is not None:
            why, without = other, len(joined)
        else:
            self._report_other_labels(store, joined)
            return
        log.warning(
            "warning: %s: %d of %d samples cannot be compared with those that were labelled in %s (%s); the join rests "
            "on keys and hard labels alone",
            self.source.name,
            without,
            len(joined),
            store.url,
            why,
        )
        ours, theirs = self.labels[joined], read_hard_labels(store, self.rows[joined])
        others = joined[find_contradictions(ours, theirs)]
        if len(others):
            raise MismatchError(
                f"{self.source.name}: {len(others)} of {len(joined)} samples have another hard label than in "
                f"{store.url}, the first {self.keys(others[:1])[0]!r}: equal keys, other samples; train on the data "
                "that was labelled"
            )

    def _report_other_labels(self, store: Store, joined: NDArray[np.int64]) -> None:
        """Report hard labels that changed since; those of the data count, which a user may have corrected."""
        others = joined[find_contradictions(self.labels[joined], read_hard_labels(store, self.rows[joined]))]
        if len(others):
            log.warning(
                "warning: %s: %d of %d samples have another hard label than in %s, the first %r; the data's are used",
                self.source.name,
                len(others),
                len(joined),
                store.url,
                self.keys(others[:1])[0],
            )

    def _new_cache(self, budget: int, workers: int, device: torch.device | None) -> SampleCache | DeviceCache | None:
        if budget <= 0 and device is None:
            return None
        first = np.zeros(1, dtype=np.int64)
        keys = self.keys(first)
        read = self._read(first, keys) if self._replay is None else Inputs.single(self._decoded(first, keys)[0][None])
        if device is not None:
            return open_device_cache(len(self), read.form, device, budget=budget)
        fits = SampleCache.fits(len(self), read.form, budget=budget, workers=workers)
        return SampleCache(len(self), read.form) if fits else None

    def _inputs(self, positions: Int64s, keys: Sequence[str]) -> Inputs:
        if self._cache is None:
            return self._read(positions, keys)
        unknown = self._cache.unknown(positions)
        if len(unknown):
            self._cache.put(positions[unknown], self._read(positions[unknown], [keys[place] for place in unknown]))
        return self._cache.get(positions)

    def _sources(self, positions: Int64s, keys: Sequence[str]) -> Images:
        """Images as they are in the source, of any sizes; those of the cache's form come from there."""
        cache = self._cache
        if cache is None:
            return stacked(self._decoded(positions, keys))
        unknown = cache.unknown(positions)
        images = self._decoded(positions[unknown], [keys[place] for place in unknown]) if len(unknown) else []
        fit = [number for number, image in enumerate(images) if form_of(image) == cache.form]
        if fit:
            cache.put(positions[unknown[fit]], Inputs.single(torch.stack([images[number] for number in fit])))
        if len(fit) == len(unknown):
            return cache.get(positions).only
        if isinstance(cache, DeviceCache):
            raise UsageError(
                f"cache: {self.source.name}: expected images of one size for a device, found several; leave --cache out"
            )
        others = dict(zip(unknown.tolist(), images, strict=True))
        return stacked(
            [
                others[place] if place in others else cache.get(positions[place : place + 1]).only[0]
                for place in range(len(positions))
            ]
        )

    def _read(self, positions: Int64s, keys: Sequence[str]) -> Inputs:
        """Decoded samples, none of them cached, as the student takes them."""
        batches, failed = collate_samples(
            self._decoded(positions, keys),
            keys,
            [self._transform],
            network="student",
            form=None if self._cache is None else self._cache.form,
        )
        refuse_failed(failed, keys, name=self.source.name)
        if (truncated := batches[0].truncated) and not self._reported:
            self._reported = True
            log.warning(
                "warning: %s: %d of %d texts of a batch are longer than the student takes and are read to its length "
                "alone; '?max_length=N' in its SPEC takes more",
                self.source.name,
                truncated,
                len(keys),
            )
        return batches[0]

    def _decoded(self, positions: Int64s, keys: Sequence[str]) -> list[Tensor]:
        """Read, check and decode samples, none of them cached; of images uint8 (3, H, W) each."""
        samples = self.source.read(self.samples[positions].tolist())
        for sample, key, position in zip(samples, keys, positions, strict=True):
            if sample.key != key:
                raise DataError(
                    f"{self.source.name}: sample {self.samples[position]} was {key!r} and is now {sample.key!r}; the "
                    "data changed while it was in use, start again"
                )
        decoded = decode_samples(samples, self.source.inputs, name=self.source.name)
        # Another sample first: that it is damaged too matters less.
        self._check_content(positions, keys, decoded.content)
        refuse_failed(decoded.failed, keys, name=self.source.name)
        return list(decoded.items.values())

    def _check_content(self, positions: Int64s, keys: Sequence[str], hashes: NDArray[np.uint64]) -> None:
        rows = self.rows[positions]
        known = np.flatnonzero(rows >= 0)
        if self.store is None or not len(known):
            return
        stored = self.store.content[rows[known]]
        changed = known[changed_content(hashes[known], stored)]
        if len(changed):
            raise MismatchError(describe_changed(self.source.name, list(keys), changed, self.store))

    def _take(self, store: Store, rows_B: Int64s, keys: Sequence[str], epoch: int | None) -> dict[str, Any]:
        """The target and features of a batch."""
        # A sample without a row gets another's target as filler, which `has_target` masks.
        rows_B = rows_B if self._all_have_rows else np.maximum(rows_B, 0)
        stored = store.take(rows_B, [*self._label_names, *self._feature_names])
        found: dict[str, Any] = dict(decode_features(store.run, self._also, stored.columns))
        if store.run.encoding.labels:
            found["target"] = make_target(
                store.run,
                stored.columns,
                extra=store.extra,
                combination=self._combination,
                members=self.choose_members(keys, epoch),
            )
        return found
