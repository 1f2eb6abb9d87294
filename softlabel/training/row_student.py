"""A student of samples that have one label each: images, texts, arrays of numbers.

Legend: B batch, C classes, H and W pixels.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softlabel.common.device import out_of_memory
from softlabel.errors import MismatchError, UsageError
from softlabel.inputs.base import Inputs
from softlabel.inputs.transforms import describe_failure
from softlabel.loader import Batch
from softlabel.loss import LossComponents
from softlabel.models.precision import computing
from softlabel.training import rng
from softlabel.training.batch_term import BatchTerm
from softlabel.training.differences import measure_differences
from softlabel.training.dot import Dot
from softlabel.training.metrics import Sums
from softlabel.training.objective import Objective
from softlabel.training.optimizer import rebuild_optimizer
from softlabel.training.step import Counts, RowStep, take
from softlabel.training.student import Student

_NORMALISES_ONE = "more than 1 value per channel"  # what a batch norm says of a single value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StudentRows:
    """What a student takes of a part of a step.

    Attributes:
        part: which rows of the step.
        epoch: from 0.
        inputs: of its network, mixed if there is mixup.
        batch: with the labels.
        top: int64 (B,), as in `RowStep`.
        teacher_sums: as in `RowStep`, with the first part; None with the others.
        mixup: see `Objective.losses`.
        copies: what the network takes of the rows' noisy copies, where a loss is on them.
    """

    part: slice
    epoch: int
    inputs: Inputs
    batch: Batch
    top: Tensor | None
    teacher_sums: Tensor | None
    mixup: tuple[Tensor, Tensor] | None
    copies: Inputs | None = None


class RowStudent(Student):
    """See `Student`."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._objective = Objective(self.config, temperature=self.temperature, ranks=self.ranks)
        self._is_capturable = False
        self.layout = 0  # another number once tensors of a step have been replaced by others
        self._of_batch: BatchTerm | None = None  # of the step that is made, where it has several parts

    @property
    def is_of_batch(self) -> bool:
        """Whether a term of its loss is about a batch as a whole, and not a mean over its rows."""
        return self._objective.is_of_batch

    def _advance(self, work: RowStep) -> None:
        if self.is_of_batch and len(work.parts) > 1:
            self._measure_batch(work)
        super()._advance(work)
        self._of_batch = None

    def _measure_batch(self, work: RowStep) -> None:
        """Find the terms of a batch as a whole whose parts go forward one after the other: once more, without a
        gradient, since that of each part needs what all of them give."""
        self.model.train()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        random, found = rng.state_of(self.device), []
        with torch.no_grad():
            for part, _ in work.parts:
                found.append(self._call(self.cut_rows(work, part)))
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        rng.restore(random, self.device)
        self._note_batch(torch.cat(found), work)

    def _note_batch(self, logits_BC: Tensor, work: RowStep) -> None:
        """Keep the terms of a batch as a whole, whose parts have gone forward, for the step."""
        if self._objective.is_of_batch:
            self._of_batch = self._objective.measure_batch(logits_BC, work.batch)

    def _backward(self, work: RowStep, part: slice, here: Counts) -> None:
        self.learn(self.cut_rows(work, part), here, work.whole)

    def learn(self, rows: StudentRows, here: Counts, whole: Counts) -> None:
        """The forward and backward pass of some rows, and what the epoch's sums get from it.

        Args:
            here, whole: what counts among these rows, and in the batch over all parts and processes.
        """
        try:
            self._compute(rows, here, whole)
        except ValueError as error:
            if _NORMALISES_ONE not in str(error):
                raise
            count = len(rows.inputs)
            images = self.preprocessing.kind == "image"
            remedies = ["a larger --batch-size", "a smaller --accumulate", *(["larger images"] if images else [])]
            raise UsageError(
                f"student {self.config.student}: its batch norm needs at least 2 values of a channel, found 1 "
                f"({count} row in a forward pass{', reduced to 1x1 pixels' if images else ''}); use "
                f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
            ) from None

    def _compute(self, rows: StudentRows, here: Counts, whole: Counts) -> None:
        logits_BC = self._call(rows)
        losses = self.find_losses(logits_BC, rows, here, whole)
        if self.config.difference_weight > 0:
            losses = self._add_differences(losses, rows, here, whole)
        if isinstance(self.optimizer, Dot):
            hard = self._objective.find_hard(logits_BC, rows.batch, here, whole)
            parameters = self.optimizer.parameters
            self.optimizer.add_hard(torch.autograd.grad(hard, parameters, retain_graph=True, allow_unused=True))
        self.scale(losses).backward()  # type: ignore[no-untyped-call]
        self.count(rows, here, whole, logits_BC, losses)

    def end_step(self) -> None:
        if isinstance(self.optimizer, Dot):
            self.ranks.average_tensors(self.optimizer.hard)
        super().end_step()

    def _add_differences(
        self, losses: LossComponents, rows: StudentRows, here: Counts, whole: Counts
    ) -> LossComponents:
        """With the term on the differences along noise."""
        assert rows.copies is not None
        with computing(self.precision, self.device):
            value = measure_differences(self.model, rows.copies, rows.batch)
        self._sums.add_term(Sums.DIFFERENCE, here.embedded, value.detach())
        share = here.embedded * self.ranks.world_size / max(whole.embedded, 1)
        return LossComponents(losses.total + self.config.difference_weight * share * value, losses.soft, losses.hard)

    def _call(self, rows: StudentRows) -> Tensor:
        """The logits (B, C), float32, of a part of a step."""
        with computing(self.precision, self.device):
            try:
                logits_BC = self._forward_pass(rows)
            except Exception as error:  # user code, or samples that it was not made for
                if out_of_memory(error) or _NORMALISES_ONE in str(error):
                    raise
                why = describe_failure(self.preprocessing, rows.inputs, error, network="student")
                raise MismatchError(f"student {self.config.student}: {why}") from error
        return self._checked(logits_BC).float()

    def _forward_pass(self, rows: StudentRows) -> Any:
        """What the network answers."""
        return rows.inputs.call(self._forward)

    def cut_rows(self, work: RowStep, part: slice) -> StudentRows:
        """What the student takes of a part of a step."""
        inputs, batch, top_B = work.inputs[self.preprocessing.norm], work.batch, work.top
        if len(work.parts) > 1:
            inputs, batch, top_B = inputs[part], take(batch, part), None if top_B is None else top_B[part]
        copies = None
        if self.config.difference_weight > 0:
            first, last = part.start * work.count_copies, part.stop * work.count_copies
            copies = work.copies[self.preprocessing.norm][slice(first, last)]
        mixed = None
        mixup = self._objective.mixup(work.epoch, work.step, part, self.device)
        if mixup is not None:
            if not all(tensor.is_floating_point() for tensor in inputs.tensors.values()):
                raise UsageError(
                    f"mixup: mixes images and other fractional numbers, and student {self.config.student} takes whole "
                    "numbers; leave out --mixup"
                )
            share, others = mixup
            inputs = inputs.map(lambda tensor: torch.lerp(tensor[others], tensor, share))
            mixed = torch.tensor([share, 1 - share]).to(self.device, non_blocking=True), others
        return StudentRows(
            copies=copies,
            part=part,
            epoch=work.epoch,
            inputs=inputs,
            batch=batch,
            top=top_B,
            teacher_sums=work.teacher_sums if part.start == 0 else None,
            mixup=mixed,
        )

    def find_losses(self, logits_BC: Tensor, rows: StudentRows, here: Counts, whole: Counts) -> LossComponents:
        """The loss of a part of a step."""
        of_batch = None if self._of_batch is None else self._of_batch.take(rows.part)
        return self._objective.losses(
            logits_BC, rows.batch, here, whole, rows.mixup, epoch=rows.epoch, of_batch=of_batch
        )

    def scale(self, losses: LossComponents) -> Tensor:
        """The loss as its backward pass begins: larger in fp16."""
        scaled: Tensor = self._scaler.scale(losses.total)
        return scaled

    @torch.no_grad()
    def count(self, rows: StudentRows, here: Counts, whole: Counts, logits_BC: Tensor, losses: LossComponents) -> None:
        """Take a part of a step into the figures of the epoch."""
        labels, best_B = rows.batch.labels, logits_BC.argmax(dim=1)
        correct_B = best_B == labels if labels.dim() == 1 else _measure_share_right(logits_BC, labels)
        agreed = 0 if rows.top is None else (best_B == rows.top).sum()
        right = correct_B.sum()
        self._add_sums(losses, here, whole, right, agreed, labelled=here.hard, teacher_sums=rows.teacher_sums)

    # ---- steps as a CUDA graph ----

    def set_capturable(self, capturable: bool) -> None:
        """Make the optimiser one whose step a CUDA graph can hold, or the usual one again."""
        if capturable != self._is_capturable:
            self.optimizer = rebuild_optimizer(self.config, self._list_trained(), self.optimizer, capturable=capturable)
            self._is_capturable = capturable

    def list_tensors(self) -> list[Tensor]:
        """The tensors that steps change."""
        found = [*self.model.parameters(), *self.model.buffers(), self._sums.values]
        for state in self.optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, Tensor)]
        if self.average is not None:
            found += [*self.average.model.parameters(), *self.average.model.buffers()]
        return [tensor.detach() for tensor in found]

    @contextlib.contextmanager
    def trying_in_place(self) -> Iterator[None]:
        """Afterwards the student is as it was before, in the tensors that it had."""
        tensors, scaler = self.list_tensors(), copy.deepcopy(self._scaler.state_dict())
        copies, random, step = [tensor.clone() for tensor in tensors], self._random, self.step
        updates = 0 if self.average is None else self.average.updates
        try:
            yield
        finally:
            for tensor, before in zip(tensors, copies, strict=True):
                tensor.copy_(before)
            self._scaler.load_state_dict(scaler)
            self._random, self.step, self.failure = random, step, None
            if self.average is not None:
                self.average.updates = updates

    def _restore(self, state: dict[str, Any]) -> None:
        self.set_capturable(False)
        self.layout += 1
        super()._restore(state)

    def _checked(self, logits_BC: Any) -> Tensor:
        if not isinstance(logits_BC, Tensor) or logits_BC.dim() != 2:
            shape = tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
            raise MismatchError(f"student {self.config.student}: expected logits (B, C), found {shape}")
        return logits_BC


def _measure_share_right(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Of each row the share of its known labels that the outputs hit at probability 0.5, 0 without any: (B,)."""
    known_BC = labels_BC >= 0
    right_BC = known_BC & ((logits_BC > 0) == (labels_BC > 0))
    return right_BC.sum(dim=1) / known_BC.sum(dim=1).clamp_min(1)
