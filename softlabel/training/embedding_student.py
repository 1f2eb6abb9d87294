"""A student that learns from its teacher's embedding too, see `EmbeddingObjective`.

Legend: B batch, C classes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softlabel.common.activation import Activation
from softlabel.loss import LossComponents
from softlabel.training import rng, run_folder
from softlabel.training.batch_term import BatchTerm
from softlabel.training.beside import Beside, Outputs, Watched
from softlabel.training.embedding_losses import EMBEDDING_LOSSES
from softlabel.training.embedding_objective import EmbeddingObjective
from softlabel.training.metrics import Sums
from softlabel.training.row_student import RowStudent, StudentRows
from softlabel.training.step import Counts, RowStep
from softlabel.training.student_tap import Size, StudentTap


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingParts:
    """What a student has for a loss on its embedding.

    Attributes:
        tap: takes its embedding.
        beside: what is trained beside it.
        teacher_sizes: of the teacher's maps of attention.
    """

    tap: StudentTap
    beside: Beside
    teacher_sizes: tuple[Size, ...] = ()


class EmbeddingStudent(RowStudent):
    """See `Student`.

    Args:
        parts: what it has for the loss on its embedding.
    """

    def __init__(self, *given: Any, parts: EmbeddingParts, **settings: Any) -> None:
        self._parts = parts
        super().__init__(*given, **settings)
        assert self.config.embedding_loss != "none"
        self._embedding = EmbeddingObjective(
            EMBEDDING_LOSSES[self.config.embedding_loss],
            parts.beside,
            ranks=self.ranks,
            sizes=parts.tap.sizes,
            teacher_sizes=parts.teacher_sizes,
        )
        self._step: RowStep | None = None  # that is made
        self._outputs: list[Outputs] = []  # of the parts that have gone forward
        self._term: BatchTerm | None = None  # of a step that has several parts

    def _make_forward(self) -> nn.Module:
        watched = Watched(self.model, self._parts.beside.to(self.device), self._parts.tap.watch)
        # They are equal in all processes, and a memory is large.
        ignored = [f"beside.{name}" for name, _ in self._parts.beside.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            watched, ignored
        )
        return watched

    def _list_trained(self) -> list[nn.Parameter]:
        return [*super()._list_trained(), *self._parts.beside.parameters()]

    @property
    def is_of_batch(self) -> bool:
        return super().is_of_batch or self._embedding.is_of_batch

    # ---- steps ----

    def _advance(self, work: RowStep) -> None:
        self._step = work
        super()._advance(work)
        self._step = self._term = None

    def _forward_pass(self, rows: StudentRows) -> Any:
        answer, outputs = rows.inputs.call(partial(self._forward, rows.batch.embedding))
        self._outputs.append(outputs)
        return answer

    def _note_batch(self, logits_BC: Tensor, work: RowStep) -> None:
        super()._note_batch(logits_BC, work)
        whole = tuple(torch.cat(parts) for parts in zip(*self._outputs, strict=True))
        self._outputs.clear()
        if self._embedding.is_of_batch:
            self._term = self._embedding.measure_batch(whole, work.batch, work.negatives)

    def find_losses(self, logits_BC: Tensor, rows: StudentRows, here: Counts, whole: Counts) -> LossComponents:
        losses = super().find_losses(logits_BC, rows, here, whole)
        outputs, step = self._outputs.pop(), self._step
        assert step is not None
        scale = self.config.embedding_weight * self.ranks.world_size
        share = here.embedded / max(whole.embedded, 1)
        if self._embedding.is_of_batch:
            term = self._term.take(rows.part) if self._term is not None else None
            term = term or self._embedding.measure_batch(outputs, rows.batch, step.negatives)
            value, added = term.value, term.attach(outputs, scale=scale, share=share)
        else:
            value = self._embedding.measure_rows(outputs, rows.batch)
            added = scale * share * value
        self._sums.add_term(Sums.EMBEDDING, here.embedded, value.detach())
        return LossComponents(losses.total + added, losses.soft, losses.hard)

    def note_step(self) -> None:
        self._parts.beside.finish_step(self.model)
        super().note_step()

    # ---- files ----

    def _state(self, random: list[rng.State], sums: list[float]) -> dict[str, Any]:
        return {**super()._state(random, sums), "beside": self._parts.beside.state_dict()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._parts.beside.load_state_dict(state["beside"])

    def _keep_best(self) -> None:
        super()._keep_best()
        run_folder.save_weights(self.folder / run_folder.BEST_PROJECTOR, self._parts.beside)

    def publish(self, num_classes: int, activation: Activation) -> None:
        beside = self._parts.beside
        if self.shared.select == "best":
            run_folder.load_weights(self.folder / run_folder.BEST_PROJECTOR, beside)
        if any(True for _ in beside.parameters()):
            run_folder.save_parameters(self.folder / run_folder.PROJECTOR, beside)
        super().publish(num_classes, activation)
