"""The processes of one run, as `torchrun` starts them: who they are, and how they agree.

Numbers that decide something (counts, sums, flags, errors) travel over gloo between the CPUs, so that no process waits
for its GPU to learn them; gradients travel as DistributedDataParallel sends them.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softlabel.common.device import resolve_device
from softlabel.errors import SoftLabelError, TrainingError, UsageError

T = TypeVar("T")


class Ranks:
    """This process among those that train together; a process alone is rank 0 of 1.

    Where `torchrun` has started several, or the caller has made a process group, they are joined. The end of the
    context leaves a group that was made here.

    Args:
        device: auto, cpu, cuda or cuda:N; of several processes, the GPU of the local rank for auto and cuda.

    Raises:
        UsageError: a device that is not there, or a group that cannot carry both kinds of numbers.
    """

    def __init__(self, device: str) -> None:
        self._made = False
        self.rank, self.world_size = 0, 1
        started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
        if dist.is_available() and (dist.is_initialized() or started):
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if device in ("auto", "cuda") and torch.cuda.is_available():
                device = f"cuda:{local % torch.cuda.device_count()}"
            self.device = resolve_device(device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
                self._made = True
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        else:
            self.device = resolve_device(device)
        if self.several and "gloo" not in dist.get_backend_config():
            raise UsageError(
                f"process group: expected a backend for the CPU too, found {dist.get_backend_config()}; make it with "
                "backend 'cpu:gloo,cuda:nccl', or let train make it"
            )

    @property
    def several(self) -> bool:
        return self.world_size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The numbers of all processes, added up; exact for counts."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist() if self.several else list(values)

    def sum_tensor(self, values: Tensor) -> Tensor:
        """The same for a tensor, which comes back on the CPU."""
        if not self.several:
            return values
        total = values.detach().cpu().clone()
        dist.all_reduce(total)
        return total

    def first(self, action: Callable[[], T]) -> T:
        """What rank 0 gets from an action that it alone does; its error is raised by all."""
        if not self.several:
            return action()
        outcome: list[object] = [None, None]
        failure: SoftLabelError | None = None
        if self.is_first:
            try:
                outcome = [action(), None]
            except SoftLabelError as error:
                failure = error
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if failure is not None:
            raise failure
        if isinstance(outcome[1], SoftLabelError):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, at rank 0; elsewhere what is there of it."""
        if not self.several:
            return [value]
        values: list[T] | None = [value] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values if values is not None else [value]

    def gather_tensor(self, value: Tensor) -> list[Tensor]:
        """The tensors of all processes in the order of their ranks, at each of them, of one shape and on the device."""
        if not self.several:
            return [value]
        sent = value.contiguous()
        values = [torch.empty_like(sent) for _ in range(self.world_size)]
        dist.all_gather(values, sent)
        return values

    def join_tensor(self, own: Tensor) -> Tensor:
        """The same in one tensor, of which this process's part alone has a gradient."""
        found = self.gather_tensor(own.detach())
        return torch.cat([*found[: self.rank], own, *found[self.rank + 1 :]])

    def average_tensors(self, values: Sequence[Tensor]) -> None:
        """Let every process have the mean of the tensors of all, in place."""
        if self.several:
            for value in values:
                dist.all_reduce(value)
                value /= self.world_size

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers (the running statistics of batch norms) of rank 0."""
        if self.several:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def explain(self, error: Exception) -> None:
        """Make a clear error of one that says that another process has gone.

        Raises:
            TrainingError: it does.
        """
        text = str(error)
        if self.several and ("gloo" in text or "NCCL" in text or "Connection" in text or "peer" in text):
            raise TrainingError(
                f"rank {self.rank} of {self.world_size}: another process of this run has ended; its own message says "
                "why, the same command resumes"
            ) from error

    def leave(self) -> None:
        if self._made and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
