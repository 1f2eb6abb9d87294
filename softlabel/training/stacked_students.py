"""Which students of a pass train as one network, see `Stack`: those of one architecture, as `TrainConfig.stack` says.

Before its first step a stack is compared with its students alone, on the batch of that step: gradients and buffers, of
each student. With `auto` a trial then times both ways, and what it found is written down, so that the run, when it is
resumed, keeps to it. The students are afterwards as they were before.
"""

import contextlib
import functools
import logging
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softlabel.common.spec import parse_spec
from softlabel.errors import UsageError, one_line
from softlabel.models import RunModel, network_of
from softlabel.training import run_folder
from softlabel.training.choices import read_choices, synchronize, write_choices
from softlabel.training.config import TrainConfig
from softlabel.training.distributed import Ranks
from softlabel.training.embedding_student import EmbeddingStudent
from softlabel.training.graphed_steps import GraphedSteps
from softlabel.training.grid import students_of
from softlabel.training.parallel_students import ParallelStudents
from softlabel.training.row_student import RowStudent
from softlabel.training.stack import Stack
from softlabel.training.step import RowStep, Step
from softlabel.training.student import Student

log = logging.getLogger("softlabel")

# How far the gradient and the buffers of a student may be from those of the student alone, as a share of their norm:
# more than rounding and the kinks of a network, less than another network.
_FARTHEST = 1e-3
_ROUNDS = 3  # of a trial, each way in turn, or fewer where one is so many times faster:
_CLEAR = 1.5
_RANDOM = "draws random numbers in a step, which would be others in a stack than alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a trial found.

    Attributes:
        students: their names.
        device: cpu or cuda, where it was measured.
        stacked: whether they train as one network.
        stacked_ms: milliseconds of a step of all of them as one network.
        in_turn_ms: the same of each by itself, as many at once as `students_at_once` says.
    """

    students: tuple[str, ...]
    device: str
    stacked: bool
    stacked_ms: float
    in_turn_ms: float

    def describe(self) -> str:
        """In words, for the log."""
        timed = f"a step of all takes {self.stacked_ms:.1f} ms stacked, {self.in_turn_ms:.1f} ms in turn"
        return f"{'stacked' if self.stacked else 'not stacked'}: {', '.join(self.students)}: {timed}"


class StackedStudents:
    """The stacks of a pass.

    Args:
        config: of the run.
        ranks: the processes that train.
        students: those that are not finished.
        graphs: what makes the steps of a stack.

    Raises:
        UsageError: `stack` is on, and a student cannot be stacked.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, students: Sequence[Student], graphs: GraphedSteps) -> None:
        self._graphs = graphs
        self._must, self._is_trial = config.stack == "on", config.stack == "auto"
        self._device, self._path = ranks.device, Path(config.out) / run_folder.STACKS
        self._recorded = read_choices(self._path, Choice) if self._is_trial and not config.overwrite else []
        self._groups: list[list[RowStudent]] = []
        self._stacks: dict[int, Stack] = {}
        self._is_stacked: dict[int, bool] = {}  # of a group that has got a batch
        self._handed_over = False
        if config.stack == "off" or not students:
            return
        groups: dict[object, list[Student]] = {}
        for student in students:
            groups.setdefault((_find_network(student.config.network), student.preprocessing.norm), []).append(student)
        for group in groups.values():
            reason = _find_obstacle(config, ranks, group)
            if reason is not None:
                self._leave_out(group, reason)
            elif len(group) > 1:  # else the others of it are finished
                self._groups.append([student for student in group if isinstance(student, RowStudent)])

    def advance(self, students: Sequence[Student], work: Step, workers: ParallelStudents) -> list[Student]:
        """Make the step of the students that are stacked.

        Args:
            students: of the pass that are in the epoch of the step.
            work: the step.
            workers: what makes the steps of the others.

        Returns:
            The others.
        """
        if not self._groups:
            return list(students)
        assert isinstance(work, RowStep)
        if self._handed_over:  # their steps may be under way
            workers.drain()
        there = {id(student) for student in students}
        done: set[int] = set()
        self._handed_over = False
        for number, group in enumerate(self._groups):
            here = [student for student in group if id(student) in there and student.place == (work.epoch, work.step)]
            here = [student for student in here if student.failure is None]
            if len(here) > 1 and number not in self._is_stacked:
                workers.drain()
                self._is_stacked[number] = self._choose(here, work, workers)
            if len(here) > 1 and self._is_stacked[number]:
                self._graphs.advance_stack(self._stack(number, here), work)
                done |= {id(student) for student in here}
            else:
                if (stack := self._stacks.pop(number, None)) is not None:
                    self._close(stack)
                self._handed_over |= bool(here) and self._is_stacked.get(number, True)
        return [student for student in students if id(student) not in done]

    def _stack(self, number: int, students: list[RowStudent]) -> Stack:
        """The stack of these students of a group: another one once some have ended, or have caught up."""
        stack = self._stacks.get(number)
        if stack is None or [*map(id, stack.students)] != [*map(id, students)]:
            if stack is not None:
                self._close(stack)
            self._stacks[number] = stack = Stack(students)
        return stack

    def _close(self, stack: Stack) -> None:
        stack.close()
        self._graphs.forget(stack)

    def _choose(self, students: list[RowStudent], work: RowStep, workers: ParallelStudents) -> bool:
        """Whether to stack these students of a group, which make their step now."""
        names, device = tuple(student.config.name for student in students), self._device.type
        earlier = [one for one in self._recorded if set(names) <= set(one.students) and one.device == device]
        if earlier and not earlier[-1].stacked:
            log.info("%s, by an earlier trial", earlier[-1].describe())
            return False
        reason = _compare(students, work)
        if reason is not None:
            self._leave_out(students, reason)
            return False
        if earlier or not self._is_trial:
            log.info("stacked: %s", ", ".join(names))
            return True
        stacked_ms, in_turn_ms = self._time(students, work, workers)
        choice = Choice(
            students=names,
            device=device,
            stacked=stacked_ms < in_turn_ms,
            stacked_ms=stacked_ms,
            in_turn_ms=in_turn_ms,
        )
        log.info("%s", choice.describe())
        self._recorded.append(choice)
        write_choices(self._path, self._recorded)
        return choice.stacked

    def _leave_out(self, students: Sequence[Student], reason: str) -> None:
        names = ", ".join(student.config.name for student in students)
        if self._must:
            raise UsageError(f"stack: {names}: cannot be stacked: {reason}; leave --stack out, or give --stack auto")
        log.info("not stacked: %s: %s", names, reason)

    def _time(self, students: list[RowStudent], work: RowStep, workers: ParallelStudents) -> tuple[float, float]:
        """Milliseconds of a step of all students: as one network, and of each by itself."""

        def make_in_turn() -> None:
            workers.advance(students, work)
            workers.drain()

        times: tuple[list[float], list[float]] = ([], [])
        for number in range(1 + _ROUNDS):
            for found, is_stacked in zip(times, (True, False), strict=True):
                with contextlib.ExitStack() as tried:
                    for student in students:
                        tried.enter_context(student.trying())
                    make = make_in_turn
                    if is_stacked:
                        make = functools.partial(tried.enter_context(contextlib.closing(Stack(students))).advance, work)
                    synchronize(self._device)
                    started = time.perf_counter()
                    make()
                    synchronize(self._device)
                    if number > 0:
                        found.append(1e3 * (time.perf_counter() - started))
            if number > 0 and not 1 / _CLEAR < times[0][-1] / times[1][-1] < _CLEAR:
                break
        return statistics.median(times[0]), statistics.median(times[1])


