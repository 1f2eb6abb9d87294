"""What a precision means, to teachers, students and measurements alike.

fp32 is IEEE single precision: cuDNN's convolutions, and matrix products where a program asks for it, would otherwise
round their inputs to TF32's 10 bits. bf16 and fp16 are autocast.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Each has `fp32_precision`, which holds for the whole process.
_UNITS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.rnn,  # type: ignore[attr-defined]
)


class _Held:
    """How many hold float32 to IEEE precision now, and what the units had before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.before: list[str] = []


_held = _Held()


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 as IEEE single precision, in the whole process, until the last of those that entered leaves.

    Loops enter it once around their threads: the flags belong to the process, so that a thread which saved and restored
    them by itself would restore another thread's. What enters it inside of them, such as `computing`, only counts.
    """
    with _held.lock:
        if _held.count == 0:
            _held.before = [unit.fp32_precision for unit in _UNITS]
            for unit in _UNITS:
                unit.fp32_precision = "ieee"
        _held.count += 1
    try:
        yield
    finally:
        with _held.lock:
            _held.count -= 1
            if _held.count == 0:
                for unit, precision in zip(_UNITS, _held.before, strict=True):
                    unit.fp32_precision = precision


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """The context of a forward pass in this precision: fp32, bf16 or fp16."""
    autocast = torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")
    with ieee_float32(), autocast:
        yield
