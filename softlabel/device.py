"""Where to compute: one meaning of `--device` and of `--workers` for teachers and students."""

import os

import torch

from softlabel.errors import UsageError


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        UsageError: a device that is not there, or not a device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, found {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, found {device!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: {device} is not there ({torch.cuda.device_count()} CUDA devices); use --device cpu")
    return found


def decoders(workers: int | None, device: torch.device) -> int:
    """How many processes decode, where nobody says: a CPU model uses every core already, beside a GPU they are free."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
