"""Pad, crop and mirror whole batches of pixels, for small images.

Legend: B batch, C colours or bands, H and W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.views.random import U64, draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Position of each view in its padded image.

    Attributes:
        top, left: int64 (B,), pixels from the corner of the padded image.
        flip: bool (B,), whether the crop is mirrored left to right.
    """

    top: Tensor
    left: Tensor
    flip: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CropFlip:
    """Pad with black, crop to the image's size at random, mirror half of the images: the usual CIFAR augmentation.

    Attributes:
        padding: pixels on each side; 0 only mirrors.
        flip: whether to mirror; wrong for digits and letters.

    Raises:
        ValueError: the padding is negative.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding: expected at least 0 pixels, found {self.padding}")

    def crops(self, keys: Sequence[str], *, seed: int, view: int) -> Crops:
        """Draw the parameters of one view of B samples."""
        return self.crops_of(draw(keys, seed=seed, view=view))

    def crops_of(self, words_B: U64) -> Crops:
        """Return the parameters for random words uint64 (B,)."""
        places = np.uint64(2 * self.padding + 1)
        # 24 separate bits per parameter: uniform to one in a million.
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
            images_BCHW: uint8 or floats, on any device.

        Returns:
            Of the same type, shape and device, with the same pixels on each; the input is left as it was.
        """
        if images_BCHW.device.type != "cpu":
            return self.apply_there(images_BCHW, crops)
        # numpy, because torch would start all its threads for these small copies; image by image, because a gather of
        # all copies each row in parts.
        pixels_BCHW = images_BCHW.numpy()
        cut_BCHW = np.zeros(pixels_BCHW.shape, pixels_BCHW.dtype)
        rows = _overlaps(crops.top.numpy() - self.padding, pixels_BCHW.shape[2])
        columns = _overlaps(crops.left.numpy() - self.padding, pixels_BCHW.shape[3])
        for pixels, cut, (top, y), (left, x), flip in zip(
            pixels_BCHW, cut_BCHW, rows, columns, crops.flip.tolist(), strict=True
        ):
            # The mirror image of a crop is the crop in the mirror image of where it goes.
            (cut[:, :, ::-1] if flip else cut)[:, y, x] = pixels[:, top, left]
        return torch.from_numpy(cut_BCHW)

    def apply_there(self, images_BCHW: Tensor, crops: Crops) -> Tensor:
        """`apply` in operations of torch alone, for devices that numpy does not reach."""
        device, (height, width), side = images_BCHW.device, images_BCHW.shape[-2:], self.padding
        top_B, left_B, flip_B = (one.to(device, non_blocking=True) for one in (crops.top, crops.left, crops.flip))
        rows_BH = top_B[:, None] + torch.arange(height, device=device) - side
        columns_W = torch.arange(width, device=device)
        # The mirror image of a crop is the crop read from right to left.
        columns_BW = left_B[:, None] + torch.where(flip_B[:, None], width - 1 - columns_W, columns_W) - side
        inside_BHW = ((rows_BH >= 0) & (rows_BH < height))[:, :, None] & ((columns_BW >= 0) & (columns_BW < width))[
            :, None
        ]
        places_BHW = rows_BH.clamp(0, height - 1)[:, :, None] * width + columns_BW.clamp(0, width - 1)[:, None]
        flat_BCL = images_BCHW.flatten(2)
        there_BCL = places_BHW.flatten(1)[:, None].expand(-1, flat_BCL.shape[1], -1)
        cut_BCHW = flat_BCL.gather(2, there_BCL).view_as(images_BCHW)
        return cut_BCHW.masked_fill_(~inside_BHW[:, None], 0)

    def __call__(self, images_BCHW: Tensor, keys: Sequence[str], *, seed: int, view: int) -> Tensor:
        """Draw and apply one view of a batch (B, C, H, W)."""
        return self.apply(images_BCHW, self.crops(keys, seed=seed, view=view))


def _overlaps(starts_B: NDArray[np.int64], size: int) -> Iterator[tuple[slice, slice]]:
    """For ranges of `size` places that begin at these, yield what 0 to `size` has of them: there, and in the range."""
    first_B = np.maximum(starts_B, 0)
    last_B = np.maximum(np.minimum(starts_B + size, size), first_B)
    for start, first, last in zip(starts_B.tolist(), first_B.tolist(), last_B.tolist(), strict=True):
        yield slice(first, last), slice(first - start, last - start)
