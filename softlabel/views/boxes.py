"""Steps that crop: boxes are drawn, or read from a store, then cut out.

Legend: B batch, H and W pixels, S side of a view.

A box is (top, left, height, width) in pixels of the upright source image, int32; pixels beyond the edge are black. The
order is cut, resize if the step has a size, mirror.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.inputs.base import Images
from softlabel.views.crop_flip import CropFlip, Crops
from softlabel.views.random import U64, uniforms

_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Where the views of B images lie: boxes int32 (B, 4), flips uint8 (B,) 0 or 1."""

    boxes: NDArray[np.int32]
    flips: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class CropFlipStep(CropFlip):
    """`CropFlip` as a step of a policy.

    Raises:
        UsageError: the padding is out of range.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.padding < 1 << 16:
            raise UsageError(f"crop-flip: expected a padding of 0 pixels or more, found {self.padding}")

    @property
    def fixed(self) -> bool:
        return False

    def draw(self, sizes_B2: NDArray[np.int64], words_B: U64) -> Boxes:
        """Draw boxes from sizes (height, width) int64 (B, 2) and random words uint64 (B,)."""
        crops = self.crops_of(words_B)
        corner_B2 = np.stack([crops.top.numpy(), crops.left.numpy()], axis=1) - self.padding
        boxes_B4 = np.concatenate([corner_B2, sizes_B2], axis=1).astype(np.int32)
        return Boxes(boxes=boxes_B4, flips=crops.flip.numpy().astype(np.uint8))

    def fits(self, sizes_B2: NDArray[np.int64], boxes: Boxes) -> NDArray[np.bool_]:
        """Return bool (B,), whether each box could have been drawn for an image of this size."""
        at_B4 = boxes.boxes
        inside_B = (np.abs(at_B4[:, :2]) <= self.padding).all(axis=1)
        same_B: NDArray[np.bool_] = inside_B & (at_B4[:, 2:] == sizes_B2).all(axis=1)
        return same_B

    def cut(self, images: Images, boxes: Boxes) -> Images:
        """Cut the boxes out of B images."""
        at_B4 = torch.from_numpy(boxes.boxes.astype(np.int64)) + self.padding
        flip_B = torch.from_numpy(boxes.flips.astype(bool))
        if isinstance(images, Tensor):
            return self.apply(images, Crops(top=at_B4[:, 0], left=at_B4[:, 1], flip=flip_B))
        return [
            self.apply(image[None], Crops(top=at_4[None, 0], left=at_4[None, 1], flip=flip[None]))[0]
            for image, at_4, flip in zip(images, at_B4, flip_B, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class InceptionStep:
    """A random part of the image, resized to S x S with antialiasing (Szegedy et al. 2014), as in torchvision.

    PIL resizes, because its pixels are the same on every processor.

    Raises:
        UsageError: a parameter is out of range.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 1 << 14:
            raise UsageError(f"inception: expected a size of 1 to {1 << 14} pixels, found {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"inception: expected a scale of two rising numbers in (0, 1], found {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UsageError(f"inception: expected a ratio of two rising numbers above 0, found {self.ratio}")
        if self.interpolation not in _RESAMPLING:
            raise UsageError(f"inception: expected interpolation bilinear or bicubic, found {self.interpolation!r}")

    @property
    def fixed(self) -> bool:
        return True

    def draw(self, sizes_B2: NDArray[np.int64], words_B: U64) -> Boxes:
        """Draw as in `CropFlipStep`: the first of ten draws inside the image, else the largest allowed central crop."""
        numbers = uniforms(words_B, 0, 4 * _ATTEMPTS + 1)
        flips_B = ((numbers[:, -1] < 0.5) & self.flip).astype(np.uint8)
        area_BA, ratio_BA, top_BA, left_BA = numbers[:, :-1].reshape(-1, 4, _ATTEMPTS).transpose(1, 0, 2)
        height_B1, width_B1 = sizes_B2[:, :1].astype(np.float64), sizes_B2[:, 1:].astype(np.float64)
        low, high = self.scale
        area_BA = height_B1 * width_B1 * (low + (high - low) * area_BA)
        low, high = (math.log(one) for one in self.ratio)
        ratio_BA = np.exp(low + (high - low) * ratio_BA)
        w_BA, h_BA = np.rint(np.sqrt(area_BA * ratio_BA)), np.rint(np.sqrt(area_BA / ratio_BA))
        wide_BA, high_BA = (w_BA > 0) & (w_BA <= width_B1), (h_BA > 0) & (h_BA <= height_B1)
        good_BA: NDArray[np.bool_] = np.logical_and(wide_BA, high_BA)
        t_BA, l_BA = np.floor(top_BA * (height_B1 - h_BA + 1)), np.floor(left_BA * (width_B1 - w_BA + 1))
        rows_B = np.arange(len(words_B))
        first_B = good_BA.argmax(axis=1)
        drawn_B4 = np.stack([t_BA, l_BA, h_BA, w_BA], axis=2)[rows_B, first_B]
        boxes_B4 = np.where(good_BA.any(axis=1, keepdims=True), drawn_B4, self._central(height_B1, width_B1))
        return Boxes(boxes=boxes_B4.astype(np.int32), flips=flips_B)

    def _central(self, height_B1: NDArray[np.float64], width_B1: NDArray[np.float64]) -> NDArray[np.float64]:
        w_B1 = np.minimum(width_B1, np.maximum(np.rint(height_B1 * self.ratio[1]), 1))
        h_B1 = np.minimum(height_B1, np.maximum(np.rint(width_B1 / self.ratio[0]), 1))
        return np.concatenate([(height_B1 - h_B1) // 2, (width_B1 - w_B1) // 2, h_B1, w_B1], axis=1)

    def fits(self, sizes_B2: NDArray[np.int64], boxes: Boxes) -> NDArray[np.bool_]:
        """Return bool (B,), whether each box lies inside an image of this size."""
        at_B4 = boxes.boxes.astype(np.int64)
        inside_B2 = (at_B4[:, :2] >= 0) & (at_B4[:, 2:] > 0) & (at_B4[:, :2] + at_B4[:, 2:] <= sizes_B2)
        return np.logical_and(inside_B2[:, 0], inside_B2[:, 1])

    def cut(self, images: Images, boxes: Boxes) -> Images:
        """Cut the boxes out of B images and resize them: (B, C, S, S), uint8 or float32 as they are."""
        channels, dtype = (images[0].shape[0], images[0].numpy().dtype) if len(images) else (3, np.dtype(np.uint8))
        out = np.empty((len(images), self.size, self.size, channels), dtype)
        for place, (top, left, height, width) in enumerate(boxes.boxes.tolist()):
            image_HWC = images[place].permute(1, 2, 0).numpy()
            resized = self._resize(np.ascontiguousarray(image_HWC[top : top + height, left : left + width]))
            out[place] = resized[:, ::-1] if boxes.flips[place] else resized
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def _resize(self, part_HWC: NDArray[Any]) -> NDArray[Any]:
        """To (S, S, C); PIL takes 8-bit RGB whole, other images channel by channel (modes L and F)."""
        size, resampling = (self.size, self.size), _RESAMPLING[self.interpolation]
        if part_HWC.dtype == np.uint8 and part_HWC.shape[2] == 3:
            return np.asarray(Image.fromarray(part_HWC).resize(size, resampling))
        channels = (np.ascontiguousarray(part_HWC[:, :, channel]) for channel in range(part_HWC.shape[2]))
        return np.stack([np.asarray(Image.fromarray(one).resize(size, resampling)) for one in channels], axis=2)


CropStep = CropFlipStep | InceptionStep
