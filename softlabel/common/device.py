"""Where and with how much of the machine to compute: one meaning of `--device`, `--workers` and `--threads`."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from softlabel.errors import UsageError

Choice = Literal["auto", "yes", "no"]
CHOICES: tuple[Choice, ...] = ("auto", "yes", "no")

# A lane holds a batch's activations, so their number is bounded where cores are not.
MOST_LANES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a run uses the machine. None of it is part of a store's identity: labels agree to rounding whatever it is.

    Attributes:
        threads: that compute on a CPU; None: as many as torch takes.
        compile: whether the teachers go through `torch.compile`.
        stack: whether members of one architecture run as one stacked network; auto: where a timed trial says so.
        members_in_turn: whether members are moved to the device one after the other; auto: where they do not fit.
    """

    threads: int | None = None
    compile: bool = False
    stack: Choice = "auto"
    members_in_turn: Choice = "auto"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads: expected at least 1, found {self.threads}")
        for name, value in (("stack", self.stack), ("members_in_turn", self.members_in_turn)):
            if value not in CHOICES:
                raise UsageError(f"{name}: expected {' or '.join(CHOICES)}, found {value!r}")
        if self.compile and self.stack == "yes":
            raise UsageError("stack: members that are compiled run in turn; leave out --compile or --stack yes")
        if self.members_in_turn == "yes" and self.stack == "yes":
            raise UsageError("stack: members that are moved in turns cannot be stacked; leave out one of the two")

    def lanes(self, device: torch.device) -> tuple[int, int]:
        """(lanes, threads of each). A lane takes a batch through everything; on a CPU several run side by side, each
        with few threads, which wait less for one another than the threads of one do. A GPU has one lane."""
        if device.type != "cpu":
            return 1, 1
        threads = self.threads or torch.get_num_threads()
        # A compiled network is compiled anew for every lane: one is enough for it.
        lanes = 1 if self.compile else min(threads, MOST_LANES)
        return lanes, threads // lanes


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
    """How many processes decode, where nobody says: a CPU's lanes do it themselves, beside a GPU cores are free."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether this says that an allocation failed, on a device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
