"""Make views for the teacher and replay them for the student, with the same code.

Legend: B batch, H and W pixels.

    decoded images -> box -> torchvision transforms -> mixing or noisy copies -> pixels and their xxh3-64
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.random import draw_bits
from softlabel.inputs.base import Images, form_of
from softlabel.store.manifest import Run
from softlabel.store.view_columns import (
    BOX,
    DIGEST,
    FLIP,
    PAIR_DIGESTS,
    PARTNER,
    PARTNER_BOX,
    PARTNER_FLIP,
    PASTE,
    WEIGHT,
)
from softlabel.views.boxes import Boxes
from softlabel.views.mix_ops import blend, identity, paste, share
from softlabel.views.policy import Policy
from softlabel.views.random import U64, draw
from softlabel.views.torchvision_ops import run as run_transforms

Arrays = dict[str, NDArray[Any]]

_TRANSFORMS = 1000  # index in a sample's random stream of the seed for torchvision's transforms


class ReadPartners(Protocol):
    """Reads positions of the dataset as keys and decoded images, None for an image that cannot be decoded."""

    def __call__(self, positions: Sequence[int], /) -> tuple[list[str], list[Tensor | None]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Views of a batch.

    Attributes:
        images: uint8, one tensor if all have one size; without the failed ones.
        columns: `Run.view_columns` of each view, also without the failed ones.
        failed: place in the batch -> reason why the view could not be made.
        pairs: noisy copies of the views (`NoisePairStep.make`), none unless the policy has some.
    """

    images: Images
    columns: Arrays
    failed: dict[int, str]
    pairs: tuple[Images, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """The views of a run.

    Attributes:
        policy: the steps.
        seed: the run's view seed.
        pool: partners are drawn from the first `pool` samples: the store's first extent, so that growth keeps views.
    """

    policy: Policy
    seed: int
    pool: int

    @classmethod
    def of(cls, run: Run) -> "Views | None":
        """Return the views of a run; None if they are the unchanged images.

        Raises:
            UsageError: the policy has an unknown step.
        """
        policy = Policy.of(run.views.policy)
        return None if policy is None else cls(policy=policy, seed=run.views.seed, pool=run.extents[0].rows)

    def plain(self) -> "Views":
        """Return the same views without mixing, and without noisy copies beside them."""
        return replace(self, policy=replace(self.policy, mix=None, pair=None))

    @staticmethod
    def mixes(run: Run) -> bool:
        """Whether views mix two images."""
        return any(column.name == PARTNER for column in run.view_columns)

    def make(self, images: Images, keys: Sequence[str], *, view: int, read: ReadPartners) -> Made:
        """Draw and make a view of each image.

        Args:
            images: B decoded images, uint8; one tensor if all have one size.
            keys: B keys.
            view: the view's number.
            read: reads candidates for mixing.
        """
        words_B = draw(keys, seed=self.seed, view=view)
        boxes = self._draw_boxes(images, words_B)
        seen, failed = self._apply_steps(images, boxes, words_B)
        kept = [place for place in range(len(keys)) if place not in failed]
        columns: Arrays = {}
        if failed:
            seen = stacked([seen[place] for place in kept])
            words_B = words_B[kept]
            boxes = None if boxes is None else Boxes(boxes=boxes.boxes[kept], flips=boxes.flips[kept])
        if boxes is not None:
            columns |= {BOX: boxes.boxes, FLIP: boxes.flips[:, None]}
        if self.policy.mix is not None and kept:
            named = [keys[place] for place in kept]
            seen, mixed = self._mix(seen, named, boxes, words_B, view=view, read=read)
            columns |= mixed
        columns[DIGEST] = digests(seen)[:, None]
        pairs: tuple[Images, ...] = ()
        if self.policy.pair is not None:
            pairs = tuple(self.policy.pair.make(seen, words_B))
            columns[PAIR_DIGESTS] = np.stack([digests(copies) for copies in pairs], axis=1)
        return Made(images=seen, columns=columns, failed=failed, pairs=pairs)

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
        """Make the views that a store describes, from the images that were labelled.

        Args:
            images: B decoded images, uint8; one tensor if all have one size.
            keys: B keys.
            columns: the view columns of the images' rows in `view`.
            view: the view's number.
            partners, partner_keys: of each image, if the policy mixes.

        Raises:
            ValueError: the stored view does not fit an image, so it is not the one that was labelled; names its key.
        """
        words_B = draw(keys, seed=self.seed, view=view)
        seen = self._remake(images, keys, words_B, columns, BOX, FLIP)
        mix = self.policy.mix
        if mix is None:
            return seen
        assert partners is not None
        partner_words_B = draw(partner_keys, seed=self.seed, view=view)
        others = self._remake(partners, partner_keys, partner_words_B, columns, PARTNER_BOX, PARTNER_FLIP)
        if mix.kind == "mixup":
            weights_B = columns[WEIGHT][:, 0].tolist()
            return stacked([blend(*trio) for trio in zip(seen, others, weights_B, strict=True)])
        return stacked([paste(*trio) for trio in zip(seen, others, columns[PASTE].tolist(), strict=True)])

    def replay_pairs(self, seen: Images, keys: Sequence[str], *, view: int) -> list[Images]:
        """Make the noisy copies of replayed views, as `NoisePairStep.make` gives them."""
        assert self.policy.pair is not None
        return self.policy.pair.make(seen, draw(keys, seed=self.seed, view=view))

    def _draw_boxes(self, images: Images, words_B: U64) -> Boxes | None:
        return None if self.policy.crop is None else self.policy.crop.draw(_image_sizes(images), words_B)

    def _apply_steps(self, images: Images, boxes: Boxes | None, words_B: U64) -> tuple[Images, dict[int, str]]:
        """Return the views before mixing and, by place, why some failed; those hold the unchanged image."""
        if self.policy.crop is not None:
            assert boxes is not None
            images = self.policy.crop.cut(images, boxes)
        if not self.policy.transforms:
            return images, {}
        seeds_B = (draw_bits(words_B, _TRANSFORMS, 1)[:, 0] >> np.uint64(1)).tolist()
        failed: dict[int, str] = {}
        seen: list[Tensor] = []
        for place, (image_CHW, seed) in enumerate(zip(images, seeds_B, strict=True)):
            try:
                seen.append(run_transforms(self.policy.transforms, image_CHW, seed))
            except ValueError as error:
                failed[place] = str(error)
                seen.append(image_CHW)
        return stacked(seen), failed

    def _remake(
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
            fits_B = self.policy.crop.fits(_image_sizes(images), boxes)
            if not fits_B.all():
                place = int(fits_B.argmin())
                height, width = images[place].shape[-2:]
                raise ValueError(
                    f"image {keys[place]!r}: {width} x {height} pixels do not contain the box "
                    f"{boxes.boxes[place].tolist()} that the store has for its view"
                )
        seen, failed = self._apply_steps(images, boxes, words_B)
        if failed:
            place, reason = next(iter(failed.items()))
            raise ValueError(f"image {keys[place]!r}: {reason}")
        return seen

    def _mix(
        self, seen: Images, keys: Sequence[str], boxes: Boxes | None, words_B: U64, *, view: int, read: ReadPartners
    ) -> tuple[Images, Arrays]:
        mix = self.policy.mix
        assert mix is not None
        count = len(keys)
        # A sample is mixed with itself if none of its candidates can be decoded.
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
                drawn = self._draw_boxes(decoded, partner_words_B)
                made, failed = self._apply_steps(decoded, drawn, partner_words_B)
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
            pastes_B4 = mix.pastes(_image_sizes(seen), weights_B, words_B)
            mixed = [paste(*trio) for trio in zip(seen, others, pastes_B4.tolist(), strict=True)]
            sizes = [(image.shape[-2], image.shape[-1]) for image in seen]
            weights_B = np.array([share(*pair) for pair in zip(pastes_B4.tolist(), sizes, strict=True)], np.float32)
            columns[PASTE] = pastes_B4
        return stacked(mixed), {**columns, WEIGHT: weights_B[:, None]}


def stacked(images: Sequence[Tensor]) -> Images:
    """Return one tensor if all images have one size and type, for fast batch operations; else the images."""
    if isinstance(images, Tensor) or not images or any(form_of(image) != form_of(images[0]) for image in images):
        return images
    return torch.stack(list(images))


def digests(images: Images) -> U64:
    """Return the xxh3-64 of each view's pixels as bytes (H, W, C): uint64 (B,)."""
    if isinstance(images, Tensor):
        pixels: Iterable[NDArray[Any]] = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
    else:
        pixels = (np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy()) for image_CHW in images)
    return np.fromiter((xxhash.xxh3_64_intdigest(one.data) for one in pixels), np.uint64, len(images))


def _image_sizes(images: Images) -> NDArray[np.int64]:
    """Return height and width of each image, int64 (B, 2)."""
    if isinstance(images, Tensor):
        return np.tile(np.array(images.shape[-2:], np.int64), (len(images), 1))
    return np.array([image.shape[-2:] for image in images], np.int64).reshape(-1, 2)
