"""Decoded samples, kept in memory so that every epoch after the first decodes nothing."""

import math
import mmap
import multiprocessing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.inputs.base import Inputs

Layout = dict[str, tuple[tuple[int, ...], str]]


class SampleCache:
    """N decoded samples of one shape, in memory that forked workers share: each decodes for all the others.

    The memory is an anonymous mapping: pages that were not written cost nothing, and unlike POSIX shared memory it is
    not bounded by the size of /dev/shm. A sample is written by the worker that decodes it first; an epoch visits a
    sample once, so no two workers write the same one, and a second writer would write the same bytes.

    Args:
        samples: N.
        layout: name of an input -> shape of one sample and NumPy dtype.
    """

    def __init__(self, samples: int, layout: Layout) -> None:
        self.layout = layout
        self._memory = mmap.mmap(-1, samples * (sample_bytes(layout) + 1))
        flat, at = np.frombuffer(self._memory, dtype=np.uint8), 0
        self._arrays: dict[str, NDArray[Any]] = {}
        # Wide types first: each array then begins at a multiple of its item size.
        for name in sorted(layout, key=lambda name: -np.dtype(layout[name][1]).itemsize):
            shape, dtype = layout[name]
            size = samples * math.prod(shape) * np.dtype(dtype).itemsize
            self._arrays[name] = flat[at : at + size].view(dtype).reshape(samples, *shape)
            at += size
        self._known: NDArray[np.bool_] = flat[at:].view(np.bool_)

    @staticmethod
    def fits(samples: int, layout: Layout, *, budget: int, workers: int) -> bool:
        """Whether a cache of this size stays in `budget` bytes and would reach the workers."""
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            return False
        return samples * (sample_bytes(layout) + 1) <= budget

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins empty: shared memory cannot travel, and samples can be decoded again."""
        return SampleCache, (len(self._known), self.layout)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of one sample, as `inputs.batch.shape_of` gives it."""
        shapes = {name: shape for name, (shape, _) in self.layout.items()}
        return (
            next(iter(shapes.values())) if len(shapes) == 1 else tuple((name, *shape) for name, shape in shapes.items())
        )

    def unknown(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `positions` of the samples that no process has decoded yet."""
        return np.flatnonzero(~self._known[positions])

    def put(self, positions: NDArray[np.int64], samples: Inputs) -> None:
        for name, array in self._arrays.items():
            array[positions] = samples.tensors[name].numpy()
        self._known[positions] = True

    def get(self, positions: NDArray[np.int64]) -> Inputs:
        """A copy of these samples."""
        return Inputs({name: torch.from_numpy(self._arrays[name][positions]) for name in self.layout})


def layout_of(samples: Inputs) -> Layout:
    """The layout of a cache for samples like these."""
    return {name: (tuple(tensor.shape[1:]), str(tensor.numpy().dtype)) for name, tensor in samples.tensors.items()}


def sample_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
