"""Decoded samples, kept in memory so that every epoch after the first decodes nothing."""

import math
import mmap
import multiprocessing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.inputs.base import Form, Inputs


class SampleCache:
    """N decoded samples of one shape and type, in memory that forked workers share: each decodes for all the others.

    The memory is an anonymous mapping: pages that were not written cost nothing, and unlike POSIX shared memory it is
    not bounded by the size of /dev/shm. A sample is written by the worker that decodes it first; an epoch visits a
    sample once, so no two workers write the same one, and a second writer would write the same bytes.

    Args:
        samples: N.
        form: of one sample.
    """

    def __init__(self, samples: int, form: Form) -> None:
        self.form = form
        self._memory = mmap.mmap(-1, samples * (sample_bytes(form) + 1))
        flat, at = np.frombuffer(self._memory, dtype=np.uint8), 0
        self._arrays: dict[str, NDArray[Any]] = {}
        # Wide types first: each array then begins at a multiple of its item size.
        for name in sorted(form, key=lambda name: -form[name][1].itemsize):
            shape, dtype = form[name]
            size = samples * math.prod(shape) * dtype.itemsize
            self._arrays[name] = flat[at : at + size].view(_numpy_dtype(dtype)).reshape(samples, *shape)
            at += size
        self._known: NDArray[np.bool_] = flat[at:].view(np.bool_)

    @staticmethod
    def fits(samples: int, form: Form, *, budget: int, workers: int) -> bool:
        """Whether a cache of this size stays in `budget` bytes and would reach the workers."""
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            return False
        return samples * (sample_bytes(form) + 1) <= budget

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins empty: shared memory cannot travel, and samples can be decoded again."""
        return SampleCache, (len(self._known), self.form)

    def unknown(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `positions` of the samples that no process has decoded yet."""
        return np.flatnonzero(~self._known[positions])

    def put(self, positions: NDArray[np.int64], samples: Inputs) -> None:
        assert samples.form == self.form, (samples.form, self.form)
        for name, array in self._arrays.items():
            array[positions] = samples.tensors[name].numpy()
        self._known[positions] = True

    def get(self, positions: NDArray[np.int64]) -> Inputs:
        """A copy of these samples."""
        return Inputs({name: torch.from_numpy(self._arrays[name][positions]) for name in self.form})


def sample_bytes(form: Form) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in form.values())


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
