"""Most JPEG files without PIL, to the same pixels in a fraction of the time.

Both PIL and simplejpeg decode with libjpeg-turbo. What differs is the way there: PIL takes 50 us and more for an image
of any size, a copy of its pixels to four bytes each, and one back. Files of which more is to be known than their pixels
(EXIF data, four channels, damage) are left to PIL.

Legend: H and W pixels.
"""

import io
from functools import cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

_START, _SCAN = b"\xff\xd8\xff", 0xDA
_PROFILE = 0xE2  # or, by its name, an index of several pictures
# JFIF; Huffman and quantisation tables, restart interval; comments. APP1, for one, has EXIF or XMP data.
_KNOWN = (0xE0, 0xC4, 0xDB, 0xDD, 0xFE, _PROFILE)
_FRAMES = (0xC0, 0xC1, 0xC2)  # sequential and progressive Huffman coding


def decode_plain_jpeg(encoded: bytes | bytearray | memoryview) -> NDArray[np.uint8] | None:
    """The pixels of a grey or YCbCr JPEG: uint8 (H, W, 3), RGB. None of what PIL is to decode, or to refuse."""
    if not _is_plain(encoded) or not have_equal_pixels():
        return None
    try:
        found: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError:  # damaged, perhaps only a little
        return None
    return found


def _is_plain(encoded: bytes | bytearray | memoryview) -> bool:
    """Whether all segments before the first scan are those of a file whose pixels are all there is to it."""
    if encoded[:3] != _START:
        return False
    place, size, is_frame = 2, len(encoded), False
    while place + 4 <= size:
        if encoded[place] != 0xFF:
            return False
        kind, length = encoded[place + 1], (encoded[place + 2] << 8) | encoded[place + 3]
        if kind in _FRAMES:
            head = encoded[place + 4 : place + 10]
            if is_frame or len(head) < 6 or head[0] != 8 or head[5] not in (1, 3):
                return False
            height, width = (head[1] << 8) | head[2], (head[3] << 8) | head[4]
            limit = Image.MAX_IMAGE_PIXELS
            if not height or not width or (limit is not None and height * width > limit):
                return False
            is_frame = True
        elif kind == _SCAN:
            return is_frame
        elif kind not in _KNOWN or (kind == _PROFILE and bytes(encoded[place + 4 : place + 8]) == b"MPF\0"):
            return False
        place += 2 + length
    return False


@cache
def have_equal_pixels() -> bool:
    """Whether the two libraries of this installation give the same pixels: PIL may be built with another libjpeg."""
    rng = np.random.default_rng(0)
    smooth_HWC = np.linspace(0, 255, 37 * 51 * 3).reshape(37, 51, 3) + rng.normal(0, 40, (37, 51, 3))
    image = Image.fromarray(smooth_HWC.clip(0, 255).astype(np.uint8))
    for options in (
        {"subsampling": 2},
        {"subsampling": 1},
        {"subsampling": 0},
        {"subsampling": 2, "progressive": True},
    ):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80, **options)
        ours_HWC = simplejpeg.decode_jpeg(file.getvalue(), "RGB", strict=True)
        if not np.array_equal(ours_HWC, np.asarray(Image.open(file).convert("RGB"))):
            return False
    return True
