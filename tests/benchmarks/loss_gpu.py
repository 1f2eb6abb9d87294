"""The loss on a CUDA device: `python -m tests.benchmarks.loss_gpu` prints the table, with the goals beside it.

Needs torch, triton and this package. Forward + backward, teacher float16 at the loss's temperature, T = 4. Times are
medians of CUDA events over runs that take turns, with a 256 MB buffer written in between so that nothing is found in
the L2 cache. "of copy" is (ideal bytes / time) / (bandwidth of a device-to-device copy, both directions counted, in the
same run); ideal bytes an element: read the student and the teacher once, write the gradient once. Its time is that of a
step replayed as a CUDA graph, so that it speaks of the kernels; every "x" compares steps launched from Python.
"""

import statistics
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss import DenseTarget, TopKTarget, distillation_loss

TEMPERATURE, SOFT, HARD, KEPT = 4.0, 0.9, 0.1, 64
Step = Callable[[], None]
short: list[str] = []


def check(what: str, reached: float, goal: float) -> str:
    if not reached >= goal:
        short.append(f"{what}: {reached:.3g} < {goal:g}")
    return f"{reached:6.2f} (at least {goal:g}){'' if reached >= goal else ' BELOW'}"


def eager_loss(student_NC: Tensor, scaled_NC: Tensor, labels_N: Tensor) -> Tensor:
    p_NC = F.softmax(scaled_NC.float(), dim=1)
    log_q_NC = F.log_softmax(student_NC.float() / TEMPERATURE, dim=1)
    soft = F.kl_div(log_q_NC, p_NC, reduction="batchmean")
    return HARD * F.cross_entropy(student_NC.float(), labels_N) + SOFT * TEMPERATURE**2 * soft


def ours(student_NC: Tensor, target: object, labels_N: Tensor) -> Tensor:
    return distillation_loss(
        student_NC, target, labels_N, temperature=TEMPERATURE, soft_weight=SOFT, hard_weight=HARD, impl="triton"
    )


def milliseconds(sides: Mapping[str, Step], repeats: int = 25) -> dict[str, float]:
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        for _ in range(3):
            side()
    for _ in range(repeats):
        for name, side in sides.items():
            cache.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            side()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes per second, read and written."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    sink = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds({"copy": lambda: sink.copy_(source)})["copy"])


def backward_of(loss: Callable[..., Tensor], student_NC: Tensor, *arguments: object) -> Step:
    def step() -> None:
        student_NC.grad = None
        loss(student_NC, *arguments).backward()

    return step


def as_graph(step: Step, student_NC: Tensor) -> Step:
    """The step as one CUDA graph; what it returns replays it."""
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


def peak_extra(step: Step, student_NC: Tensor) -> float:
    """Largest extra memory of one step in units of the gradient."""
    step()
    student_NC.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    return extra / (student_NC.numel() * student_NC.element_size())


def dense_table(bandwidth: float) -> None:
    compiled = torch.compile(eager_loss, dynamic=False)
    for dtype in (torch.float32, torch.bfloat16):
        for rows, classes in ((65536, 1000), (4096, 21841), (65536, 10)):
            student_NC = torch.randn(rows, classes, device="cuda", dtype=dtype).mul_(3).requires_grad_()
            scaled_NC = torch.randn(rows, classes, device="cuda", dtype=torch.float16)
            labels_N = torch.randint(0, classes, (rows,), device="cuda")
            target = DenseTarget(scaled_logits=scaled_NC, temperature=TEMPERATURE, retemperable=False)
            sides = {
                "ours": backward_of(ours, student_NC, target, labels_N),
                "eager": backward_of(eager_loss, student_NC, scaled_NC, labels_N),
                "compiled": backward_of(compiled, student_NC, scaled_NC, labels_N),
            }
            times = milliseconds(sides)
            replayed = milliseconds({"graph": as_graph(sides["ours"], student_NC)})["graph"]
            bytes_ = rows * classes * (2 * student_NC.element_size() + 2)
            name = f"{str(dtype).removeprefix('torch.')} N={rows} C={classes}"
            share = bytes_ / (1e-3 * replayed) / bandwidth
            by_eager, by_compiled = times["eager"] / times["ours"], times["compiled"] / times["ours"]
            full = dtype == torch.float32
            print(f"{name}: {times['ours']:.3f} ms, as a graph {replayed:.3f} ms")
            if classes > 10:
                print(f"    of copy      {check(name + ' of copy', share, 0.80 if full else 0.70)}")
                print(f"    x eager      {check(name + ' x eager', by_eager, 8 if full else 6)}")
            print(f"    x compiled   {check(name + ' x compiled', by_compiled, 1.5 if classes > 10 else 1.0)}")
            extra = peak_extra(sides["ours"], student_NC)
            print(f"    extra memory {extra:.3f} gradients (at most 1.02)")
            if extra > 1.02:
                short.append(f"{name}: extra memory {extra:.3f}")


