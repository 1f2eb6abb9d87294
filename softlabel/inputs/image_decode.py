"""Decode images to upright uint8 RGB pixels.

Legend: B batch, C channels (3), H and W height and width.

PIL decodes for teacher and student, so that both get the same pixels; most JPEG files are decoded to these pixels in
another way, see `jpeg`. Conversion to RGB is PIL's `convert("RGB")`, as in torchvision's `ImageFolder`: transparency is
dropped, colour profiles are ignored, an animation gives its first frame.
"""

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from softlabel.errors import BadImageError, DataError
from softlabel.inputs.base import AS_USUAL, Decoding, InputKind, Raw, Sample
from softlabel.inputs.content import content_hash, hash_values
from softlabel.inputs.jpeg import decode_plain_jpeg

# Formats that PIL decodes by itself: for PostScript it would run Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(image: Raw, decoding: Decoding = AS_USUAL) -> Tensor:
    """The pixels of an image: uint8 (3, H, W), RGB; of encoded bytes turned upright as their EXIF data says.

    Args:
        image: encoded bytes, a PIL image, an array (H, W) or (H, W, 1, 3 or 4), or a tensor (H, W) or (1, 3 or 4, H,
            W). Grey, palette, CMYK and alpha become RGB; 16-bit pixels keep the upper 8 of the bits in use.
        decoding: the EXIF orientation applies to encoded bytes only.

    Returns:
        uint8 (3, H, W), in memory as (H, W, 3).

    Raises:
        BadImageError: not an image, damaged, or too large; the text is the reason alone.
        DataError: pixels of an unsupported type, such as floats: the source is wrong, not this image.
    """
    if isinstance(image, Tensor):
        return _convert_tensor(image)
    if isinstance(image, np.ndarray):
        return _convert_array(image)
    if isinstance(image, BadImageError):
        raise BadImageError(str(image)) from image
    if not isinstance(image, bytes | bytearray | memoryview | Image.Image):
        raise DataError(
            f"expected an image as bytes, PIL image, array or tensor, found {type(image).__name__}; "
            "let the dataset return one"
        )
    try:
        if isinstance(image, Image.Image):
            # A dataset may have applied the orientation and kept the tag.
            return _decode_pil(image, dataclasses.replace(decoding, upright=False))
        if not len(image):
            raise BadImageError("empty, 0 bytes")
        if (pixels_HWC := decode_plain_jpeg(image)) is not None:
            return torch.from_numpy(pixels_HWC.transpose(2, 0, 1))
        return _decode_pil(Image.open(io.BytesIO(image), formats=_list_formats()), decoding)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        head = bytes(image[:12]) if not isinstance(image, Image.Image) else b""
        raise BadImageError(f"not an image, an unknown format, or damaged; it begins with {head!r}") from error
    except Exception as error:  # plugins raise SyntaxError, struct.error, IndexError, ... on damaged files
        reason = re.sub(r" at 0x[0-9a-f]+", "", f"{error}" or type(error).__name__)
        raise BadImageError(reason) from error


def decode_hashed(image: Raw, decoding: Decoding = AS_USUAL) -> tuple[Tensor, int]:
    """`decode_image` and `content_hash` in one go, which saves a second look at pixels that need no conversion.

    Raises:
        BadImageError, DataError: as `decode_image`.
    """
    pixels_CHW = decode_image(image, decoding)
    if isinstance(image, bytes):  # the most frequent case
        return pixels_CHW, xxhash.xxh3_64_intdigest(image)
    if _is_plain(image):
        values_HWC = pixels_CHW.numpy().transpose(1, 2, 0)
        return pixels_CHW, hash_values(values_HWC, "|u1", values_HWC.shape)
    return pixels_CHW, content_hash(image) or 0


class ImageKind(InputKind):
    """Images of 8 bits, as RGB: encoded, or as pixels."""

    name: ClassVar[str] = "image"
    unit: ClassVar[str] = "img"
    noun: ClassVar[str] = "images"

    def decode(self, sample: Sample) -> tuple[Tensor, int]:
        """See `decode_hashed`."""
        return decode_hashed(sample.raw, sample.decoding)

    def content_hash(self, raw: Raw) -> int | None:
        """See `content.content_hash`."""
        return content_hash(raw)


IMAGES = ImageKind()


def _is_plain(image: Raw) -> bool:
    """Whether decoding gives the pixels as the dataset gave them."""
    if isinstance(image, Image.Image):
        return image.mode == "RGB"
    if isinstance(image, np.ndarray):
        return image.ndim == 3 and image.shape[2] == 3
    return isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] == 3


