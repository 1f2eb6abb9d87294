"""Resize, crop and normalise images for a network.

Legend: B batch, C channels, H and W height and width. Images are uint8 RGB until `normalize`.
"""

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from softlabel.errors import BadImageError, SpecError
from softlabel.inputs.base import Fitted, Inputs, InputTransform, Item
from softlabel.inputs.tensor import check_mean_std

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# PIL's limit for a decompression bomb: a 20000 x 2 image resized to 224 would take 1.5 GB.
_MOST_PIXELS = 2**30 // 4 // 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing(InputTransform):
    """Geometry and normalisation of a network's input.

    Attributes:
        mean, std: of the channels, three of RGB or one for each of several bands, for values in [0, 1].
        resize: length of the shorter side after resizing; None leaves the size.
        crop: side of the square cut from the middle; None leaves the size.
        interpolation: nearest, nearest-exact, bilinear or bicubic (the last two with antialiasing).
        squash: resize both sides to `resize`, ignoring the proportions.
        floor_crop: round the crop's corner down, as transformers does, instead of to even, as torchvision does.

    Raises:
        SpecError: a value is out of range, or two of them exclude each other.
    """

    kind: ClassVar[str] = "image"
    memory_format: ClassVar[torch.memory_format] = torch.channels_last
    remedy: ClassVar[str] = "give the {network} the size that it needs, such as '?resize=256&crop=224'"
    spec_options: ClassVar[str] = "mean, std, resize, crop"

    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"
    squash: bool = False
    floor_crop: bool = False

    def __post_init__(self) -> None:
        check_mean_std(self.mean, self.std)
        if self.interpolation not in INTERPOLATIONS:
            raise SpecError(f"interpolation: expected {', '.join(INTERPOLATIONS)}; found {self.interpolation!r}")
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise SpecError(f"{name}: expected a number of pixels of at least 1, or none; found {size}")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise SpecError(f"crop={self.crop} does not fit into resize={self.resize}; make resize at least as large")
        if self.squash and self.resize is None:
            raise SpecError("squash: expected a resize= to squash to, found none")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object; `from_dict` is the inverse."""
        found = {
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.interpolation,
        }
        # Defaults are left out: the identity of members recorded before these fields existed must not change.
        return found | {name: True for name in ("squash", "floor_crop") if getattr(self, name)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Preprocessing":
        """Restore from `to_dict`.

        Raises:
            SpecError: a field is missing or has the wrong type.
        """
        try:
            return cls(
                mean=tuple(float(x) for x in found["mean"]),
                std=tuple(float(x) for x in found["std"]),
                resize=None if found["resize"] is None else int(found["resize"]),
                crop=None if found["crop"] is None else int(found["crop"]),
                interpolation=str(found["interpolation"]),
                squash=bool(found.get("squash", False)),
                floor_crop=bool(found.get("floor_crop", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"preprocessing: expected mean, std, resize, crop, interpolation; found {error!r}"
            ) from error

    def describe_others(self, given: Container[str]) -> str:
        """The fields as options of a SPEC, without those that a SPEC gives; `resize` or `crop` alone gives both."""
        if "resize" in given or "crop" in given:
            given = {"resize", "crop", *(name for name in ("mean", "std", "interpolation", "squash") if name in given)}
        numbers = {name: ",".join(f"{x:.4g}" for x in getattr(self, name)) for name in ("mean", "std")}
        geometry = {name: getattr(self, name) for name in ("resize", "crop", "interpolation")}
        fields = numbers | geometry | ({"squash": "true"} if self.squash else {})
        return ", ".join(
            f"{name}={'none' if value is None else value}" for name, value in fields.items() if name not in given
        )

    @property
    def shape(self) -> tuple[Any, ...]:
        """The fields that `geometry` depends on: members that agree in them can share a tensor."""
        return self.resize, self.crop, self.interpolation, self.squash, self.floor_crop

    @property
    def fixes_size(self) -> bool:
        """Whether images of all sizes get one size."""
        return self.crop is not None

    def geometry(self, image_CHW: Tensor) -> Tensor:
        """Resize the shorter side (both with `squash`) with antialiasing, then crop the centre.

        Args:
            image_CHW: uint8 (3, H, W).

        Returns:
            uint8 (3, H', W'); the image itself if it has the size already.

        Raises:
            BadImageError: the image is too small for the crop, or so thin that resizing it would exhaust memory.
        """
        image_CHW = self._resize(image_CHW)
        height, width = image_CHW.shape[-2:]
        if self.crop is None or (height, width) == (self.crop, self.crop):
            return image_CHW
        if min(height, width) < self.crop:
            raise BadImageError(
                f"{width} x {height} pixels: smaller than crop={self.crop}; give resize={self.crop} as well"
            )
        margins = height - self.crop, width - self.crop
        top, left = (margin // 2 if self.floor_crop else round(margin / 2) for margin in margins)
        return image_CHW[:, top : top + self.crop, left : left + self.crop]

    def fit(self, item: Item, *, fixed: bool = False) -> Tensor:
        """A view in this network's size: uint8 (3, H, W) to uint8.

        Views of one size (`fixed`) were cropped already: a second crop would remove part of the view, so the whole view
        is resized to S x S, where S is this network's `crop`.
        """
        if not isinstance(item, Tensor) or item.shape[0] != len(self.mean):
            found = f"one of shape {tuple(item.shape)}" if isinstance(item, Tensor) else "several arrays"
            elsewhere = isinstance(item, Tensor) and len(self.mean) in item.shape[1:]
            layout = ", or the other '&layout=' in the SOURCE, as another axis has so many" if elsewhere else ""
            raise SpecError(
                f"expected an image of {len(self.mean)} channels, as mean= and std= have numbers, found {found}; give "
                f"mean= and std= with a number for each channel, of a single one in brackets: mean=[0.5]{layout}"
            )
        if not fixed or self.crop is None:
            return self.geometry(item)
        size = [self.crop, self.crop]
        if list(item.shape[-2:]) == size:
            return item
        return resize_pixels(item, size, self.interpolation)

    def _resize(self, image_CHW: Tensor) -> Tensor:
        height, width = image_CHW.shape[-2:]
        short, long = min(height, width), max(height, width)
        if self.resize is None or (short == self.resize and (long == self.resize or not self.squash)):
            return image_CHW
        if not self.squash and self.resize * int(self.resize * long / short) > _MOST_PIXELS:
            raise BadImageError(
                f"{width} x {height} pixels: too thin, resizing its shorter side to {self.resize} would make "
                f"the longer one {int(self.resize * long / short)}"
            )
        size = [self.resize, self.resize] if self.squash else [self.resize]
        return resize_pixels(image_CHW, size, self.interpolation)

    def collate(self, items: Sequence[Fitted]) -> Inputs:
        """uint8 (B, 3, H, W), channels last."""
        return Inputs.single(stack_images(items))  # type: ignore[arg-type]

    def finish(self, inputs: Inputs) -> Inputs:
        """See `normalize`; channels-last in memory."""
        return inputs.map(lambda tensor: self.normalize(tensor).contiguous(memory_format=self.memory_format))

    def example(self, rows: int) -> Inputs | None:
        """A black image, one that is half white, and random ones."""
        if self.crop is None:
            return None
        generator = torch.Generator().manual_seed(0)
        shape = (rows, len(self.mean), self.crop, self.crop)
        images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        images_BCHW[:2] = 0
        images_BCHW[1:2, :, : self.crop // 2] = 255
        return Inputs.single(images_BCHW)

    @property
    def norm(self) -> Hashable:
        """Mean and standard deviation."""
        return self.mean, self.std

    @property
    def fit_in_words(self) -> str:
        """Sizes and interpolation."""
        return f"images of resize {self.resize}, crop {self.crop}, {self.interpolation}"

    def describe(self, shape: Sequence[int]) -> str:
        """Width x height."""
        return f"{shape[-1]} x {shape[-2]} pixels"

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """``(x / 255 - mean) / std``: uint8 (B, C, H, W) to float32 of the same shape, device and memory layout; floats
        are not divided by 255."""
        mean_C11, std_C11 = _make_constants(self.mean, self.std, images_BCHW.device)
        if images_BCHW.dtype != torch.uint8:
            return (images_BCHW - mean_C11).div_(std_C11)
        return images_BCHW.to(torch.float32).div_(255).sub_(mean_C11).div_(std_C11)


def resize_pixels(image_CHW: Tensor, size: list[int], interpolation: str) -> Tensor:
    """Resize with antialiasing.

    Args:
        image_CHW: uint8 (C, H, W).
        size: height and width; one number is the shorter side.
        interpolation: one of `INTERPOLATIONS`.
    """
    # Imported when it is needed: torchvision takes longer to import than torch, and many runs resize nothing.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    mode = InterpolationMode(interpolation)
    resized_CHW: Tensor = functional.resize(image_CHW, size, interpolation=mode, antialias=True)
    return resized_CHW


def stack_images(images_CHW: Sequence[Tensor]) -> Tensor:
    """Decoded images of one size as a batch: uint8 (B, 3, H, W) in channels-last layout, as they lie already."""
    # A worker's batch is then in shared memory, from where no copy is sent.
    batch_BHWC: Tensor = default_collate([image_CHW.permute(1, 2, 0) for image_CHW in images_CHW])
    return batch_BHWC.permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _make_constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std on the device, cached: a copy per batch would synchronise host and device."""
    with torch.inference_mode(False):
        return (
            torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None],
            torch.tensor(std, dtype=torch.float32, device=device)[:, None, None],
        )