def sparse_table(bandwidth: float) -> None:
    rows, classes = 4096, 21841
    student_NC = torch.randn(rows, classes, device="cuda").mul_(3).requires_grad_()
    value_NK, index_NK = torch.randn(rows, classes, device="cuda").mul_(3).topk(KEPT, dim=1)
    target = TopKTarget(
        index=index_NK,
        value=(value_NK - value_NK[:, :1]).half(),
        tail=torch.full((rows, 1), -1.0, device="cuda"),
        tail_temperatures=(TEMPERATURE,),
        temperature=1.0,
        num_classes=classes,
    )
    labels_N = torch.randint(0, classes, (rows,), device="cuda")
    for tail in ("ghost", "renormalize"):

        def loss(student: Tensor, tail: str = tail) -> Tensor:
            options = {"temperature": TEMPERATURE, "soft_weight": SOFT, "hard_weight": HARD, "tail": tail}
            return distillation_loss(student, target, labels_N, impl="triton", **options)

        time = milliseconds({"graph": as_graph(backward_of(loss, student_NC), student_NC)})["graph"]
        share = rows * (classes * 8 + KEPT * 10) / (1e-3 * time) / bandwidth
        print(f"top-k {KEPT} {tail} N={rows} C={classes}: {time:.3f} ms")
        print(f"    of copy      {check(f'top-k {tail} of copy', share, 0.70)}")


def promises() -> None:
    student_NC = torch.randn(512, 1000, device="cuda", requires_grad=True)
    teacher_NC = torch.randn(512, 1000, device="cuda").half()
    labels_N = torch.randint(0, 1000, (512,), device="cuda")
    target = DenseTarget(scaled_logits=teacher_NC, temperature=TEMPERATURE, retemperable=False)
    step = backward_of(ours, student_NC, target, labels_N)
    step()
    first = student_NC.grad.clone()
    same = True
    for _ in range(1000):
        step()
        same = same and torch.equal(student_NC.grad, first)
    record("1000 repeats are bit-identical", same)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        ours(student_NC, target, labels_N).mul(3.0).backward()
        record("no host synchronisation", True)
    except RuntimeError as error:
        record(f"no host synchronisation ({error})", False)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    replay = as_graph(step, student_NC)
    replay()
    student_NC.grad.zero_()
    replay()
    torch.cuda.synchronize()
    record("a CUDA graph replays to the same gradient", torch.equal(student_NC.grad, first))

    with torch.autocast("cuda", torch.bfloat16):
        step()
    record("autocast changes nothing", torch.equal(student_NC.grad, first))


def large() -> None:
    """N * C over 2^31: the last rows against the same rows alone."""
    rows, classes = 2**31 // 21841 + 64, 21841
    student_NC = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    teacher_NC = torch.randn(rows, classes, device="cuda", dtype=torch.float16)
    labels_N = torch.randint(0, classes, (rows,), device="cuda")
    options = {"temperature": TEMPERATURE, "soft_weight": SOFT, "hard_weight": HARD, "reduction": "sum"}
    gradients = []
    for part in (slice(None), slice(-32, None)):
        leaf_NC = student_NC[part].detach().requires_grad_()
        target = DenseTarget(scaled_logits=teacher_NC[part], temperature=TEMPERATURE, retemperable=False)
        distillation_loss(leaf_NC, target, labels_N[part], impl="triton", **options).backward()
        gradients.append(leaf_NC.grad[-32:].clone())
        del leaf_NC
    record(f"N * C = {rows * classes} > 2^31 is right", torch.equal(*gradients))


def record(what: str, holds: bool) -> None:
    print(f"{what}: {'ok' if holds else 'NO'}")
    if not holds:
        short.append(what)


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: every figure is unmeasured")
        return
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {bandwidth / 1e12:.3f} TB/s")
    dense_table(bandwidth)
    sparse_table(bandwidth)
    promises()
    if torch.cuda.mem_get_info()[0] > 40 * 2**30:
        large()
    if short:
        sys.exit("short of the goal: " + "; ".join(short))


if __name__ == "__main__":
    main()
