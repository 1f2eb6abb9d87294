"""Asynchronous copies between main memory and the device; no-ops on a CPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.inputs.base import Inputs


def pin(batches: Sequence[Inputs]) -> tuple[Inputs, ...]:
    """Copy batches to page-locked memory, for asynchronous copies; torch reuses a block only after its copies."""
    return tuple(inputs.map(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory()) for inputs in batches)


class Upload:
    """Copies batches to a device through page-locked memory, on a separate stream, during the forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batches: Sequence[Inputs]) -> list[Inputs]:
        """Return batches on the device, ready for the current stream."""
        if self.device.type != "cuda":
            return list(batches)
        current = torch.cuda.current_stream(self.device)
        pinned = pin(batches)
        with torch.cuda.stream(self._stream):
            there = [inputs.map(lambda tensor: tensor.to(self.device, non_blocking=True)) for inputs in pinned]
        # The side stream must not reuse the memory before the current stream has finished with it.
        for inputs in there:
            for tensor in inputs.tensors.values():
                tensor.record_stream(current)
        current.wait_stream(self._stream)
        return there


class Download:
    """Tensors being copied to main memory; `get` waits for them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = dict(tensors)
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        if not devices:
            return
        for name, tensor in tensors.items():
            if tensor.device.type == "cuda":
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._tensors[name] = pinned.copy_(tensor, non_blocking=True)
        (device,) = devices
        self._event = _make_event()
        self._event.record(torch.cuda.current_stream(device))

    def get(self) -> dict[str, NDArray[Any]]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        # numpy shares the memory of inference tensors.
        return {name: np.asarray(tensor.numpy()) for name, tensor in self._tensors.items()}


def _make_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
