"""From whatever a source holds to pixels: uint8 RGB, upright.

Legend: B batch, C channels (3), H and W height and width.

PIL is the one decoder, for the teacher's images and for the student's, so that both see the same pixels. Where an image
has to become RGB this is what PIL's `convert("RGB")` does and torchvision's `ImageFolder` as well: transparency is
dropped, colour profiles are not applied, of an animation the first frame counts.
"""

import dataclasses
import io
import re
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

# Pixel formats that have no program behind them: PIL would run Ghostscript on a PostScript file.
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

    Takes encoded bytes, a PIL image, an array (H, W) or (H, W, 1, 3 or 4), or a tensor (H, W) or (1, 3 or 4, H, W).
    Grey, palette, CMYK and alpha become RGB; of 16 bits the upper 8 that are used. The result lies in memory
    as (H, W, 3).

    Raises:
        BadImageError: it is no image, or a damaged one, or one too large to be meant; the text is the reason alone.
        DataError: pixels of a kind that cannot be meant, such as floats: the source is wrong, not this image.
    """
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, BadImageError):
        raise BadImageError(str(image)) from image
    if not isinstance(image, bytes | bytearray | memoryview | Image.Image):
        raise DataError(
            f"expected an image as bytes, PIL image, array or tensor, found {type(image).__name__}; "
            "let the dataset return one"
        )
    try:
        if isinstance(image, Image.Image):
            # A dataset's pixels are as it means them: the tag often outlives the turning that it asked for.
            return _from_pil(image, dataclasses.replace(decoding, upright=False))
        if not len(image):
            raise BadImageError("empty, 0 bytes")
        return _from_pil(Image.open(io.BytesIO(image), formats=_formats()), decoding)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        head = bytes(image[:12]) if not isinstance(image, Image.Image) else b""
        raise BadImageError(f"not an image, of an unknown format, or damaged; it begins with {head!r}") from error
    except Exception as error:  # plugins raise SyntaxError, struct.error, IndexError, ... on damaged files
        reason = re.sub(r" at 0x[0-9a-f]+", "", f"{error}" or type(error).__name__)
        raise BadImageError(reason) from error


def decode_hashed(image: Raw, decoding: Decoding = AS_USUAL) -> tuple[Tensor, int]:
    """`decode_image` and `content_hash` in one go, which saves a second look at pixels that need no conversion.

    Raises: as `decode_image`.
    """
    pixels_CHW = decode_image(image, decoding)
    if isinstance(image, bytes):  # by far the most frequent
        return pixels_CHW, xxhash.xxh3_64_intdigest(image)
    if _is_plain(image):
        values_HWC = pixels_CHW.numpy().transpose(1, 2, 0)
        return pixels_CHW, hash_values(values_HWC, "|u1", values_HWC.shape)
    return pixels_CHW, content_hash(image) or 0


class ImageKind(InputKind):
    """Images of 8 bits, as RGB: encoded, or as pixels."""

    name: ClassVar[str] = "image"
    unit: ClassVar[str] = "img"

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


# A pixel from here on needs more than 12 bits: no camera or scanner fills 13 to 15.
_CLEARLY_16_BITS = 1 << 12


@cache
def _formats() -> tuple[str, ...]:
    """Those that this build of PIL has: it stumbles over the name of one that it has not."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _from_pil(image: Image.Image, decoding: Decoding) -> Tensor:
    image.load()
    image = _to_rgb(_upright(image) if decoding.upright else image, decoding.bits)
    # A bytearray, because torch warns of read-only memory and would let one write into it. numpy makes the shape in one
    # step: for small images every torch operation counts.
    width, height = image.size
    pixels = np.ndarray((3, height, width), np.uint8, bytearray(image.tobytes()), 0, (1, 3 * width, 3))
    return torch.from_numpy(pixels)


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return image  # asking a JPEG for EXIF data that it has not takes a tenth of its decoding
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data around good pixels: as they lie is the best guess, and everybody's
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, bits: int | None) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "I" or mode.startswith("I;16"):
        # PIL would clip at 255; of 16-bit colour it keeps the upper byte too.
        grey_HW = np.asarray(image).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 0xFFFF:
            raise BadImageError(
                f"pixels of more than 16 bits ({grey_HW.min()} to {grey_HW.max()}); convert it to 8 bits"
            )
        if bits is None and grey_HW.max() < _CLEARLY_16_BITS:
            raise BadImageError(
                f"16-bit pixels of at most {grey_HW.max()}: how many bits they use was not decided, as none "
                "of the images of this data that were looked at has 16; '?bits=N' says it"
            )
        bits = 16 if bits is None else bits
        if grey_HW.max() >> bits:
            raise BadImageError(
                f"a pixel of {grey_HW.max()}, and the 16-bit images of this data were taken to use {bits} bits; "
                "'?bits=16' takes all"
            )
        return Image.fromarray((grey_HW >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise BadImageError("floating-point pixels have no agreed range; convert it to 8 bits")
    if mode in ("P", "PA", "La"):
        # PIL warns of, or refuses, the direct way for these; the colours are the same.
        image = image.convert("LA" if mode == "La" else "RGBA")
    return image.convert("RGB")


def _from_array(image: NDArray[np.uint8]) -> Tensor:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise DataError(
            f"expected an image array of shape (H, W) or (H, W, 1, 3 or 4), found {image.shape}; "
            "an image with its channels first can be given as a tensor"
        )
    grid = torch.from_numpy(np.array(image if image.ndim == 3 else image[:, :, None]))
    return _three_channels(grid.permute(2, 0, 1), str(image.dtype))


def _from_tensor(image: Tensor) -> Tensor:
    if image.dim() not in (2, 3) or (image.dim() == 3 and image.shape[0] not in (1, 3, 4)):
        raise DataError(
            f"expected an image tensor of shape (H, W) or (1, 3 or 4, H, W), found {tuple(image.shape)}; "
            "an image with its channels last can be given as an array"
        )
    grid = image.detach().cpu()
    return _three_channels(grid if grid.dim() == 3 else grid[None], str(image.dtype))


def _three_channels(image_CHW: Tensor, dtype: str) -> Tensor:
    if image_CHW.dtype != torch.uint8:
        raise DataError(
            f"expected uint8 pixels from 0 to 255, found {dtype}; let the dataset return the image before ToTensor and "
            "normalisation, which belong to each teacher"
        )
    if not image_CHW.numel():
        raise BadImageError(f"no pixels, shape {tuple(image_CHW.shape)}")
    three_CHW = image_CHW.expand(3, -1, -1) if image_CHW.shape[0] == 1 else image_CHW[:3]
    # Always a copy: the dataset may hold on to its pixels.
    return three_CHW.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).permute(2, 0, 1)
