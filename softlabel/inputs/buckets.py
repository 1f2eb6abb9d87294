"""Samples of several lengths, padded to buckets: a sample is always computed at the length of its own bucket, never at
that of the longest sample beside it, so that what a network answers does not depend on the batch.

Legend: B batch, L positions.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from softlabel.errors import SpecError
from softlabel.inputs.base import Inputs, InputTransform


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketTransform(InputTransform):
    """Samples that are padded on the right to `max_length`, and cut to the length of a bucket as a batch.

    Attributes:
        max_length: positions of a sample; the rest is left out.
        pad_id: what fills up.
        lengths: the buckets, ascending; the last is `max_length`.
    """

    max_length: int
    pad_id: int = 0
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        lengths = self.lengths or default_buckets(self.max_length)
        if list(lengths) != sorted(set(lengths)) or lengths[0] < 1 or lengths[-1] != self.max_length:
            raise SpecError(
                f"buckets: expected ascending lengths that end with max_length, {self.max_length}, found "
                f"{','.join(map(str, lengths))}"
            )
        object.__setattr__(self, "lengths", tuple(lengths))

    @property
    def norm(self) -> Hashable:
        """Nothing is left for the device."""
        return None

    @property
    def fixes_size(self) -> bool:
        """Samples of every length come out with the same one."""
        return True

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that a batch may have."""
        return self.lengths

    def _fill(self, values: ArrayLike, padding: int, dtype: type[np.integer[Any]]) -> Tensor:
        # A tensor out of a list takes ten times as long as one out of an array.
        filled = np.full(self.max_length, padding, dtype)
        array = np.asarray(values, dtype)
        filled[: len(array)] = array
        return torch.from_numpy(filled)

    def bucket_of(self, inputs: Inputs) -> Tensor:
        """int64 (B,): the shortest bucket that holds all positions of a sample."""
        lengths_B = inputs.tensors["attention_mask"].sum(dim=1)
        buckets = torch.tensor(self.lengths, device=lengths_B.device)
        return buckets[torch.searchsorted(buckets, lengths_B)]

    def cut(self, inputs: Inputs, bucket: int | None = None) -> Inputs:
        """A batch at the length of a bucket, or of the longest that a sample of it needs."""
        length = int(self.bucket_of(inputs).max()) if bucket is None else bucket
        return replace(inputs.map(lambda tensor: tensor[:, :length]), truncated=inputs.truncated)

    def finish(self, inputs: Inputs) -> Inputs:
        """As int64, which networks take."""
        return inputs.map(Tensor.long)


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Every 4 tokens up to 64, every 8 up to 128, every 16 up to 256, and so on."""
    lengths, length = [8], 8
    while length < max_length:
        length += max(4, 1 << (length.bit_length() - 4))
        lengths.append(length)
    return (*takewhile(lambda one: one < max_length, lengths), max_length)