def _find_network(student: str) -> str:
    """The SPEC of a student's network, wherever the weights that it starts from are: in a file, or in a run."""
    return parse_spec(network_of(RunModel(student=student, num_classes=0, preprocessing={})).student).identity


def _find_obstacle(config: TrainConfig, ranks: Ranks, group: Sequence[Student]) -> str | None:
    """Why students of one architecture cannot be stacked, as far as their settings say; None: nothing is known."""
    network = _find_network(group[0].config.network)
    if ranks.several:
        return "several processes train together, whose gradients are exchanged student by student"
    if not all(isinstance(student, RowStudent) for student in group):
        return "the last layer and the loss of a language model are computed together, student by student"
    if any(isinstance(student, EmbeddingStudent) for student in group):
        return "a loss on embeddings trains beside each student, student by student"
    if any(student.config.difference_weight for student in group):
        return "differences along noise take passes of their own, student by student"
    if group[0].precision != "fp32":
        return "autocast does not reach the convolutions of torch.func.vmap; give --precision fp32"
    if config.accumulate > 1 and any(isinstance(one, RowStudent) and one.is_of_batch for one in group):
        return "a loss of a batch as a whole needs the logits of all of its parts first; leave --accumulate out"
    if any(one.config.optimizer == "dot" for one in group):
        return "optimizer dot needs the gradients of two terms of each student"
    if config.compile:
        return "--compile compiles single students"
    if Counter(_find_network(one.network) for one in students_of(config))[network] == 1:
        return "there is no other student of its architecture"
    return None


def _compare(students: Sequence[RowStudent], work: RowStep) -> str | None:
    """Why a stack of the students would not be what they are alone, found by a step of both; None: it is the same."""
    alone = []
    for student in students:
        with student.trying():
            student.advance(work, alone=True)
            alone.append(_copy_step(student))
        if student.draws_random_numbers:
            return _RANDOM
    with contextlib.ExitStack() as tried:
        for student in students:
            tried.enter_context(student.trying())
        try:
            stack = tried.enter_context(contextlib.closing(Stack(students)))
            stack.advance(work)
        except Exception as error:  # user code that vmap has no rules for
            return _RANDOM if "random" in str(error) else f"torch.func.vmap fails on its network ({one_line(error)})"
        found = [_copy_step(student) for student in students]
    for student, one, other in zip(students, alone, found, strict=True):
        for name in ("gradient", "buffers"):
            if not _is_near(one[name], other[name], _FARTHEST):
                return (
                    f"the {name} of student {student.config.name} in a stack differ from those of the student alone by "
                    f"more than {_FARTHEST:g} of their norm"
                )
    return None


def _copy_step(student: Student) -> dict[str, dict[str, Tensor]]:
    """What a step left in a student: its gradient, and its buffers."""
    gradients = {name: own.grad.clone() for name, own in student.model.named_parameters() if own.grad is not None}
    buffers = {name: own.clone() for name, own in student.model.named_buffers()}
    return {"gradient": gradients, "buffers": buffers}


def _is_near(one: dict[str, Tensor], other: dict[str, Tensor], farthest: float) -> bool:
    if one.keys() != other.keys():
        return False
    if not one:
        return True
    flat, near = (torch.cat([state[name].double().ravel() for name in one]) for state in (one, other))
    if not flat.isfinite().all():  # a loss that is not finite ends the student either way
        return True
    return bool((flat - near).norm() <= farthest * flat.norm())
