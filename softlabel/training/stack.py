"""Students of one architecture as one network: one forward and backward pass for all of them.

Each parameter and buffer of the students lies in one tensor with a leading axis of students, through which
`torch.func.vmap` runs the network once; the tensors of every single student are views of these. So the optimiser, the
average, the checkpoint and the evaluation of a student see the very model that they would see if it trained alone.

Legend: S students, B batch, C classes.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from softlabel.inputs.base import Inputs
from softlabel.models.precision import computing
from softlabel.training.row_student import RowStudent, StudentRows
from softlabel.training.stack_norm import stack_norms
from softlabel.training.stack_optimizer import StackOptimizer
from softlabel.training.step import Counts, RowStep


class Stack:
    """Students that make their steps as one network.

    Args:
        students: of one architecture, that take the same inputs. Their tensors become views of the stack's.
    """

    def __init__(self, students: Sequence[RowStudent]) -> None:
        self.students = tuple(students)
        for student in students:
            student.set_capturable(False)
            student.layout += 1
        models = [student.model for student in students]
        # The computation; its tensors are replaced by the stack's in every call.
        kept = {id(tensor): tensor for tensor in (*models[0].parameters(), *models[0].buffers())}
        self._network = stack_norms(copy.deepcopy(models[0], kept)).train()
        self._owners = _gather([dict(model.named_parameters()) for model in models])
        buffers = _gather([dict(model.named_buffers()) for model in models])
        self._shared = [owner for own in (*self._owners.values(), *buffers.values()) for owner in own]
        self._strides = [owner.stride() for owner in self._shared]
        self._parameters = {name: _share(own) for name, own in self._owners.items()}
        self._buffers = {name: _share(own) for name, own in buffers.items()}
        optimizers = [student.optimizer for student in students]
        self._optimizer: StackOptimizer | None = None  # None: each student's makes its own step
        if StackOptimizer.takes(optimizers):
            self._optimizer = StackOptimizer(self._parameters, self._owners, optimizers)

    def close(self) -> None:
        """Give every student tensors of its own again, in the memory layout that they had."""
        if self._optimizer is not None:
            self._optimizer.close()
        for owner, stride in zip(self._shared, self._strides, strict=True):
            own = torch.empty_strided(owner.shape, stride, dtype=owner.dtype, device=owner.device)
            owner.data, owner.grad = own.copy_(owner.detach()), None
        for student in self.students:
            student.layout += 1

    @property
    def layout(self) -> tuple[int, ...]:
        """Other numbers once tensors of a step have been replaced by others."""
        return tuple(student.layout for student in self.students)

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: the optimisers make it together."""
        return self._optimizer is not None

    def advance(self, work: RowStep) -> None:
        """Make the step of every student."""
        self.begin_step()
        for part, here in work.parts:
            self.learn(self.cut_rows(work, part), here, work.whole)
        self.prepare()
        self.change()
        self.note_step()

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """As of a student; those of a stack draw no random numbers."""
        return contextlib.nullcontext()

    def begin_step(self) -> None:
        """What comes before the forward pass."""
        for student in self.students:
            student.begin_step()
        for leaf in self._parameters.values():
            leaf.grad = None

    def prepare(self) -> None:
        """Bring the numbers of the optimisers' step to the device."""
        if self._optimizer is not None:
            self._optimizer.prepare()

    def change(self) -> None:
        """Change the parameters by their gradients."""
        for name, leaf in self._parameters.items():
            if leaf.grad is not None:
                for owner, grad in zip(self._owners[name], leaf.grad.unbind(), strict=True):
                    owner.grad = grad
        if self._optimizer is None:
            for student in self.students:
                student.change()
            return
        for student in self.students:
            student.clip()
        self._optimizer.step()

    def note_step(self) -> None:
        """What comes once the parameters have changed."""
        for student in self.students:
            student.note_step()

    def cut_rows(self, work: RowStep, part: slice) -> StudentRows:
        """What the students take of a part of a step."""
        return self.students[0].cut_rows(work, part)

    def learn(self, rows: StudentRows, here: Counts, whole: Counts) -> None:
        """See `RowStudent.learn`, of every student."""
        first = self.students[0]
        with computing(first.precision, first.device):
            logits_SBC = self._call(rows.inputs)
        found = []
        for student, logits_BC in zip(self.students, logits_SBC.float().unbind(), strict=True):
            found.append((student, logits_BC, student.find_losses(logits_BC, rows, here, whole)))
        torch.autograd.backward([student.scale(losses) for student, _, losses in found])
        for student, logits_BC, losses in found:
            student.count(rows, here, whole, logits_BC, losses)

    def _call(self, inputs: Inputs) -> Tensor:
        network = self._network

        def call(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
            state = (dict(parameters), dict(buffers))
            return inputs.call(lambda *given, **named: functional_call(network, state, given, named))

        logits_SBC: Tensor = _over_students(call)(self._parameters, self._buffers)
        return logits_SBC


def _over_students(call: Callable[..., Any]) -> Callable[..., Any]:
    # Random numbers would be others than those of each student alone: "error" refuses them.
    mapped: Callable[..., Any] = vmap(call, in_dims=(0, 0), randomness="error")
    return mapped


def _gather(states: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    return {name: [state[name] for state in states] for name in states[0]}


def _share(owners: Sequence[Tensor]) -> Tensor:
    """The values of all owners in one tensor (S, ...), of which each owner's become a view."""
    whole = torch.stack([owner.detach() for owner in owners])
    for owner, view in zip(owners, whole.unbind(), strict=True):
        owner.data = view
    return whole.requires_grad_(owners[0].requires_grad)
