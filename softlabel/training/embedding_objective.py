"""What a student's embedding adds to its loss, over all parts and processes of a batch.

Legend: B batch, D width of the teacher's embedding, E of contrasted ones, K negatives, M members.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.inputs.base import IGNORE
from softlabel.loader import Batch
from softlabel.loss import attention_transfer, contrast
from softlabel.training.batch_term import BatchTerm
from softlabel.training.beside import TEMPERATURE, Beside, Contrasted, Outputs
from softlabel.training.distributed import Ranks
from softlabel.training.embedding_losses import EmbeddingLoss
from softlabel.training.step import Negatives
from softlabel.training.student_tap import Size


class EmbeddingObjective:
    """The loss on the embedding of one student.

    Args:
        loss: see `EMBEDDING_LOSSES`.
        beside: what is trained beside the student.
        ranks: the processes over whose batches a loss of a batch as a whole is taken.
        sizes: of the student's maps of attention.
        teacher_sizes: of the teacher's.
    """

    def __init__(
        self,
        loss: EmbeddingLoss,
        beside: Beside,
        *,
        ranks: Ranks,
        sizes: Sequence[Size] = (),
        teacher_sizes: Sequence[Size] = (),
    ) -> None:
        self.loss, self._beside, self._ranks = loss, beside, ranks
        self._sizes, self._teacher_sizes = sizes, teacher_sizes

    @property
    def is_of_batch(self) -> bool:
        """Whether it is about a batch as a whole, and not a mean over its rows."""
        return self.loss.of == "batch"

    def measure_rows(self, outputs: Outputs, batch: Batch) -> Tensor:
        """A loss that is a mean over rows, over those here, with its gradient."""
        teacher, mask = teacher_of(batch, maps=bool(self._sizes)), mask_of(batch, outputs[0].device)
        if self.loss.compare is not None:
            return self.loss.compare(outputs[0], teacher, mask=mask)
        total = outputs[0].new_zeros(())
        theirs = torch.split(teacher, [height * width for height, width in self._teacher_sizes], dim=1)
        ours = torch.split(outputs[0], [height * width for height, width in self._sizes], dim=1)
        for one, other, size, own in zip(ours, theirs, self._sizes, self._teacher_sizes, strict=True):
            if size != own:  # of features of another size only their map is stored
                other = F.adaptive_avg_pool2d(other.reshape(len(other), 1, *own), size).flatten(1)
            total = total + attention_transfer(one, other, mask=mask)
        return total

    def measure_batch(self, outputs: Outputs, batch: Batch, negatives: Negatives | None) -> BatchTerm:
        """A loss of the batch of all processes, whose embeddings each of them gets from the others.

        Args:
            outputs: what is compared, of all rows of this process.
            batch: the same rows.
            negatives: of a loss that has some.
        """
        own = tuple(one.detach().requires_grad_() for one in outputs)
        mask = mask_of(batch, own[0].device)
        if self._ranks.several:  # whether one has rows that do not count, only it knows
            mask = torch.ones(len(batch), dtype=torch.bool, device=own[0].device) if mask is None else mask
            mask = torch.cat(self._ranks.gather_tensor(mask))
        whole = tuple(map(self._ranks.join_tensor, own))
        if (len(batch) if mask is None else int(mask.sum())) < 2:  # nothing to relate
            return BatchTerm(value=own[0].new_zeros(()), gradients=tuple(map(torch.zeros_like, own)))
        with torch.enable_grad():
            if isinstance(self._beside, Contrasted):
                assert negatives is not None
                value = self._contrast(self._beside, whole, batch, negatives, mask)
            else:
                assert self.loss.compare is not None
                teacher = torch.cat(self._ranks.gather_tensor(teacher_of(batch)))
                value = self.loss.compare(whole[0], teacher, mask=mask)
        return BatchTerm(value=value.detach(), gradients=torch.autograd.grad(value, own))

    def _contrast(
        self, beside: Contrasted, whole: Outputs, batch: Batch, negatives: Negatives, mask: Tensor | None
    ) -> Tensor:
        """Both directions of CRD: the student's embeddings against the teacher's, and the other way round."""
        device = whole[0].device
        samples_B, labels_B = (
            torch.cat(self._ranks.gather_tensor(one.to(device))) for one in (batch.samples, batch.labels)
        )
        same_BK = samples_B[:, None] == negatives.samples
        if labels_B.dim() == 1:
            same_BK |= (labels_B[:, None] == negatives.labels) & (labels_B[:, None] != IGNORE)
        with torch.no_grad():
            teacher_KE = beside.embed_teacher(negatives.embedding)
        student_BE, teacher_BE = whole
        total, scales = student_BE.new_zeros(()), []
        for anchors, positives, others, scale in (
            (student_BE, teacher_BE, teacher_KE, beside.scales[0]),
            (teacher_BE, beside.bank[samples_B], beside.bank[negatives.samples], beside.scales[1]),
        ):
            known = scale if beside.is_scaled else None
            value, found = contrast(
                anchors,
                positives,
                others,
                samples=negatives.total,
                scale=known,
                temperature=TEMPERATURE,
                counts_BK=~same_BK,
                mask=mask,
            )
            total = total + value
            scales.append(found.detach())
        beside.keep_scales(torch.stack(scales))
        kept = slice(None) if mask is None else mask
        beside.remember(samples_B[kept], student_BE.detach()[kept])
        return total


def teacher_of(batch: Batch, *, maps: bool = False) -> Tensor:
    """What the teacher's store has of each row, of several members side by side: (B, M * D)."""
    found = batch.attention if maps else batch.embedding
    assert found is not None
    return found.flatten(1)


def mask_of(batch: Batch, device: torch.device) -> Tensor | None:
    """Which rows have something of the teacher, bool (B,); None: all. Filters of labels are about labels alone."""
    there_B = batch.rows >= 0
    return None if bool(there_B.all()) else there_B.to(device)
