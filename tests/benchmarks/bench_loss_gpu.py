"""The loss on a CUDA device, forward and backward: python -m tests.benchmarks.bench_loss_gpu

Teacher float16 at the loss's temperature, T = 4. Times are medians of CUDA events over runs that take turns, with
256 MB written in between so that nothing is found in the L2 cache. "of copy" is (ideal bytes / time) / (bandwidth of a
device-to-device copy in the same run, both directions counted); the ideal bytes of an element: read the student and the
teacher once, write the gradient once. That time and "times eager" are of steps replayed as CUDA graphs, so that they
speak of the kernels; what the host adds shows in "launched from Python".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss import DenseTarget, TopKTarget, distillation_loss
from tests.benchmarks.accelerator import Bench, Step, run_benchmark

TEMPERATURE, SOFT, HARD, KEPT = 4.0, 0.9, 0.1, 64
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SIZES = ((32768, 1000), (4096, 21841), (1024, 128256), (65536, 10))


def eager_loss(student_NC: Tensor, scaled_NC: Tensor, labels_N: Tensor) -> Tensor:
    p_NC = F.softmax(scaled_NC.float(), dim=1)
    log_q_NC = F.log_softmax(student_NC.float() / TEMPERATURE, dim=1)
    soft = F.kl_div(log_q_NC, p_NC, reduction="batchmean")
    return HARD * F.cross_entropy(student_NC.float(), labels_N) + SOFT * TEMPERATURE**2 * soft


def our_loss(student_NC: Tensor, target: object, labels_N: Tensor, tail: str = "ghost") -> Tensor:
    return distillation_loss(
        student_NC,
        target,
        labels_N,
        temperature=TEMPERATURE,
        soft_weight=SOFT,
        hard_weight=HARD,
        tail=tail,
        impl="triton",
    )


def backward_of(loss: Callable[..., Tensor], student_NC: Tensor, *arguments: object) -> Step:
    def step() -> None:
        student_NC.grad = None
        loss(student_NC, *arguments).backward()

    return step


def as_graph(step: Step, student_NC: Tensor) -> Step:
    """The step as one CUDA graph; what is returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    student_NC.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def extra_memory(step: Step, student_NC: Tensor) -> float:
    """Largest extra memory of one step in units of the gradient."""
    student_NC.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    return extra / (student_NC.numel() * student_NC.element_size())


def measure_dense(bench: Bench, bandwidth: float, dtype: str, rows: int, classes: int) -> None:
    name = f"loss {dtype} C={classes}"
    if not bench.has_time(name, 6):
        return
    rows, classes = bench.pick(rows, 4), bench.pick(classes, 10)
    student_NC = torch.randn(rows, classes, device=bench.device, dtype=DTYPES[dtype]).mul_(3).requires_grad_()
    scaled_NC = torch.randn(rows, classes, device=bench.device, dtype=torch.float16)
    labels_N = torch.randint(0, classes, (rows,), device=bench.device)
    target = DenseTarget(scaled_logits=scaled_NC, temperature=TEMPERATURE, retemperable=False)
    ours = backward_of(our_loss, student_NC, target, labels_N)
    eager = backward_of(eager_loss, student_NC, scaled_NC, labels_N)
    times = bench.milliseconds({"ours": ours, "eager": eager})
    note = f"{times['ours']:.3f} ms, eager {times['eager']:.3f} ms, N = {rows}"
    bench.report(f"{name}: times eager, launched from Python", times["eager"] / times["ours"], note=note)
    if not bench.cuda:
        return
    large = {"goal": 1.02} if classes > 10 else {}
    bench.report(f"{name}: extra memory, gradients", extra_memory(ours, student_NC), bound="at most", **large)
    eager_replayed = bench.milliseconds({"graph": as_graph(eager, student_NC)})["graph"]
    replayed = bench.milliseconds({"graph": as_graph(ours, student_NC)})["graph"]
    large = {"goal": 8.0} if classes > 10 else {}
    bench.report(
        f"{name}: times eager",
        eager_replayed / replayed,
        note=f"{replayed:.3f} ms, eager {eager_replayed:.3f} ms",
        **large,
    )
    moved = rows * classes * (2 * student_NC.element_size() + 2)
    goal = {"goal": 0.80} if classes > 10 else {}
    bench.report(f"{name}: share of copy", moved / (1e-3 * replayed) / bandwidth, note=f"{replayed:.3f} ms", **goal)


def measure_kept(bench: Bench, bandwidth: float, tail: str) -> None:
    name = f"loss float32 top-k {KEPT} ({tail}) C=21841"
    if not bench.has_time(name, 4):
        return
    rows, classes, kept = bench.pick(4096, 4), bench.pick(21841, 100), KEPT
    student_NC = torch.randn(rows, classes, device=bench.device).mul_(3).requires_grad_()
    value_NK, index_NK = torch.randn(rows, classes, device=bench.device).mul_(3).topk(kept, dim=1)
    target = TopKTarget(
        index=index_NK,
        value=(value_NK - value_NK[:, :1]).half(),
        tail=torch.full((rows, 1), -1.0, device=bench.device),
        tail_temperatures=(TEMPERATURE,),
        temperature=1.0,
        num_classes=classes,
    )
    labels_N = torch.randint(0, classes, (rows,), device=bench.device)
    step = backward_of(our_loss, student_NC, target, labels_N, tail)
    if not bench.cuda:
        step()
        return
    time = bench.milliseconds({"graph": as_graph(step, student_NC)})["graph"]
    share = rows * (classes * 8 + kept * 10) / (1e-3 * time) / bandwidth
    bench.report(f"{name}: share of copy", share, goal=0.80, note=f"{time:.3f} ms")


def measure_compiled(bench: Bench, dtype: str, rows: int, classes: int) -> None:
    name = f"loss {dtype} C={classes}: times compiled"
    if not bench.cuda or not bench.has_time(name, 25):
        return
    student_NC = torch.randn(rows, classes, device=bench.device, dtype=DTYPES[dtype]).mul_(3).requires_grad_()
    scaled_NC = torch.randn(rows, classes, device=bench.device, dtype=torch.float16)
    labels_N = torch.randint(0, classes, (rows,), device=bench.device)
    target = DenseTarget(scaled_logits=scaled_NC, temperature=TEMPERATURE, retemperable=False)
    sides = {
        "ours": backward_of(our_loss, student_NC, target, labels_N),
        "compiled": backward_of(torch.compile(eager_loss, dynamic=False), student_NC, scaled_NC, labels_N),
    }
    times = bench.milliseconds(sides)
    note = f"{times['ours']:.3f} ms, compiled eager {times['compiled']:.3f} ms"
    bench.report(name, times["compiled"] / times["ours"], goal=1.5, note=note)


def measure(bench: Bench) -> None:
    bandwidth = bench.copy_bandwidth()
    for dtype in DTYPES:
        for rows, classes in SIZES:
            measure_dense(bench, bandwidth, dtype, rows, classes)
    for tail in ("ghost", "renormalize"):
        measure_kept(bench, bandwidth, tail)
    measure_compiled(bench, "float32", 32768, 1000)


FIGURES = (
    *(
        f"loss {dtype} C={classes}: {what}"
        for dtype in DTYPES
        for _, classes in SIZES
        for what in ("times eager, launched from Python", "times eager", "extra memory, gradients", "share of copy")
    ),
    *(f"loss float32 top-k {KEPT} ({tail}) C=21841: share of copy" for tail in ("ghost", "renormalize")),
    "loss float32 C=1000: times compiled",
)

if __name__ == "__main__":
    run_benchmark(__doc__, measure, FIGURES)
