"""scikit-learn's handwritten digits as JPEG files."""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = tuple("0123456789")


@lru_cache(maxsize=1)
def make_digit_jpegs() -> tuple[list[bytes], list[int]]:
    """scikit-learn's handwritten digits as 16 x 16 JPEG files without duplicates, and their labels."""
    found: dict[bytes, int] = {}
    for image, label in zip(*load_digits(return_X_y=True), strict=True):
        buffer = io.BytesIO()
        grey = Image.fromarray((image.reshape(8, 8) * 15.9).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(buffer, "JPEG", quality=95)
        found.setdefault(buffer.getvalue(), int(label))
    return list(found), list(found.values())


def decode_by_pillow(jpeg: bytes) -> NDArray[np.uint8]:
    """What the loader has to hand out for a JPEG, decoded here by Pillow alone: uint8 (3, H, W)."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).transpose(2, 0, 1)
