"""Where to compute: one meaning of `--device` for teachers and students."""

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
