"""A step that shows two noisy copies of a view beside it, x + s e and x - s e.

Half the difference of a network's logits is its derivative along the noise, times the step (Srinivas and Fleuret 2018,
"Knowledge Transfer with Jacobian Matching"; Czarnecki et al. 2017, "Sobolev Training").

The noise e has elements -1 and +1 (Rademacher): the bits of SplitMix64, seeded by (seed, key, view, direction). s is a
whole number of grey levels: pixels stay bytes, so that the same pair can be made anywhere, bit for bit.

Legend: B batch, C colours, H and W pixels, K directions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.random import draw_bits
from softlabel.errors import UsageError
from softlabel.inputs.base import Images
from softlabel.views.random import U64

_FIRST = 1 << 32  # first index in a sample's random stream, of direction 0; other steps use lower ones
_MOST_DIRECTIONS = 64
_MOST_LEVELS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePairStep:
    """Which noisy copies there are of a view.

    Attributes:
        step: grey levels by which each pixel is changed, of 255.
        directions: pairs of each view, each with noise of its own.

    Raises:
        UsageError: a number is out of range.
    """

    step: int = 4
    directions: int = 1

    def __post_init__(self) -> None:
        for name, most in (("step", _MOST_LEVELS), ("directions", _MOST_DIRECTIONS)):
            if not 1 <= (found := getattr(self, name)) <= most:
                raise UsageError(f"noise-pair: expected {name} from 1 to {most}, found {found}")

    def make(self, images: Images, words_B: U64) -> list[Images]:
        """Make the pairs of B views.

        Args:
            images: uint8, one tensor if all have one size.
            words_B: random words uint64 (B,) of (seed, key, view).

        Returns:
            2 K times B images of the same sizes: of each direction x + s e, then x - s e, both clipped to bytes.

        Raises:
            UsageError: the images are not bytes.
        """
        if len(images) and images[0].dtype != torch.uint8:
            raise UsageError(
                "augment: noise-pair changes pixels by whole grey levels, and needs images of 8 bits, found "
                f"{str(images[0].dtype).removeprefix('torch.')}; leave it out"
            )
        found: list[Images] = []
        for direction in range(self.directions):
            if isinstance(images, Tensor):
                drawn = torch.from_numpy(self._draw(words_B, direction, images[0].numel()))
                noise = drawn.view(images.shape).to(images.device)
                found += [_add(images, noise), _add(images, -noise)]
            else:
                noises = [
                    torch.from_numpy(self._draw(words_B[place : place + 1], direction, image.numel())).view(image.shape)
                    for place, image in enumerate(images)
                ]
                found.append([_add(*pair) for pair in zip(images, noises, strict=True)])
                found.append([_add(image, -noise) for image, noise in zip(images, noises, strict=True)])
        return found

    def _draw(self, words_B: U64, direction: int, size: int) -> NDArray[np.int16]:
        """Return s e of each image, int16 (B, size): + where a bit of the stream is set, low bits first."""
        words_BL = draw_bits(words_B, (direction + 1) * _FIRST, -(-size // 64)).astype("<u8", copy=False)
        set_BS = np.unpackbits(words_BL.view(np.uint8), axis=1, count=size, bitorder="little")
        return set_BS.astype(np.int16) * np.int16(2 * self.step) - np.int16(self.step)


def _add(pixels: Tensor, noise: Tensor) -> Tensor:
    return (pixels.to(torch.int16) + noise).clamp_(0, 255).to(torch.uint8)
