"""Making views: drawn for the teacher, replayed for the student, by the same code.

Legend: B batch, H and W pixels.

    decoded images -> box -> torchvision transforms -> mixing -> uint8 pixels and their xxh3-64

All of it happens on uint8 RGB before any member's geometry or normalisation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from softlabel.inputs.base import Images
from softlabel.store.manifest import Run
from softlabel.store.view_columns import (
    BOX,
    DIGEST,
    FLIP,
    PARTNER,
    PARTNER_BOX,
    PARTNER_FLIP,
    PASTE,
    WEIGHT,
)
from softlabel.views.boxes import Boxes
from softlabel.views.mix_ops import blend, identity, paste, share
from softlabel.views.policy import Policy
from softlabel.views.random import U64, bits, draw
from softlabel.views.torchvision_ops import run as run_transforms

Arrays = dict[str, NDArray[Any]]

_TRANSFORMS = 1000  # the number of a sample's stream that seeds what torchvision draws


class ReadPartners(Protocol):
    """Positions in the store's dataset -> keys and decoded images, None where an image cannot be decoded."""

    def __call__(self, positions: Sequence[int], /) -> tuple[list[str], list[Tensor | None]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Views of a batch.

    Attributes:
        images: uint8, one tensor where all have one size.
        columns: what the store keeps of each view, as `Run.view_columns` names it.
        failed: place in the batch -> reason, for images of which there is no view; they are not among the others.
    """

    images: Images
    columns: Arrays
    failed: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """The views of a run.

    Attributes:
        pool: partners are drawn among the first `pool` samples of the store's dataset: those of its first extent, so
            that a dataset that grows keeps its views.
    """

    policy: Policy
    seed: int
    pool: int

    @classmethod
    def of(cls, run: Run) -> "Views | None":
        """None where views are the images as they are. Raises UsageError for a policy that names unknown things."""
        policy = Policy.of(run.views.policy)
        return None if policy is None else cls(policy=policy, seed=run.views.seed, pool=run.extents[0].rows)

    def unmixed(self) -> "Views":
        """The same without the step that takes in another sample."""
        return replace(self, policy=replace(self.policy, mix=None))

    @staticmethod
    def mixes(run: Run) -> bool:
        """Whether a view is mixed out of two images."""
        return any(column.name == PARTNER for column in run.view_columns)

    def make(self, images: Images, keys: Sequence[str], *, view: int, read: ReadPartners) -> Made:
        """Draw and make a view of each image.

        Args:
            images: decoded, uint8; one tensor where all have one size.
        """
        words_B = draw(keys, seed=self.seed, view=view)
        boxes = self._boxes(images, words_B)
        seen, failed = self._unmixed(images, boxes, words_B)
        kept = [place for place in range(len(keys)) if place not in failed]
        columns: Arrays = {}
        if failed:
            seen = stacked([seen[place] for place in kept])
            words_B, boxes = words_B[kept], None if boxes is None else _picked(boxes, kept)
        if boxes is not None:
            columns |= {BOX: boxes.boxes, FLIP: boxes.flips[:, None]}
        if self.policy.mix is not None and kept:
            named = [keys[place] for place in kept]
            seen, mixed = self._mix(seen, named, boxes, words_B, view=view, read=read)
            columns |= mixed
        return Made(images=seen, columns={**columns, DIGEST: digests(seen)[:, None]}, failed=failed)

    def replay(
        self,
        images: Images,
        keys: Sequence[str],
        columns: Mapping[str, NDArray[Any]],
        *,
        view: int,
        partners: Images | None = None,
        partner_keys: Sequence[str] = (),
    ) -> Images:
        """Make the views that a store describes, from the images that it was made from.

        Args:
            columns: the view columns of the images' rows in `view`.
            partners, partner_keys: of each image, where the policy mixes.

        Raises:
            ValueError: a view cannot be made so: the image is not the one that was labelled. It begins with its key.
        """
        words_B = draw(keys, seed=self.seed, view=view)
        seen = self._again(images, keys, words_B, columns, BOX, FLIP)
        mix = self.policy.mix
        if mix is None:
            return seen
        assert partners is not None
        partner_words_B = draw(partner_keys, seed=self.seed, view=view)
        others = self._again(partners, partner_keys, partner_words_B, columns, PARTNER_BOX, PARTNER_FLIP)
        if mix.kind == "mixup":
            weights_B = columns[WEIGHT][:, 0].tolist()
            return stacked([blend(*trio) for trio in zip(seen, others, weights_B, strict=True)])
        return stacked([paste(*trio) for trio in zip(seen, others, columns[PASTE].tolist(), strict=True)])

    def _boxes(self, images: Images, words_B: U64) -> Boxes | None:
        return None if self.policy.crop is None else self.policy.crop.draw(_sizes(images), words_B)

    def _unmixed(self, images: Images, boxes: Boxes | None, words_B: U64) -> tuple[Images, dict[int, str]]:
        """Views before mixing; those that failed hold the image instead, and are named."""
        if self.policy.crop is not None:
            assert boxes is not None
            images = self.policy.crop.cut(images, boxes)
        if not self.policy.transforms:
            return images, {}
        seeds_B = (bits(words_B, _TRANSFORMS, 1)[:, 0] >> np.uint64(1)).tolist()
        failed: dict[int, str] = {}
        seen: list[Tensor] = []
        for place, (image_CHW, seed) in enumerate(zip(images, seeds_B, strict=True)):
            try:
                seen.append(run_transforms(self.policy.transforms, image_CHW, seed))
            except ValueError as error:
                failed[place] = str(error)
                seen.append(image_CHW)
        return stacked(seen), failed

    def _again(
        self,
        images: Images,
        keys: Sequence[str],
        words_B: U64,
        columns: Mapping[str, NDArray[Any]],
        box: str,
        flip: str,
    ) -> Images:
        boxes = None
        if self.policy.crop is not None:
            boxes = Boxes(boxes=columns[box], flips=columns[flip][:, 0])
            fits_B = self.policy.crop.fits(_sizes(images), boxes)
            if not fits_B.all():
                place = int(fits_B.argmin())
                height, width = images[place].shape[-2:]
                raise ValueError(
                    f"image {keys[place]!r}: is {width} x {height} pixels, and the box {boxes.boxes[place].tolist()} "
                    "that the store has for its view cannot lie in it"
                )
        seen, failed = self._unmixed(images, boxes, words_B)
        if failed:
            place, reason = next(iter(failed.items()))
            raise ValueError(f"image {keys[place]!r}: {reason}")
        return seen

    def _mix(
        self,
        seen: Images,
        keys: Sequence[str],
        boxes: Boxes | None,
        words_B: U64,
        *,
        view: int,
        read: ReadPartners,
    ) -> tuple[Images, Arrays]:
        mix = self.policy.mix
        assert mix is not None
        count = len(keys)
        # Whoever finds no partner that can be decoded is mixed with itself.
        names, others = list(keys), list(seen)
        partner_boxes = None if boxes is None else Boxes(boxes=boxes.boxes.copy(), flips=boxes.flips.copy())
        waiting = list(range(count))
        for candidates_B in mix.candidates(words_B, self.pool).T:
            found_keys, found = read(candidates_B[waiting].tolist())
            there = [place for place, image in enumerate(found) if image is not None]
            decoded = stacked([image for image in found if image is not None])
            if there:
                asked = [found_keys[place] for place in there]
                partner_words_B = draw(asked, seed=self.seed, view=view)
                drawn = self._boxes(decoded, partner_words_B)
                made, failed = self._unmixed(decoded, drawn, partner_words_B)
                good = [place for place in range(len(there)) if place not in failed]
                for place in good:
                    row = waiting[there[place]]
                    names[row], others[row] = asked[place], made[place]
                    if partner_boxes is not None and drawn is not None:
                        partner_boxes.boxes[row] = drawn.boxes[place]
                        partner_boxes.flips[row] = drawn.flips[place]
                done = {waiting[there[place]] for place in good}
                waiting = [row for row in waiting if row not in done]
            if not waiting:
                break
        columns: Arrays = {PARTNER: np.array([identity(name) for name in names], np.uint64)}
        if partner_boxes is not None:
            columns |= {PARTNER_BOX: partner_boxes.boxes, PARTNER_FLIP: partner_boxes.flips[:, None]}
        weights_B = mix.weights(words_B)
        if mix.kind == "mixup":
            mixed = [blend(*trio) for trio in zip(seen, others, weights_B.tolist(), strict=True)]
        else:
            pastes_B4 = mix.pastes(_sizes(seen), weights_B, words_B)
            mixed = [paste(*trio) for trio in zip(seen, others, pastes_B4.tolist(), strict=True)]
            sizes = [(image.shape[-2], image.shape[-1]) for image in seen]
            weights_B = np.array([share(*pair) for pair in zip(pastes_B4.tolist(), sizes, strict=True)], np.float32)
            columns[PASTE] = pastes_B4
        return stacked(mixed), {**columns, WEIGHT: weights_B[:, None]}


def stacked(images: Sequence[Tensor]) -> Images:
    """One tensor where all images have one size, which is what whole-batch steps are fast on."""
    if isinstance(images, Tensor) or not images or any(image.shape != images[0].shape for image in images):
        return images
    return torch.stack(list(images))


def digests(images: Images) -> U64:
    """xxh3-64 of the pixels of each view, as bytes (H, W, 3): uint64 (B,)."""
    if isinstance(images, Tensor):
        pixels: Iterable[NDArray[np.uint8]] = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    else:
        pixels = (np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()) for image_CHW in images)
    return np.fromiter((xxhash.xxh3_64_intdigest(one.data) for one in pixels), np.uint64, len(images))


def _sizes(images: Images) -> NDArray[np.int64]:
    """Height and width of each, int64 (B, 2)."""
    if isinstance(images, Tensor):
        return np.tile(np.array(images.shape[-2:], np.int64), (len(images), 1))
    return np.array([image.shape[-2:] for image in images], np.int64).reshape(-1, 2)


def _picked(boxes: Boxes, places: Sequence[int]) -> Boxes:
    return Boxes(boxes=boxes.boxes[places], flips=boxes.flips[places])