# A pixel from here on needs more than 12 bits: no camera or scanner uses 13 to 15.
_CLEARLY_16_BITS = 1 << 12


@cache
def _list_formats() -> tuple[str, ...]:
    """Return the formats of this build of PIL, which fails on the names of others."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_pil(image: Image.Image, decoding: Decoding) -> Tensor:
    image.load()
    image = _to_rgb(_turn_upright(image) if decoding.upright else image, decoding.bits)
    # A bytearray, because torch would write into read-only memory. numpy sets the shape in one step, which is faster
    # than torch operations for small images.
    width, height = image.size
    pixels = np.ndarray((3, height, width), np.uint8, bytearray(image.tobytes()), 0, (1, 3 * width, 3))
    return torch.from_numpy(pixels)


def _turn_upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return image  # getexif() takes a tenth of the decoding time even if there is no EXIF data
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data: keep the pixels as stored, as other decoders do
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, bits: int | None) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "I" or mode.startswith("I;16"):
        # PIL clips 16-bit grey at 255; of 16-bit colour it keeps the upper byte, as here.
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 0xFFFF:
            raise BadImageError(
                f"pixels of more than 16 bits ({grey_HW.min()} to {grey_HW.max()}); convert it to 8 bits"
            )
        if bits is None and grey_HW.max() < _CLEARLY_16_BITS:
            raise BadImageError(
                f"16-bit pixels of at most {grey_HW.max()}: the number of bits in use is unknown, as no image that "
                "was sampled has 16-bit pixels; set it with '?bits=N'"
            )
        bits = 16 if bits is None else bits
        if grey_HW.max() >> bits:
            raise BadImageError(
                f"a pixel of {grey_HW.max()}, expected at most {bits} bits as in the other 16-bit images of this data; "
                "'?bits=16' accepts all"
            )
        return Image.fromarray((grey_HW >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise BadImageError("floating-point pixels have no agreed range; convert it to 8 bits")
    if mode in ("P", "PA", "La"):
        # PIL warns about or refuses the direct conversion; the colours are the same.
        image = image.convert("LA" if mode == "La" else "RGBA")
    return image.convert("RGB")


def _convert_array(image: NDArray[np.uint8]) -> Tensor:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(
            f"expected an image array of shape (H, W) or (H, W, 1, 3 or 4), found {image.shape}; "
            "an image with its channels first can be given as a tensor"
        )
    _check_pixels(image.dtype == np.uint8, str(image.dtype), image.shape)
    return _make_rgb(image if image.ndim == 3 else image[:, :, None])


def _convert_tensor(image: Tensor) -> Tensor:
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] not in (1, 3, 4)):
        raise DataError(
            f"expected an image tensor of shape (H, W) or (1, 3 or 4, H, W), found {tuple(image.shape)}; "
            "an image with its channels last can be given as an array"
        )
    if image.layout != torch.strided or image.is_meta:
        raise DataError(
            f"expected a dense tensor with values, found {image.layout} on {image.device}; let the dataset return one"
        )
    _check_pixels(image.dtype == torch.uint8, str(image.dtype), image.shape)
    grid = image.detach().cpu()
    return _make_rgb((grid if grid.dim() == 3 else grid[None]).permute(1, 2, 0).numpy())


def _check_pixels(fits: bool, dtype: str, shape: Sequence[int]) -> None:
    if not fits:
        raise DataError(
            f"expected uint8 pixels from 0 to 255, found {dtype}; let the dataset return the image before ToTensor and "
            "normalisation, which belong to each teacher"
        )
    if not math.prod(shape):
        raise BadImageError(f"no pixels, shape {tuple(shape)}")


def _make_rgb(image_HWC: NDArray[np.uint8]) -> Tensor:
    """A copy, because the dataset may keep its pixels."""
    height, width, channels = image_HWC.shape
    pixels_HWC = np.empty((height, width, 3), np.uint8)
    if channels > 1 and image_HWC.strides[2] == 1:
        pixels_HWC[...] = image_HWC[:, :, :3]
    else:  # plane by plane, which takes a third of the time of one assignment where the channels lie apart
        for channel in range(3):
            pixels_HWC[:, :, channel] = image_HWC[:, :, channel if channels > 1 else 0]
    return torch.from_numpy(pixels_HWC.transpose(2, 0, 1))
