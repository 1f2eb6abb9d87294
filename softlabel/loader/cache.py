"""Decoded images, kept in memory so that every epoch after the first decodes nothing.

Legend: H and W pixels, N images.
"""

import mmap
import multiprocessing
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]


class PixelCache:
    """N decoded images of one size, in memory that forked workers share: each decodes for all the others.

    The memory is an anonymous mapping: pages that were not written cost nothing, and unlike POSIX shared memory it is
    not bounded by the size of /dev/shm. An image is written by whoever decodes it first; an epoch visits a sample
    once, so no two workers write the same one, and a second writer would write the same bytes.
    """

    def __init__(self, images: int, shape: tuple[int, int, int]) -> None:
        pixels = shape[0] * shape[1] * shape[2]
        self._memory = mmap.mmap(-1, images * (pixels + 1))
        flat = np.frombuffer(self._memory, dtype=np.uint8)
        self._pixels: Bytes = flat[: images * pixels].reshape(images, *shape)
        self._known: Flags = flat[images * pixels :].view(np.bool_)

    @staticmethod
    def fits(images: int, shape: tuple[int, int, int], *, budget: int, workers: int) -> bool:
        """Whether a cache of this size stays in `budget` bytes and would reach the workers."""
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            return False
        return images * (shape[0] * shape[1] * shape[2] + 1) <= budget

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins empty: shared memory cannot travel, and images can be decoded again."""
        return PixelCache, (len(self._known), self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._pixels.shape[1:]

    def unknown(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `positions` of the images that nobody has decoded yet."""
        return np.flatnonzero(~self._known[positions])

    def put(self, positions: NDArray[np.int64], images: Bytes) -> None:
        self._pixels[positions] = images
        self._known[positions] = True

    def get(self, positions: NDArray[np.int64]) -> Bytes:
        """A copy of these images, uint8 (B, 3, H, W)."""
        return self._pixels[positions]
