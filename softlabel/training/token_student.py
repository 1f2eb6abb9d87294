"""A student that is a language model: it learns from every position of documents that counts.

Its logits exist for a chunk of positions at a time, where the loss, its gradient and the figures of the epoch are
computed from them (`softlabel.loss.linear`); those of a network without a last layer of its own, for all of a batch.

Legend: B lines, L positions of a line, P positions that count, R of a chunk, V tokens of the vocabulary, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from softlabel.evaluation.language import compute_hidden
from softlabel.inputs.base import IGNORE
from softlabel.loader.token_batch import TokenBatch
from softlabel.loss import LossComponents, distillation_loss_components
from softlabel.loss.linear import Observe, linear_distillation_loss_components
from softlabel.loss.targets import Target, make_empty_target
from softlabel.models import LanguageModel
from softlabel.models.precision import computing
from softlabel.training.metrics import Sums
from softlabel.training.objective import weigh_terms
from softlabel.training.step import Counts, sum_teacher
from softlabel.training.student import Student
from softlabel.training.token_step import TokenPart, TokenStep


class _TokenLoss(nn.Module):
    """The loss of a language model on a batch: all of its parameters are used within one call, as
    DistributedDataParallel wants it."""

    def __init__(self, model: LanguageModel, *, packed: bool) -> None:
        super().__init__()
        self.model, self._packed = model, packed

    def forward(
        self,
        batch: TokenBatch,
        *,
        temperature: float,
        soft_weight: float,
        hard_weight: float,
        label_smoothing: float,
        observe: Observe,
    ) -> LossComponents:
        model, target = self.model, batch.target if soft_weight > 0 else None
        hidden_PD = compute_hidden(model, batch, packed=self._packed)
        settings: dict[str, Any] = {
            "temperature": temperature,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "label_smoothing": label_smoothing,
        }
        soft_mask = batch.has_target if soft_weight > 0 else None
        if model.last_layer is None:  # these are the logits already
            observe(*_choose_counted(hidden_PD.detach(), target, soft_mask, hard_weight))
            if target is None:
                target = make_empty_target(len(hidden_PD), model.vocabulary.size, temperature, hidden_PD.device)
            return distillation_loss_components(hidden_PD, target, batch.hard_labels, soft_mask=soft_mask, **settings)
        return linear_distillation_loss_components(
            hidden_PD,
            model.head_weight,
            model.head_bias,
            target,
            batch.hard_labels,
            soft_mask=soft_mask,
            logit_scale=model.logit_scale,
            softcap=model.softcap,
            observe=observe,
            **settings,
        )


def _choose_counted(
    logits_PV: Tensor, target: Target | None, soft_mask: Tensor | None, hard_weight: float
) -> tuple[slice | Tensor, Tensor, Target | None]:
    """The positions that have a share in the loss, their logits in float32 and their targets."""
    if soft_mask is None or hard_weight != 0:
        return slice(None), logits_PV.float(), target
    counted = soft_mask.nonzero()[:, 0]
    return counted, logits_PV[counted].float(), None if target is None else target.take(counted)


class TokenStudent(Student):
    """See `Student`.

    Args:
        packed: whether a line may have several documents.
    """

    model: LanguageModel

    def __init__(self, *given: Any, packed: bool, **settings: Any) -> None:
        self._packed = packed
        super().__init__(*given, **settings)

    def _make_forward(self) -> nn.Module:
        return _TokenLoss(self.model, packed=self._packed)

    def _backward(self, work: TokenStep, part: TokenPart, here: Counts) -> None:
        batch = work.batch.take(part.lines, part.places) if len(work.parts) > 1 else work.batch
        soft_weight, hard_weight = weigh_terms(
            self.config, here, work.whole, epoch=work.epoch, world_size=self.ranks.world_size
        )
        figures = _Figures(batch, self.device)
        with computing(self.precision, self.device):
            losses: LossComponents = self._forward(
                batch,
                temperature=self.temperature,
                soft_weight=soft_weight,
                hard_weight=hard_weight,
                label_smoothing=self.config.label_smoothing,
                observe=figures.add,
            )
        self._scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
        correct, agreed, labelled = figures.of_student
        self._add_sums(losses, here, work.whole, correct, agreed, labelled=labelled, teacher_sums=figures.of_teacher)


class _Figures:
    """Sums over the positions of a part of a batch that the loss is of: where the student's most probable token is the
    next one, where it is the teacher's, and where there is a next one; and what `Sums.TEACHER` names."""

    def __init__(self, batch: TokenBatch, device: torch.device) -> None:
        self._labels_P, self._has_target_P = batch.hard_labels, batch.has_target
        self.of_student = torch.zeros(3, dtype=torch.float64, device=device)
        self.of_teacher = torch.zeros(len(Sums.TEACHER), dtype=torch.float64, device=device)

    def add(self, rows: slice | Tensor, logits_RV: Tensor, target: Target | None) -> None:
        """Count a chunk; see `Observe`."""
        best_R, labels_R = logits_RV.argmax(dim=1), self._labels_P[rows]
        agreed = torch.zeros((), device=best_R.device)
        has_target_R = None if self._has_target_P is None else self._has_target_P[rows]
        if target is not None and (teacher := sum_teacher(target, has_target_R, labels_R)) is not None:
            top_R, sums = teacher
            self.of_teacher += sums
            agreed = (best_R == top_R).sum()
        found = ((best_R == labels_R).sum(), agreed, (labels_R != IGNORE).sum())
        self.of_student += torch.stack([one.double() for one in found])
