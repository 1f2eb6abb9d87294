"""What a student minimises on its part of a batch.

Legend: B batch, C classes, H and W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.common.random import stream_key
from softlabel.inputs.base import IGNORE
from softlabel.loader import Batch
from softlabel.loss import LossComponents, distillation_loss_components
from softlabel.loss.reference import scaled_logits
from softlabel.loss.sigmoid import binary_cross_entropy
from softlabel.loss.targets import DenseTarget, SampledTarget, SigmoidTarget, TopKTarget
from softlabel.training.batch_term import BatchTerm
from softlabel.training.distributed import Ranks
from softlabel.training.grid import StudentConfig
from softlabel.training.losses import LOSSES
from softlabel.training.step import Counts


def weigh_terms(
    config: StudentConfig, here: Counts, whole: Counts, *, epoch: int, world_size: int
) -> tuple[float, float]:
    """The weights of the soft and of the hard term of some rows, by which the gradients of all, averaged over processes
    and summed over parts, become that of the whole batch: the soft mean over the rows that it is of, the hard mean over
    its labelled rows.

    Args:
        config: of the student.
        here, whole: what counts among these rows, and in the batch over all parts and processes.
        epoch: from 0.
        world_size: processes over whose batches the mean is taken.
    """
    soft, of_all = count_soft(config, here), count_soft(config, whole)
    soft_weight = config.find_soft_weight(epoch) * (soft * world_size / max(of_all, 1))
    return soft_weight, config.hard_weight * (here.hard * world_size / max(whole.hard, 1))


def count_soft(config: StudentConfig, counts: Counts) -> int:
    """The rows over which the mean of the soft term is taken."""
    return counts.both if LOSSES[config.loss].of == "labelled rows" else counts.soft


class Objective:
    """The soft and hard loss of one student.

    Args:
        config: its settings.
        temperature: of the soft term.
        ranks: the processes over whose batches the mean is taken.
    """

    def __init__(self, config: StudentConfig, *, temperature: float, ranks: Ranks) -> None:
        self.config, self.temperature, self.ranks = config, temperature, ranks
        self._loss = LOSSES[config.loss]

    @property
    def is_of_batch(self) -> bool:
        """Whether the soft term is about a batch as a whole, and not a mean over its rows."""
        return self._loss.of == "batch" and self.config.soft_weight > 0

    def losses(
        self,
        logits_BC: Tensor,
        batch: Batch,
        here: Counts,
        whole: Counts,
        mixup: tuple[Tensor, Tensor] | None,
        *,
        epoch: int,
        of_batch: BatchTerm | None,
    ) -> LossComponents:
        """The loss of the rows here, weighted as `weigh_terms` says.

        Args:
            here, whole: what counts among these rows, and in the batch over all parts and processes.
            mixup: float32 (2,), the shares of each sample itself and of the one that it is mixed with; which one that
                is, int64 (B,).
            epoch: from 0.
            of_batch: where the soft term is of a batch that has several parts: what `measure_batch` found, of the rows
                here.
        """
        config = self.config
        soft_weight, hard_weight = weigh_terms(config, here, whole, epoch=epoch, world_size=self.ranks.world_size)
        if config.soft_weight > 0:
            assert batch.target is not None
            if self._loss.compute is None:
                return distillation_loss_components(
                    logits_BC,
                    batch.target,
                    batch.labels,
                    temperature=self.temperature,
                    soft_weight=soft_weight,
                    hard_weight=hard_weight,
                    label_smoothing=config.label_smoothing,
                    soft_mask=batch.has_target,
                )
            if self.is_of_batch:
                term = of_batch or self.measure_batch(logits_BC, batch)
                scale = config.find_soft_weight(epoch) * self.ranks.world_size
                share = count_soft(config, here) / max(count_soft(config, whole), 1)
                soft, total = term.value, term.attach([logits_BC], scale=scale, share=share)
            else:
                weight_B = None if batch.has_target is None else batch.has_target.to(logits_BC.dtype)
                soft = self._loss.compute(logits_BC, batch.target, batch.labels, self.temperature, weight_B)
                total = soft_weight * soft
            hard = torch.zeros_like(soft)
            if config.hard_weight > 0:
                hard = self._cross_entropy(logits_BC, batch.labels, here.hard)
            return LossComponents(total + hard_weight * hard, soft.detach(), hard.detach())
        hard = self._cross_entropy(logits_BC, batch.labels, here.hard)
        if mixup is not None:
            shares, other_B = mixup
            hard = shares[0] * hard + shares[1] * self._cross_entropy(logits_BC, batch.labels[other_B], here.hard)
        return LossComponents(hard_weight * hard, torch.zeros_like(hard), hard.detach())

    def find_hard(self, logits_BC: Tensor, batch: Batch, here: Counts, whole: Counts) -> Tensor:
        """The hard term alone, as it is in the total of `losses`."""
        _, hard_weight = weigh_terms(self.config, here, whole, epoch=0, world_size=self.ranks.world_size)
        return hard_weight * self._cross_entropy(logits_BC, batch.labels, here.hard)

    def measure_batch(self, logits_BC: Tensor, batch: Batch) -> BatchTerm:
        """The soft term of the batch of all processes, whose logits each of them gets from the others.

        Args:
            logits_BC: of all rows of this process.
            batch: the same rows.
        """
        target = batch.target
        assert self._loss.compute is not None
        assert not isinstance(target, TopKTarget | SampledTarget | SigmoidTarget | None)
        own_BC = logits_BC.detach().requires_grad_()
        scaled_BC = scaled_logits(target, own_BC.dtype)
        counts_B = torch.ones_like(batch.labels, dtype=torch.bool) if batch.has_target is None else batch.has_target
        counts, everything = torch.cat(self.ranks.gather_tensor(counts_B)), self.ranks.join_tensor(own_BC)
        teacher = torch.cat(self.ranks.gather_tensor(scaled_BC))
        if self.ranks.several or batch.has_target is not None:
            everything, teacher = everything[counts], teacher[counts]
        if len(everything) < 2:  # nothing to correlate
            return BatchTerm(value=own_BC.new_zeros(()), gradients=(torch.zeros_like(own_BC),))
        labels = torch.empty(0)  # such losses have no use for them
        with torch.enable_grad():
            dense = DenseTarget(scaled_logits=teacher, temperature=target.temperature, retemperable=target.retemperable)
            value = self._loss.compute(everything, dense, labels, self.temperature, None)
        return BatchTerm(value=value.detach(), gradients=torch.autograd.grad(value, own_BC))

    def mixup(self, epoch: int, step: int, part: slice, device: torch.device) -> tuple[float, Tensor] | None:
        """Mixup's share of the image itself, and which other one each is mixed with (int64 (B,)): from the seed and the
        place alone. None without mixup."""
        alpha, seed = self.config.shared.mixup, self.config.shared.seed
        if not alpha:
            return None
        numbers = np.random.default_rng(int(stream_key(seed, epoch, step, self.ranks.rank, part.start)))
        share = float(numbers.beta(alpha, alpha))
        return share, torch.from_numpy(numbers.permutation(part.stop - part.start)).to(device)

    def _cross_entropy(self, logits_BC: Tensor, labels_B: Tensor, labelled: int) -> Tensor:
        # As in the distillation loss, the mean is over labelled rows, and 0 where there is none.
        smoothing = self.config.label_smoothing
        if labels_B.dim() == 2:
            return binary_cross_entropy(logits_BC, labels_B, smoothing).sum() / max(labelled, 1)
        total = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
        return total / max(labelled, 1)
