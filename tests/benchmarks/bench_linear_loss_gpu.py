"""The fused linear and distillation loss on a CUDA device: python -m tests.benchmarks.bench_linear_loss_gpu

bf16, forward and backward to hidden states and matrix, top-k 64 at T = 1, soft 0.9, hard 0.1. "two steps" is
`distillation_loss` of `F.linear`. Peak memory is what a step allocates beside its inputs; the hidden states, the matrix
and its gradient in bf16 are 0.1, 1.1 and 1.1 GB of N = 8192. Liger's fused Jensen-Shannon divergence of the same sizes
has a peak of 8.7 GB with its inputs, eager code 56.4 GB.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss import TopKTarget, distillation_loss, linear_distillation_loss
from tests.benchmarks.accelerator import Bench, run_benchmark

CLASSES, WIDTH, KEPT = 128_256, 4096, 64
KD = {"temperature": 1.0, "soft_weight": 0.9, "hard_weight": 0.1}
ROWS = (8192, 1024)
FIGURES = tuple(
    f"linear loss bf16 N={rows}: {what}" for rows in ROWS for what in ("peak memory, GB", "time of two steps")
)


def peak_gigabytes(bench: Bench, step: object) -> float | None:
    if not bench.cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()  # type: ignore[operator]
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def measure(bench: Bench) -> None:
    for rows in ROWS:
        name = f"linear loss bf16 N={rows}"
        if not bench.has_time(name, 15):
            continue
        n, classes, width = bench.pick(rows, 4), bench.pick(CLASSES, 100), bench.pick(WIDTH, 8)
        hidden_ND = torch.randn(n, width, device=bench.device, dtype=torch.bfloat16).requires_grad_()
        weight_CD = torch.randn(classes, width, device=bench.device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
        labels_N = torch.randint(0, classes, (n,), device=bench.device)
        target = TopKTarget(
            index=torch.randint(0, classes - KEPT, (n, 1), device=bench.device)
            + torch.arange(KEPT, device=bench.device),
            value=-torch.rand(n, KEPT, device=bench.device).cumsum(1).half(),
            tail=torch.full((n, 1), -1.0, device=bench.device),
            tail_temperatures=(1.0,),
            temperature=1.0,
            num_classes=classes,
        )

        def step(loss: Tensor, hidden_ND: Tensor = hidden_ND, weight_CD: Tensor = weight_CD) -> None:
            hidden_ND.grad = weight_CD.grad = None
            loss.backward()

        def fused(given: tuple[Tensor, Tensor] = (hidden_ND, weight_CD), rest: tuple = (target, labels_N)) -> None:
            step(linear_distillation_loss(*given, None, *rest, **KD))

        def two_steps(given: tuple[Tensor, Tensor] = (hidden_ND, weight_CD), rest: tuple = (target, labels_N)) -> None:
            step(distillation_loss(F.linear(*given), *rest, **KD))

        fused()
        peak, other = peak_gigabytes(bench, fused), peak_gigabytes(bench, two_steps)
        note = "" if other is None else f"two steps {other:.1f} GB"
        goal = {"goal": 9.0} if rows == max(ROWS) else {}
        bench.report(f"{name}: peak memory, GB", peak, bound="at most", note=note, **goal)
        times = bench.milliseconds({"fused": fused, "two steps": two_steps}, repeats=5, warmup=1)
        note = f"{times['fused']:.1f} ms of {times['two steps']:.1f} ms"
        goal = {"goal": 1.0} if rows == max(ROWS) else {}
        bench.report(
            f"{name}: time of two steps", times["fused"] / times["two steps"], bound="at most", note=note, **goal
        )


if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
