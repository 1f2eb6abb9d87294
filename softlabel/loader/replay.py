"""The views that a teacher saw, made again for a student from the images, by the same code.

Legend: B batch, H and W pixels, K samples that are kept, V views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import UNKNOWN, Labels
from softlabel.common.random import draw_bits, mix64, stream_key
from softlabel.errors import MismatchError, UsageError
from softlabel.inputs.base import IGNORE, Images, InputTransform
from softlabel.inputs.batch import collate_samples, refuse_failed
from softlabel.inputs.image_transform import Preprocessing
from softlabel.store.reader import Store
from softlabel.store.view_columns import DIGEST, PAIR_DIGESTS, PARTNER
from softlabel.views import Views, changed, digests, draw, identity, stacked

ViewOrder = Literal["cycle", "random"]
Int64s = NDArray[np.int64]
# Positions among the kept samples and their keys -> decoded images.
Decode = Callable[[Int64s, list[str]], Images]

_ORDER = 3000  # the number of a sample's stream that chooses its view


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewChoice:
    """Which views of a store a student sees.

    Attributes:
        order: ``cycle``: epoch e uses view e mod V of every sample; ``random``: every sample one that follows from
            (seed, key, e).
        check: the pixels of one in so many rows are compared with the digest that the store has; 1: of all, 0: of none.
        count: how many of the views are used, from the first one on; None: all.
    """

    order: ViewOrder = "cycle"
    check: int = 256
    count: int | None = None

    def __post_init__(self) -> None:
        if self.order not in get_args(ViewOrder):
            raise UsageError(f"view_order: expected cycle or random, found {self.order!r}")
        if self.check < 0:
            raise UsageError(f"check_views: expected 0 (no row) or one in how many, found {self.check}")


class Replay:
    """The views of the samples of a store.

    Args:
        rows_VK: row of each kept sample in each view, -1 where a sample has none.
        seed: of the order `random`.
        decode: gives the images as they are in the source.
        preprocessing: whose geometry brings views to one size; None: they are of one size.
        name: of the source, for messages.
    """

    def __init__(
        self,
        store: Store,
        views: Views,
        keys: Keys,
        rows_VK: Int64s,
        *,
        seed: int,
        choice: ViewChoice,
        decode: Decode,
        preprocessing: InputTransform | None,
        name: str,
    ) -> None:
        self._store, self._views, self._rows_VK = store, views, rows_VK
        self._seed, self._order, self._check = seed, choice.order, choice.check
        self._decode, self._preprocessing, self._name = decode, preprocessing, name
        self._names = [column.name for column in store.run.view_columns]
        if len(store):
            store.take([0], self._names)  # reads them into memory, which forked workers then share
        self._partners = _Partners(keys) if views.policy.mix is not None else None
        self._keys = keys
        self._checked = False

    def views_of(self, epoch: int | None, keys: Sequence[str]) -> Int64s:
        """Which view each sample has in an epoch, int64 (B,); view 0 without an epoch."""
        count = len(self._rows_VK)
        if epoch is None or self._order == "cycle":
            return np.full(len(keys), (epoch or 0) % count, np.int64)
        words_B = draw_bits(draw(keys, seed=self._seed, view=epoch), _ORDER, 1)[:, 0]
        return (words_B % np.uint64(count)).astype(np.int64)

    def rows(self, positions: Int64s, views_B: Int64s) -> Int64s:
        return self._rows_VK[views_B, positions]

    def labels(self, labels_B: Labels, rows_B: Int64s) -> Labels:
        """Hard labels as they hold for views: an image that is mixed out of two has none."""
        if self._partners is None:
            return labels_B
        if labels_B.ndim == 1:
            return np.where(rows_B >= 0, IGNORE, labels_B)
        return np.where((rows_B >= 0)[:, None], np.int8(UNKNOWN), labels_B)

    def images(
        self,
        positions: Int64s,
        keys: Sequence[str],
        views_B: Int64s,
        rows_B: Int64s,
        epoch: int | None,
        *,
        with_copies: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The views, brought to the student's size, and their noisy copies if asked for: uint8 (B, 3, H, W) and
        (B, J, 3, H, W). A sample without a row has its view in place of copies.

        Raises:
            MismatchError: a view is not what the teacher saw.
            DataError: an image cannot be decoded or has no view.
        """
        sides = 1 + (2 * self._store.run.views.directions if with_copies else 0)
        seen: list[list[Tensor | None]] = [[None] * len(keys) for _ in range(sides)]
        for view in np.unique(views_B).tolist():
            for known in (True, False):
                places = np.flatnonzero((views_B == view) & ((rows_B >= 0) == known))
                if not len(places):
                    continue
                named = [keys[place] for place in places.tolist()]
                images = self._decode(positions[places], named)
                if known:
                    made = self._replay(images, named, rows_B[places], view, epoch, with_copies=with_copies)
                else:
                    made = [self._make_unlabelled(images, named, view)] * sides
                if len(places) == len(keys):
                    return self._shape_sides(made, keys)
                for side, pixels in zip(seen, made, strict=True):
                    for place, image in zip(places.tolist(), pixels, strict=True):
                        side[place] = image
        return self._shape_sides([stacked([one for one in side if one is not None]) for side in seen], keys)

    def _shape_sides(self, sides: Sequence[Images], keys: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        views, *copies = [self._shape(side, keys) for side in sides]
        return views, torch.stack(copies, dim=1) if copies else None

    def _replay(
        self,
        images: Images,
        keys: Sequence[str],
        rows_B: Int64s,
        view: int,
        epoch: int | None,
        *,
        with_copies: bool,
    ) -> list[Images]:
        """The views of rows, then their noisy copies if asked for."""
        columns = self._store.take(rows_B, self._names).columns
        partners: Images | None = None
        partner_keys: Sequence[str] = []
        if self._partners is not None:
            positions = self._partners.positions(columns[PARTNER], keys, self._store)
            partner_keys = self._keys.take(positions).to_list()
            partners = self._decode(positions, partner_keys)
        try:
            made = self._views.replay(images, keys, columns, view=view, partners=partners, partner_keys=partner_keys)
        except ValueError as error:
            raise MismatchError(
                f"{self._store.url}: view {view} cannot be made again: {error}; {self._describe_remedy()}"
            ) from None
        sides = [made, *(self._views.replay_pairs(made, keys, view=view) if with_copies else ())]
        stored_BJ = columns[DIGEST]
        if with_copies:
            stored_BJ = np.concatenate([stored_BJ, columns[PAIR_DIGESTS]], axis=1)
        for side, stored_B in zip(sides, stored_BJ.T, strict=True):
            self._compare(side, keys, stored_B, rows_B, view, epoch)
        self._checked = True
        return sides

    def _compare(
        self,
        made: Images,
        keys: Sequence[str],
        stored_B: NDArray[np.uint64],
        rows_B: Int64s,
        view: int,
        epoch: int | None,
    ) -> None:
        if not self._check:
            return
        # Other rows in every epoch, and the first one of every process: a wrong library is wrong at once.
        numbers_B = mix64(rows_B.astype(np.uint64) ^ stream_key(0 if epoch is None else epoch))
        picked = np.flatnonzero(numbers_B % np.uint64(self._check) == 0)
        if not self._checked:
            picked = np.union1d(picked, [0])
        if not len(picked):
            return
        found = digests(stacked([made[place] for place in picked.tolist()]))
        wrong = np.flatnonzero(found != stored_B[picked])
        if len(wrong):
            place = int(picked[wrong[0]])
            raise MismatchError(
                f"{self._store.url}: view {view} of {keys[place]!r} has other pixels than the teacher saw "
                f"({len(wrong)} of {len(picked)} compared; xxh3-64 expected {stored_B[place]:016x}, "
                f"found {found[wrong[0]]:016x}); {self._describe_remedy()}"
            )

    def _describe_remedy(self) -> str:
        return (
            f"{changed(self._store.manifest.recorded.get('libraries'))}; train with the libraries that labelled, label "
            "again, or accept other pixels with --check-views 0"
        )

    def _make_unlabelled(self, images: Images, keys: Sequence[str], view: int) -> Images:
        """Views of samples that the store has no row for: of the same kind, and never mixed, for their hard labels."""
        made = self._views.plain().make(images, keys, view=view, read=_refuse_partners)
        refuse_failed(made.failed, keys, name=self._name)
        return made.images

    def _shape(self, made: Images, keys: Sequence[str]) -> Tensor:
        channels, fixed = made[0].shape[0], self._views.policy.fixed
        geometry = self._preprocessing or Preprocessing(mean=(0.0,) * channels, std=(1.0,) * channels)
        batches, failed = collate_samples(made, keys, [geometry], network="student", fixed=fixed)
        refuse_failed(failed, keys, name=self._name)
        return batches[0].only


class _Partners:
    """From what rows say of their partners to positions among the samples."""

    def __init__(self, keys: Keys) -> None:
        named = np.array([identity(key) for key in keys.to_list()], np.uint64).reshape(-1, 2)
        self._order = np.lexsort((named[:, 1], named[:, 0]))
        self._low, self._high = named[self._order, 0], named[self._order, 1]

    def positions(self, partners_B2: NDArray[np.uint64], keys: Sequence[str], store: Store) -> Int64s:
        places = np.minimum(np.searchsorted(self._low, partners_B2[:, 0]), len(self._low) - 1)
        right = (self._low[places] == partners_B2[:, 0]) & (self._high[places] == partners_B2[:, 1])
        if not right.all():
            raise MismatchError(
                f"{store.url}: image {keys[int(right.argmin())]!r} was mixed with one that is not among these samples; "
                "train on all of the data that was labelled"
            )
        found: Int64s = self._order[places]
        return found


def _refuse_partners(positions: object, /) -> tuple[list[str], list[Tensor | None]]:
    raise AssertionError("an unmixed view has no partner")


def rows_of_views(store: Store, keys: Keys, views: int) -> Int64s:
    """Row of each key in each of the first so many views, int64 (V, N); -1 in all of them where it is missing in one.

    Raises:
        UsageError: the store has fewer views, or none is asked for.
    """
    if not 1 <= views <= store.run.views.count:
        raise UsageError(f"views: expected 1 to {store.run.views.count}, as {store.url} has, found {views}")
    rows_VN = np.stack([store.lookup(keys, view, missing="mask") for view in range(views)])
    rows_VN[:, (rows_VN < 0).any(axis=0)] = -1
    return rows_VN
