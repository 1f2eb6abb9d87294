"""Which students, and stacks of them, make their steps as CUDA graphs, as `TrainConfig.step` says.

The first step of each is an eager one. Once a second batch of the same shape is there, a graph is compared with eager
steps: what a few steps, of both batches, change in weights, buffers and the optimiser's mean of gradients. With `auto`
both ways are timed too, and what was found is written down, so that the run, when it is resumed, keeps to it. The
students are afterwards as they were before. A batch of another shape, such as the last one of an epoch, makes its step
eagerly.
"""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softlabel.errors import UsageError, one_line
from softlabel.training import run_folder
from softlabel.training.choices import read_choices, synchronize, write_choices
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.embedding_student import EmbeddingStudent
from softlabel.training.row_student import RowStudent, StudentRows
from softlabel.training.stack import Stack
from softlabel.training.static_step import Capture, Learner, StaticStep, capture_graph, describe, list_students
from softlabel.training.step import Counts, RowStep, Step
from softlabel.training.student import Student

log = logging.getLogger("softlabel")

# How far what a few steps change may be from what eager ones change, as a share of its norm: more than rounding, which
# in half precision is that of every activation, and less than a step of another batch or learning rate.
_FARTHEST = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
_FARTHEST_ADAMW = 5e-2  # of weights: a gradient that is 0 but for rounding moves them as far as any other
_ROUNDS = 3  # of a trial, each way
_PATIENCE = 8  # steps until two batches of the same shape have been seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a trial found.

    Attributes:
        students: their names: one, or those of a stack.
        device: its name.
        graph: whether their steps are a CUDA graph.
        graph_ms, eager_ms: milliseconds of a step.
    """

    students: tuple[str, ...]
    device: str
    graph: bool
    graph_ms: float
    eager_ms: float

    def describe(self) -> str:
        """In words, for the log."""
        timed = f"a step takes {self.graph_ms:.2f} ms as a CUDA graph, {self.eager_ms:.2f} ms eagerly"
        return f"{'CUDA graph' if self.graph else 'eager steps'}: {', '.join(self.students)}: {timed}"


@dataclass(slots=True, kw_only=True)
class _LearnerState:
    """The batches that a student or a stack has seen before its trial, and how it makes its steps."""

    learner: Learner
    layout: object
    seen: dict[tuple[Any, ...], StudentRows] = field(default_factory=dict)
    steps: int = 0
    is_eager: bool = False
    static: StaticStep | None = None


class GraphedSteps:
    """The steps of a pass that may be CUDA graphs.

    Args:
        config: of the run.
        ranks: the processes that train.
        students: those that are not finished.
        capture: makes what replays a step.

    Raises:
        UsageError: `step` is graph, and a step cannot be one.
    """

    def __init__(
        self, config: TrainConfig, ranks: Ranks, students: Sequence[Student], capture: Capture = capture_graph
    ) -> None:
        self._capture = capture
        self._must, self._path = config.step == "graph", Path(config.out) / run_folder.STEPS
        self._is_on = config.step != "eager" and bool(students)
        self._recorded: list[Choice] = []
        self._standings: dict[int, _LearnerState] = {}
        reason = None
        if self._is_on and capture is capture_graph and ranks.device.type != "cuda":
            reason = f"a CUDA graph needs a CUDA device, and this run is on {ranks.device.type}"
        elif self._is_on:
            reason = _find_obstacle(config, ranks, students)
        if reason is not None:
            self._is_on = False
            self._leave_out("step", reason)
        if self._is_on:
            is_cuda = ranks.device.type == "cuda"
            self._device = torch.cuda.get_device_name(ranks.device) if is_cuda else ranks.device.type
            self._recorded = read_choices(self._path, Choice) if not self._must and not config.overwrite else []

    def advance(self, students: Sequence[Student], work: Step) -> list[Student]:
        """Make the step of single students.

        Args:
            students: of the pass that are in the epoch of the step, without those that are stacked.
            work: the step.

        Returns:
            Those whose step is still to be made, because steps are eager.
        """
        if not self._is_on:
            return list(students)
        assert isinstance(work, RowStep)
        for student in students:
            if student.failure is None and student.place == (work.epoch, work.step):
                assert isinstance(student, RowStudent)
                with student.drawing():
                    self._advance(student, work)
        return []

    def advance_stack(self, stack: Stack, work: RowStep) -> None:
        """Make the step of a stack."""
        if self._is_on:
            self._advance(stack, work)
        else:
            stack.advance(work)

    def forget(self, stack: Stack) -> None:
        """Release the graph of a stack that makes no more steps."""
        self._standings.pop(id(stack), None)

    def _advance(self, learner: Learner, work: RowStep) -> None:
        ((part, here),) = work.parts
        rows = learner.cut_rows(work, part)
        standing = self._find_standing(learner)
        if standing.static is None and not standing.is_eager:
            self._consider(standing, rows, here, work.whole)
        static = standing.static
        if static is not None and static.signature != describe(rows, here, work.whole):
            static = None
        _make_step(learner, static, rows, here, work.whole)

    def _find_standing(self, learner: Learner) -> _LearnerState:
        found = self._standings.get(id(learner))
        if found is None or found.layout != learner.layout:
            # An earlier graph would change tensors that have been replaced.
            self._standings[id(learner)] = found = _LearnerState(learner=learner, layout=learner.layout)
        return found

    def _consider(self, standing: _LearnerState, rows: StudentRows, here: Counts, whole: Counts) -> None:
        """Choose how steps are made, once that can be known."""
        standing.steps += 1
        signature = describe(rows, here, whole)
        before = standing.seen.setdefault(signature, rows)
        if before is rows:
            if standing.steps < _PATIENCE:
                return
            reason: str | None = (
                f"{_PATIENCE} batches differed in shape, or in how many rows have labels, which a graph holds"
            )
        else:
            reason = self._try_graph(standing, (rows, before, rows), here, whole)
        standing.seen.clear()
        if standing.static is None:
            standing.is_eager = True
            if reason is not None:
                self._leave_out(f"step: {', '.join(_list_names(standing.learner))}", reason)

    def _try_graph(
        self, standing: _LearnerState, batches: Sequence[StudentRows], here: Counts, whole: Counts
    ) -> str | None:
        """Compare a graph with eager steps, and take it if it is equal and, where that matters, faster; else why not.

        Args:
            batches: of a few steps, all of one shape.
        """
        learner, names = standing.learner, _list_names(standing.learner)
        earlier = [one for one in self._recorded if set(names) <= set(one.students) and one.device == self._device]
        if earlier and not earlier[-1].graph:
            log.info("%s, by an earlier trial", earlier[-1].describe())
            return None
        if isinstance(learner, Stack) and not learner.is_capturable:
            return "its students have different optimisers"
        rounds = 0 if earlier or self._must else _ROUNDS
        students = list_students(learner)
        with contextlib.ExitStack() as tried:
            for student in students:
                tried.enter_context(student.trying_in_place())
            eager, eager_ms = _measure_changes(learner, None, batches, here, whole, rounds)
        for student in students if isinstance(learner, RowStudent) else ():
            student.set_capturable(True)
        reason = None
        with contextlib.ExitStack() as tried:
            for student in students:
                tried.enter_context(student.trying_in_place())
            static = StaticStep(learner, batches[0], here, whole)
            try:
                with learner.drawing():
                    static.capture(self._capture)
            except Exception as error:  # user code, or a library, that looks at the device or waits for it
                reason = f"a step cannot be captured as a CUDA graph ({one_line(error)})"
        if reason is None:
            with contextlib.ExitStack() as tried:
                for student in students:
                    tried.enter_context(student.trying_in_place())
                graphed, graph_ms = _measure_changes(learner, static, batches, here, whole, rounds)
            reason = _find_difference(students, eager, graphed)
        is_faster = True
        if reason is None and rounds:
            is_faster = graph_ms < eager_ms
            self._record(names, is_faster, graph_ms, eager_ms)
        if reason is None and is_faster:
            log.info("CUDA graph: %s", ", ".join(names))
            standing.static = static
        else:
            for student in students:
                student.set_capturable(False)
        return reason

    def _record(self, names: tuple[str, ...], is_faster: bool, graph_ms: float, eager_ms: float) -> None:
        choice = Choice(students=names, device=self._device, graph=is_faster, graph_ms=graph_ms, eager_ms=eager_ms)
        log.info("%s", choice.describe())
        self._recorded.append(choice)
        write_choices(self._path, self._recorded)

    def _leave_out(self, subject: str, reason: str) -> None:
        if self._must:
            raise UsageError(f"{subject}: expected eager or auto, found graph: {reason}; leave --step out")
        log.info("%s: eager: %s", subject, reason)


def _find_obstacle(config: TrainConfig, ranks: Ranks, students: Sequence[Student]) -> str | None:
    """Why no step of a run can be a CUDA graph, as far as its settings say; None: nothing is known."""
    if ranks.several:
        return "several processes exchange their gradients within a step"
    if config.accumulate > 1:
        return f"--accumulate {config.accumulate} makes several passes of a step, and a graph has one"
    if not all(isinstance(student, RowStudent) for student in students):
        return "the positions that count differ from batch to batch of a language model"
    if any(isinstance(student, EmbeddingStudent) for student in students):
        return "a loss on embeddings looks at what counts in each batch"
    if any(student.config.difference_weight for student in students):
        return "differences along noise take passes of their own"
    if any(student.config.optimizer == "dot" for student in students):
        return "optimizer dot takes two gradients of a step, and a graph has one"
    if any(student.config.soft_warmup for student in students):
        return "--soft-warmup changes the weight of the soft term, which a graph holds"
    return None


def _list_names(learner: Learner) -> tuple[str, ...]:
    return tuple(student.config.name for student in list_students(learner))


def _make_step(learner: Learner, static: StaticStep | None, rows: StudentRows, here: Counts, whole: Counts) -> None:
    learner.begin_step()
    if static is not None:
        static.make(rows)
    else:
        learner.learn(rows, here, whole)
        if isinstance(learner, Stack):
            learner.prepare()
        learner.change()
    learner.note_step()


def _measure_changes(
    learner: Learner,
    static: StaticStep | None,
    batches: Sequence[StudentRows],
    here: Counts,
    whole: Counts,
    rounds: int,
) -> tuple[list[dict[str, Tensor]], float]:
    """What a step of each batch changes, and the milliseconds of one in `rounds` repetitions (0 without any)."""
    students = list_students(learner)
    before = [_flatten_state(student) for student in students]

    def make() -> None:
        for rows in batches:
            with learner.drawing():
                _make_step(learner, static, rows, here, whole)

    make()
    after = [_flatten_state(student) for student in students]
    changes = [{name: one[name] - old[name] for name in one} for one, old in zip(after, before, strict=True)]
    times = []
    for _ in range(rounds):
        synchronize(students[0].device)
        started = time.perf_counter()
        make()
        synchronize(students[0].device)
        times.append(1e3 * (time.perf_counter() - started) / len(batches))
    return changes, statistics.median(times) if times else 0.0


def _flatten_state(student: RowStudent) -> dict[str, Tensor]:
    """What steps change of a student, float64."""
    means = [state.get("momentum_buffer", state.get("exp_avg")) for state in student.optimizer.state.values()]
    parts: dict[str, list[Tensor]] = {
        "weights": [*student.model.parameters()],
        "buffers": [*student.model.buffers()],
        "mean of gradients": [one for one in means if one is not None],
    }
    return {name: torch.cat([one.detach().double().ravel() for one in some]) for name, some in parts.items() if some}


def _find_difference(
    students: Sequence[RowStudent], eager: Sequence[dict[str, Tensor]], other: Sequence[dict[str, Tensor]]
) -> str | None:
    """Why steps are not the eager ones, by what they have changed of each student; None: they are."""
    for student, one, found in zip(students, eager, other, strict=True):
        for name, change in one.items():
            if not change.isfinite().all():  # a loss that is not finite ends the student either way
                continue
            is_adamw = student.config.optimizer == "adamw"
            farthest = _FARTHEST_ADAMW if is_adamw and name == "weights" else _FARTHEST[student.precision]
            off, whole = float((change - found[name]).norm()), float(change.norm())
            if not off <= farthest * whole:
                return (
                    f"what steps of a graph change in its {name} differs from what eager ones change by "
                    f"{off / whole if whole else math.inf:.2g} of its norm, more than {farthest:g}"
                )
    return None
