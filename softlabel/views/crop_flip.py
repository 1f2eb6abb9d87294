"""Pad, crop back, mirror: on whole batches of uint8 pixels, because small images are many.

Legend: B batch, C colours (3), H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softlabel.views.random import U64, draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Where each sample's view lies in its padded image. Compared and stored by value.

    Attributes:
        top, left: int64 (B,), pixels from the corner of the padded image.
        flip: bool (B,), whether the crop is mirrored left to right.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CropFlip:
    """Pad with black, crop back to the image's size somewhere, mirror half of the time: the usual CIFAR augmentation.

    Attributes:
        padding: pixels on each side; 0 leaves only the mirroring.
        flip: whether to mirror; not for digits and letters.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding: expected at least 0 pixels, found {self.padding}")

    def crops(self, keys: Sequence[str], *, seed: int, view: int) -> Crops:
        """The parameters of one view of these samples."""
        return self.crops_of(draw(keys, seed=seed, view=view))

    def crops_of(self, words_B: U64) -> Crops:
        """The parameters that 64 random bits of each sample give."""
        places = np.uint64(2 * self.padding + 1)
        # Disjoint bits for each parameter; 24 of them scaled to a few places are uniform to one in a million.
        top_B = ((words_B & np.uint64(0xFFFFFF)) * places) >> np.uint64(24)
        left_B = (((words_B >> np.uint64(24)) & np.uint64(0xFFFFFF)) * places) >> np.uint64(24)
        flip_B = (words_B >> np.uint64(63)).astype(bool) & self.flip
        return Crops(
            top=torch.from_numpy(top_B.astype(np.int64)),
            left=torch.from_numpy(left_B.astype(np.int64)),
            flip=torch.from_numpy(flip_B),
        )

    def apply(self, images_BCHW: Tensor, crops: Crops) -> Tensor:
        """Cut the crops out of a batch.

        Args:
            images_BCHW: uint8, in main memory.

        Returns:
            uint8 of the same shape; the input is left as it was.
        """
        height, width = images_BCHW.shape[-2:]
        side, flip_B = self.padding, crops.flip.numpy()
        # In numpy: these are small copies, over which torch would set all of its threads in motion.
        padded_BCHW = np.zeros((*images_BCHW.shape[:2], height + 2 * side, width + 2 * side), dtype=np.uint8)
        padded_BCHW[:, :, side : side + height, side : side + width] = images_BCHW.numpy()
        # The mirror image of a crop is the crop at the mirrored place of the mirror image.
        padded_BCHW[flip_B] = padded_BCHW[flip_B, :, :, ::-1]
        left_B = np.where(flip_B, 2 * side - crops.left.numpy(), crops.left.numpy())
        # All crops of all images, as a view without a copy; out of them one of each image is gathered.
        windows = np.lib.stride_tricks.sliding_window_view(padded_BCHW, (height, width), axis=(2, 3))
        return torch.from_numpy(windows[np.arange(len(flip_B)), :, crops.top.numpy(), left_B])

    def __call__(self, images_BCHW: Tensor, keys: Sequence[str], *, seed: int, view: int) -> Tensor:
        """One view of a batch: `crops` and `apply` in one go."""
        return self.apply(images_BCHW, self.crops(keys, seed=seed, view=view))
