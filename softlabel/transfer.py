"""Between main memory and the device, without the host ever waiting for a batch: no-ops on a CPU.

Legend: B batch, H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SLOTS = 2  # one batch is copied while the one before it is computed


class Upload:
    """Brings batches to a device: through pinned memory, on a stream of its own, beside the forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copied = [_event() for _ in range(_SLOTS)]
            self._pinned: list[dict[int, Tensor]] = [{} for _ in range(_SLOTS)]
            self._turn = 0

    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Tensors (B, 3, H, W) on the device, ready for what the current stream does next."""
        if self.device.type != "cuda":
            return list(images)
        self._turn = (self._turn + 1) % _SLOTS
        copied, pinned = self._copied[self._turn], self._pinned[self._turn]
        copied.synchronize()  # the copy out of this slot's memory, two batches ago
        current = torch.cuda.current_stream(self.device)
        there = []
        for place, images_BCHW in enumerate(images):
            if place not in pinned or pinned[place].shape != images_BCHW.shape:
                pinned[place] = torch.empty(
                    images_BCHW.shape, dtype=images_BCHW.dtype, pin_memory=True, memory_format=torch.channels_last
                )
            pinned[place].copy_(images_BCHW)
            with torch.cuda.stream(self._stream):
                there.append(pinned[place].to(self.device, non_blocking=True))
            # Its memory may go to another tensor of the side stream only when the current stream is done with it.
            there[-1].record_stream(current)
        copied.record(self._stream)
        current.wait_event(copied)
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
