"""Between main memory and the device, without the host ever waiting for a batch: no-ops on a CPU.

Legend: B batch, H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pin(images: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same tensors in page-locked memory, from which a device copies beside its work.

    Torch keeps freed page-locked memory, and gives a block away again only when the copies out of it are done.
    """
    return tuple(tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in images)


class Upload:
    """Brings batches to a device: through page-locked memory, on a stream of its own, beside the forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (B, 3, H, W) on the device, ready for what the current stream does next."""
        if self.device.type != "cuda":
            return list(images)
        current = torch.cuda.current_stream(self.device)
        pinned = pin(images)
        with torch.cuda.stream(self._stream):
            there = [tensor.to(self.device, non_blocking=True) for tensor in pinned]
        # Its memory may go to another tensor of the side stream only when the current stream is done with it.
        for tensor in there:
            tensor.record_stream(current)
        current.wait_stream(self._stream)
        return there


class Download:
    """Tensors on their way to main memory; `get` waits for them."""

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
        self._event = _event()
        self._event.record(torch.cuda.current_stream(device))

    def get(self) -> dict[str, NDArray[Any]]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        # numpy knows nothing of inference tensors, and shares their memory.
        return {name: np.asarray(tensor.numpy()) for name, tensor in self._tensors.items()}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
