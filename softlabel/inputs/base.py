"""What an input is before a network sees it: encoded bytes or pixels, its key, its label, and how it is decoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from softlabel.errors import BadImageError

IGNORE = -100


# Encoded bytes, or pixels from a dataset that decodes by itself, or why the file could not be read.
RawImage: TypeAlias = bytes | Image.Image | NDArray[np.uint8] | Tensor | BadImageError
# Decoded, uint8: (B, 3, H, W), or B of (3, H, W) of any sizes.
Images: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What is done with an image of which that has to be known.

    Attributes:
        upright: encoded images are turned as their EXIF data says.
        bits: how many bits grey images of 16 bits use; None: nobody has looked, all of them.
    """

    upright: bool = True
    bits: int | None = None

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Self:
        """As `to_dict` gave it."""
        return cls(upright=recorded.get("exif", "upright") == "upright", bits=recorded.get("bits"))

    def to_dict(self) -> dict[str, Any]:
        """For a manifest; what is usual is left out."""
        exif = {} if self.upright else {"exif": "ignore"}
        return exif if self.bits is None else {**exif, "bits": self.bits}

    def options(self) -> str:
        """As a user writes them behind a SOURCE."""
        return f"'?exif={'upright' if self.upright else 'ignore'}{'' if self.bits is None else f'&bits={self.bits}'}'"


AS_USUAL = Decoding()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample as the source has it; `decode_image` makes pixels of `image`, as `decoding` says."""

    key: str
    image: RawImage
    label: int = IGNORE
    decoding: Decoding = AS_USUAL
