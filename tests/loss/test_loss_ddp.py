"""The loss under DistributedDataParallel: two gloo processes get the gradient that one gets from the whole batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from softlabel import distillation_loss
from softlabel.loss import DenseTarget

RANKS, ROWS, WIDTH, CLASSES, T = 2, 12, 5, 7, 3.0


def parts() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The same model, inputs, teacher's scaled logits and labels in every process."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    inputs_ND, scaled_NC = torch.randn(ROWS, WIDTH), torch.randn(ROWS, CLASSES)
    return model, inputs_ND, scaled_NC, torch.randint(0, CLASSES, (ROWS,))


def loss_of(logits_NC: Tensor, scaled_NC: Tensor, labels_N: Tensor) -> Tensor:
    target = DenseTarget(scaled_logits=scaled_NC.half(), temperature=T, retemperable=True)
    loss = distillation_loss(logits_NC, target, labels_N, temperature=T, soft_weight=0.9, hard_weight=0.1)
    assert isinstance(loss, Tensor)
    return loss


def rank_main(rank: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    model, inputs_ND, scaled_NC, labels_N = parts()
    wrapped = nn.parallel.DistributedDataParallel(model)
    mine = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    loss_of(wrapped(inputs_ND[mine]), scaled_NC[mine], labels_N[mine]).backward()
    torch.save(model.weight.grad, f"{out}/grad{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_gradient_of_one(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meeting"), str(tmp_path))
    mp.start_processes(rank_main, args=arguments, nprocs=RANKS, start_method="forkserver")
    model, inputs_ND, scaled_NC, labels_N = parts()
    loss_of(model(inputs_ND), scaled_NC, labels_N).backward()
    assert model.weight.grad is not None
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"grad{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, model.weight.grad, rtol=1e-5, atol=1e-6)
