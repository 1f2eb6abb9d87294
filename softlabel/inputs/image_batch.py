"""From samples to one batch of pixels, for whatever reads images: decode and hash, bring to one size, stack.

    samples -> decode_samples -> (views of them) -> shape_images -> uint8 (B, 3, H, W) for each geometry

An image that cannot be used is reported by its place, with the reason: labelling makes a bad row of it, training stops.

Legend: B batch, H and W height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import BadImageError, DataError
from softlabel.inputs.base import Images, Sample
from softlabel.inputs.content import content_hash
from softlabel.inputs.image_decode import decode_hashed
from softlabel.inputs.image_transform import Preprocessing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodedSamples:
    """B samples, decoded.

    Attributes:
        images: place among the samples -> uint8 (3, H, W), of any sizes; in their order, without those that failed.
        content: uint64 (B,), the content hash of every sample; 0 where there is none.
        failed: place -> why it cannot be decoded.
    """

    images: dict[int, Tensor]
    content: NDArray[np.uint64]
    failed: dict[int, str]


def decode_samples(samples: Sequence[Sample], *, name: str) -> DecodedSamples:
    """Decode samples, each as it says that it is decoded, and hash what the source gave.

    Args:
        samples: B of them.
        name: of the source.

    Raises:
        DataError: a sample is no image at all; it is named.
    """
    images: dict[int, Tensor] = {}
    failed: dict[int, str] = {}
    content = np.zeros(len(samples), dtype=np.uint64)
    for place, sample in enumerate(samples):
        try:
            images[place], content[place] = decode_hashed(sample.image, sample.decoding)
        except BadImageError as error:
            content[place], failed[place] = content_hash(sample.image) or 0, str(error)
        except DataError as error:
            raise DataError(f"{name}: sample {sample.key!r}: {error}") from error
    return DecodedSamples(images=images, content=content, failed=failed)


def shape_images(
    images: Images,
    keys: Sequence[str],
    geometries: Sequence[Preprocessing],
    *,
    network: str,
    fixed: bool = False,
    size: Sequence[int] | None = None,
) -> tuple[tuple[Tensor, ...], dict[int, str]]:
    """Bring images to one size, once for each geometry, and stack them.

    Args:
        images: B images or views, uint8 (3, H, W) each, at least one.
        keys: of the images.
        geometries: each shapes the image itself, never what another one left of it.
        network: what takes them, "teacher" or "student", for the message.
        fixed: the images are views of one size, whose crop was chosen with the view (`Preprocessing.view_geometry`).
        size: the shape (3, H, W) that they must come out with; None: that of the first.

    Returns:
        A batch, uint8 (B', 3, H, W) in channels-last layout, for each geometry, none where no image fits; and place ->
        reason of the images that do not fit one of the geometries, which are in none of the batches.

    Raises:
        DataError: images come out with different sizes.
    """
    if isinstance(images, Tensor) and (size is None or images.shape[1:] == torch.Size(size)):
        first = images[0]
        if all(geometry.view_geometry(first, fixed=fixed) is first for geometry in geometries):
            return (images,) * len(geometries), {}
    batches: list[list[Tensor]] = [[] for _ in geometries]
    failed: dict[int, str] = {}
    for place, image_CHW in enumerate(images):
        try:
            shaped = [geometry.view_geometry(image_CHW, fixed=fixed) for geometry in geometries]
        except BadImageError as error:
            failed[place] = str(error)
            continue
        for batch, shaped_CHW in zip(batches, shaped, strict=True):
            expected = tuple(size or (batch[0] if batch else shaped_CHW).shape)
            if shaped_CHW.shape != expected:
                raise DataError(
                    f"image {keys[place]!r}: expected {expected[2]}x{expected[1]} pixels like the images before it, "
                    f"found {shaped_CHW.shape[2]}x{shaped_CHW.shape[1]} pixels; give the {network} a size, such as "
                    "'?resize=256&crop=224'"
                )
            batch.append(shaped_CHW)
    return tuple(stack_images(batch) for batch in batches if batch), failed


def stack_images(images_CHW: Sequence[Tensor]) -> Tensor:
    """Decoded images of one size as a batch: uint8 (B, 3, H, W) in channels-last layout, as they lie already."""
    return torch.stack([image_CHW.permute(1, 2, 0) for image_CHW in images_CHW]).permute(0, 3, 1, 2)


def refuse_failed(failed: dict[int, str], keys: Sequence[str], *, name: str) -> None:
    """Raise for the first image that cannot be used, where there is one.

    Args:
        failed: place -> reason.
        keys: of the images.
        name: of the source.

    Raises:
        DataError: `failed` is not empty.
    """
    for place, reason in failed.items():
        raise DataError(f"{name}: image {keys[place]!r}: {reason}; repair it or take it out")
