"""Decoded samples on a device: augmented there, and copied to it once."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.inputs.base import Form, Inputs
from softlabel.loader.cache import sample_bytes
from softlabel.views import CropFlip, Views

_LEFT_FREE = 0.5  # of the memory that is free now: for the network and its activations


class DeviceCache:
    """N decoded samples of one shape and type on a device; the interface is that of `SampleCache`.

    Args:
        samples: N.
        form: of one sample.
        device: where they are kept.
    """

    def __init__(self, samples: int, form: Form, device: torch.device) -> None:
        self.form, self.device = form, device
        self._known = np.zeros(samples, np.bool_)
        self._tensors = {
            name: torch.empty((samples, *shape), dtype=dtype, device=device) for name, (shape, dtype) in form.items()
        }

    def unknown(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in `positions` of the samples that were not decoded yet."""
        return np.flatnonzero(~self._known[positions])

    def put(self, positions: NDArray[np.int64], samples: Inputs) -> None:
        assert samples.form == self.form, (samples.form, self.form)
        there = self._move(positions)
        for name, tensor in self._tensors.items():
            tensor[there] = samples.tensors[name].to(self.device)
        self._known[positions] = True

    def get(self, positions: NDArray[np.int64]) -> Inputs:
        """A copy of these samples, on the device."""
        there = self._move(positions)
        return Inputs({name: tensor[there] for name, tensor in self._tensors.items()})

    def _move(self, positions: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(positions).to(self.device, non_blocking=True)


def open_device_cache(samples: int, form: Form, device: torch.device, *, budget: int) -> DeviceCache:
    """A cache of a whole dataset.

    Args:
        budget: bytes that it may have on the CPU; a GPU gives what is free there, less what training needs.

    Raises:
        UsageError: the samples do not fit.
    """
    size = samples * sample_bytes(form)
    if device.type == "cuda":
        budget = math.floor(torch.cuda.mem_get_info(device)[0] * (1 - _LEFT_FREE))
    if size > budget:
        raise UsageError(
            f"cache: {samples:,} decoded samples take {size / 2**20:,.1f} MiB, found {budget / 2**20:,.1f} MiB for "
            f"them on {device}; leave --cache out"
        )
    return DeviceCache(samples, form, device)


def refuse_views(views: Views) -> None:
    """Raises UsageError for views that are made on the host alone."""
    policy = views.policy
    if policy.transforms or policy.mix is not None or not isinstance(policy.crop, CropFlip | None):
        raise UsageError(
            "cache: on a device views of crop-flip alone are made again, found others, which need libraries of the "
            "host; leave --cache out"
        )
