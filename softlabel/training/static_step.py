"""A step of a student, or of a stack, on tensors that stay where they are, so that a CUDA graph can hold all of it:
forward pass, loss, backward pass, figures, clipping and optimiser.

The host launches a graph once, in place of some hundred kernels. What it changes from step to step is written into the
tensors that the graph reads: the batch, the learning rate, the draws of mixup; the generator of random numbers is the
global one, which torch puts forward by what a graph has drawn. What comes after the weights have changed, such as their
moving average, stays outside.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from softlabel.inputs.base import Inputs
from softlabel.training.row_student import RowStudent, StudentRows
from softlabel.training.stack import Stack
from softlabel.training.step import Counts

Learner: TypeAlias = RowStudent | Stack
Capture: TypeAlias = Callable[
    [Callable[[], None], Callable[[], None], Callable[[], None], torch.device], Callable[[], None]
]

_WARM_UP = 2  # runs outside of the graph, in which libraries take what a graph cannot: handles, memory, kernels


class StaticStep:
    """A step on tensors of its own.

    Args:
        learner: whose step it is.
        rows: whose shapes and types all batches have.
        here, whole: what counts among the rows, of all batches.
    """

    def __init__(self, learner: Learner, rows: StudentRows, here: Counts, whole: Counts) -> None:
        self._learner, self._here, self._whole = learner, here, whole
        self._rows = _copy_rows(rows)
        self._tensors = _list_inputs(self._rows)
        self._replay = self._compute  # until it is captured
        self.signature = describe(rows, here, whole)

    def make(self, rows: StudentRows) -> None:
        """Learn from rows, between `begin_step` and `note_step` of the learner."""
        for mine, one in zip(self._tensors, _list_inputs(rows), strict=True):
            mine.copy_(one, non_blocking=True)
        if isinstance(self._learner, Stack):
            self._learner.prepare()
        self._replay()

    def capture(self, capture: Capture) -> None:
        """Replay the step from here on. Changes what the learner is, and needs a step that was made before."""

        def run() -> None:
            with _mark_capturable(self._learner):
                self._compute()

        self._replay = capture(self._learner.begin_step, self._compute, run, self._rows.batch.labels.device)

    def _compute(self) -> None:
        self._learner.learn(self._rows, self._here, self._whole)
        self._learner.change()


def capture_graph(
    begin: Callable[[], None], warm_up: Callable[[], None], run: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """A CUDA graph of a function, as what replays it.

    Args:
        begin: comes before each run, outside of the graph.
        warm_up: the same work, before it is captured.
        run: what is captured.
        device: where.
    """
    with torch.cuda.device(device):
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                begin()
                warm_up()
        current.wait_stream(stream)
        begin()
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads of the loader may allocate meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
        except Exception:
            # The generator of random numbers takes itself to be captured still, until a capture ends well.
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros((), device=device)
            raise
    return graph.replay


def list_students(learner: Learner) -> tuple[RowStudent, ...]:
    """The student, or those of a stack."""
    return learner.students if isinstance(learner, Stack) else (learner,)


def describe(rows: StudentRows, here: Counts, whole: Counts) -> tuple[Any, ...]:
    """What a step is, but for the numbers in its tensors: batches of which this is equal can be those of one graph."""
    found: list[Any] = [here, whole]
    for name, value in _flatten(_read_parts(rows)):
        if isinstance(value, Tensor):
            found.append((name, value.shape, value.stride(), value.dtype, value.device))
        else:
            found.append((name, value))
    return tuple(found)


def _list_inputs(rows: StudentRows) -> list[Tensor]:
    """The tensors that a step reads and that another batch replaces."""
    return [value for _, value in _flatten(_read_parts(rows)) if isinstance(value, Tensor)]


def _read_parts(rows: StudentRows) -> dict[str, Any]:
    """What a step reads of its rows."""
    batch = rows.batch
    found = {"inputs": rows.inputs.tensors, "labels": batch.labels, "target": batch.target}
    return found | {
        "has_target": batch.has_target,
        "top": rows.top,
        "teacher_sums": rows.teacher_sums,
        "mixup": rows.mixup,
    }


def _copy_rows(rows: StudentRows) -> StudentRows:
    """The rows with tensors of their own."""
    parts = _copy_tensors(_read_parts(rows))
    inputs = Inputs(parts.pop("inputs"))
    of_batch = {name: parts.pop(name) for name in ("labels", "target", "has_target")}
    batch = replace(rows.batch, inputs=inputs.plain, **of_batch)
    return replace(rows, inputs=inputs, batch=batch, **parts)


@contextlib.contextmanager
def _mark_capturable(learner: Learner) -> Iterator[None]:
    """Some optimisers look for this while they are captured, and warn of it elsewhere."""
    groups = [group for student in list_students(learner) for group in student.optimizer.param_groups]
    groups = [group for group in groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors of a record, and all else that it holds, by name."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _flatten(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flatten(one, f"{name}.{key}")
    elif isinstance(value, tuple):
        for number, one in enumerate(value):
            yield from _flatten(one, f"{name}.{number}")
    else:
        yield name, value


def _copy_tensors(value: Any) -> Any:
    """The record with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _copy_tensors(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return {key: _copy_tensors(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_copy_tensors(one) for one in value)
    return value
