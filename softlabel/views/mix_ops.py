"""Steps that mix two samples: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), on uint8 pixels.

Legend: B batch, H and W pixels.

The teacher labels the mixed image, so its label needs no mixing. A row stores the XXH3-128 of the partner's key, the
weight and, for cutmix, the pasted box. The arithmetic is in integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from softlabel.common.random import draw_bits
from softlabel.errors import UsageError
from softlabel.views.random import U64, uniforms

CANDIDATES = 8  # partners that are tried before a sample is mixed with itself
_ONE = 1 << 16  # a weight is a multiple of 1 / 65536
_FIRST = 2000  # first index in a sample's random stream; other steps use lower ones


@dataclass(frozen=True, slots=True, kw_only=True)
class MixStep:
    """How a sample is mixed with its partner.

    Attributes:
        kind: ``mixup`` blends the two; ``cutmix`` pastes a box of the partner into the sample.
        alpha: of Beta(alpha, alpha), the distribution of the sample's own weight.

    Raises:
        UsageError: alpha is out of range.
    """

    kind: Literal["mixup", "cutmix"]
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1e6:
            raise UsageError(f"{self.kind}: expected an alpha above 0, found {self.alpha}")

    def candidates(self, words_B: U64, pool: int) -> NDArray[np.int64]:
        """Return positions below `pool` of possible partners, in the order in which to try them: int64 (B, 8)."""
        # The upper 32 bits, scaled: uniform to one in 2^32 / pool.
        upper_BK = draw_bits(words_B, _FIRST, CANDIDATES) >> np.uint64(32)
        return ((upper_BK * np.uint64(pool)) >> np.uint64(32)).astype(np.int64)

    def weights(self, words_B: U64) -> NDArray[np.float32]:
        """Return each sample's own weight, a multiple of 1 / 65536: float32 (B,)."""
        seeds_B = draw_bits(words_B, _FIRST + CANDIDATES, 1)[:, 0].tolist()
        drawn = [np.random.Generator(np.random.Philox(key=seed)).beta(self.alpha, self.alpha) for seed in seeds_B]
        return (np.rint(np.array(drawn, np.float64) * _ONE) / _ONE).astype(np.float32)

    def pastes(self, sizes_B2: NDArray[np.int64], weights_B: NDArray[np.float32], words_B: U64) -> NDArray[np.int32]:
        """Return the boxes (top, left, height, width) that the partner's pixels fill, int32 (B, 4).

        Their share of the area is 1 - weight before they are clipped at the edge.
        """
        cut_B1 = np.sqrt(1 - weights_B.astype(np.float64))[:, None]
        half_B2 = np.floor(sizes_B2 * cut_B1) // 2
        centre_B2 = np.floor(uniforms(words_B, _FIRST + CANDIDATES + 1, 2) * sizes_B2)
        first_B2 = np.maximum(centre_B2 - half_B2, 0)
        last_B2 = np.minimum(centre_B2 + half_B2, sizes_B2)
        return np.concatenate([first_B2, last_B2 - first_B2], axis=1).astype(np.int32)


def blend(view_CHW: Tensor, partner_CHW: Tensor, weight: float) -> Tensor:
    """Mixup of two views, uint8 (3, H, W); the partner is resized to the sample's size."""
    own = round(weight * _ONE)
    mine = view_CHW.numpy().astype(np.uint32)
    other = _match_size(partner_CHW, view_CHW).numpy().astype(np.uint32)
    return torch.from_numpy(((mine * own + other * (_ONE - own) + _ONE // 2) >> 16).astype(np.uint8))


def paste(view_CHW: Tensor, partner_CHW: Tensor, box: Sequence[int]) -> Tensor:
    """CutMix of two views, uint8 (3, H, W): replace a box by the same box of the partner, resized to the same size."""
    top, left, height, width = box
    mixed_CHW = view_CHW.clone(memory_format=torch.contiguous_format)
    part = np.s_[:, top : top + height, left : left + width]
    mixed_CHW[part] = _match_size(partner_CHW, view_CHW)[part]
    return mixed_CHW


def share(paste_4: Sequence[int], size: tuple[int, int]) -> float:
    """Return the share of its own pixels that a view keeps, rounded to float32."""
    return float(np.float32(1 - paste_4[2] * paste_4[3] / (size[0] * size[1])))


def _match_size(partner_CHW: Tensor, view_CHW: Tensor) -> Tensor:
    if partner_CHW.shape == view_CHW.shape:
        return partner_CHW
    height, width = view_CHW.shape[-2:]
    image = Image.fromarray(np.ascontiguousarray(partner_CHW.permute(1, 2, 0).numpy()))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1)


def identity(key: str) -> tuple[int, int]:
    """Return the XXH3-128 of a partner's key as stored in a row: two uint64, the lower half first."""
    whole = xxhash.xxh3_128_intdigest(key.encode("utf-8", "surrogatepass"))
    return whole & (2**64 - 1), whole >> 64
