"""Device, threads and worker processes: one meaning of `--device`, `--workers` and `--threads`."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from softlabel.errors import UsageError

Choice = Literal["auto", "yes", "no"]
CHOICES: tuple[Choice, ...] = ("auto", "yes", "no")
Optimize = Literal["none", "auto", "folded", "compiled"]

# Each lane holds the activations of one batch: memory bounds their number.
MOST_LANES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """How a run uses the machine. Not part of a store's identity: labels agree up to rounding.

    Attributes:
        threads: threads that compute on a CPU; None: torch's default.
        compile: compile the teachers with `torch.compile`.
        stack: run members of one architecture as one stacked network; auto: if a timed trial is faster.
        members_in_turn: move members to the device one after another; auto: if they do not fit together.
        optimize: compute folded or compiled graphs of the teachers on a CPU; auto: what a timed trial finds fastest.

    Raises:
        UsageError: a value is out of range, or two options exclude each other.
    """

    threads: int | None = None
    compile: bool = False
    stack: Choice = "auto"
    members_in_turn: Choice = "auto"
    optimize: Optimize = "none"

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads: expected at least 1, found {self.threads}")
        for name, value in (("stack", self.stack), ("members_in_turn", self.members_in_turn)):
            if value not in CHOICES:
                raise UsageError(f"{name}: expected {' or '.join(CHOICES)}, found {value!r}")
        if self.compile and self.stack == "yes":
            raise UsageError("stack: compiled members run in turn; leave out --compile or --stack yes")
        if self.optimize != "none":
            for name, excluded in (
                ("compile", self.compile),
                ("stack", self.stack == "yes"),
                ("members_in_turn", self.members_in_turn == "yes"),
            ):
                if excluded:
                    raise UsageError(
                        f"optimize: optimized teachers run side by side, each by its own graph, found {name} with it; "
                        "leave out one of the two options"
                    )
        if self.members_in_turn == "yes" and self.stack == "yes":
            raise UsageError("stack: members that run in turn cannot be stacked; leave out one of the two options")

    def lanes(self, device: torch.device) -> tuple[int, int]:
        """Return (lanes, threads per lane). A lane carries a batch through all steps; a GPU has one lane.

        On a CPU several lanes with few threads each run in parallel: they synchronise less than one lane with many.
        """
        if device.type != "cpu":
            return 1, 1
        threads = self.threads or torch.get_num_threads()
        # Each lane would compile its own copy of the network.
        lanes = 1 if self.compile else min(threads, MOST_LANES)
        return lanes, threads // lanes


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a name; ``auto`` is CUDA if available, else the CPU.

    Raises:
        UsageError: the name is not a device, or this machine does not have it.
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
        raise UsageError(
            f"device: {device} not found, this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return found


def decoders(workers: int | None, device: torch.device) -> int:
    """Return the number of decoding processes; by default 0 on a CPU, whose lanes decode, and up to 8 beside a GPU."""
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a failed allocation, on a device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
