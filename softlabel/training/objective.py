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
from softlabel.loss.sigmoid import binary_cross_entropy
from softlabel.training.grid import StudentConfig
from softlabel.training.step import Counts


def weigh_terms(config: StudentConfig, here: Counts, whole: Counts, world_size: int) -> tuple[float, float]:
    """The weights of the soft and of the hard term of some rows, by which the gradients of all, averaged over processes
    and summed over parts, become that of the whole batch: the soft mean over its rows with soft labels, the hard mean
    over its labelled rows.

    Args:
        config: of the student.
        here, whole: what counts among these rows, and in the batch over all parts and processes.
        world_size: processes over whose batches the mean is taken.
    """
    soft_weight = config.soft_weight * (here.soft * world_size / max(whole.soft, 1))
    return soft_weight, config.hard_weight * (here.hard * world_size / max(whole.hard, 1))


class Objective:
    """The soft and hard loss of one student.

    Args:
        config: its settings.
        temperature: of the soft term.
        world_size: processes over whose batches the mean is taken.
        rank: which of them this is.
    """

    def __init__(self, config: StudentConfig, *, temperature: float, world_size: int, rank: int) -> None:
        self.config, self.temperature, self.world_size, self.rank = config, temperature, world_size, rank

    def losses(
        self, logits_BC: Tensor, batch: Batch, here: Counts, whole: Counts, mixup: tuple[float, Tensor] | None
    ) -> LossComponents:
        """The loss of the rows here, weighted as `weigh_terms` says.

        Args:
            here, whole: what counts among these rows, and in the batch over all parts and processes.
            mixup: what `mixup` drew, if there is mixup.
        """
        config = self.config
        soft_weight, hard_weight = weigh_terms(config, here, whole, self.world_size)
        if config.soft_weight > 0:
            assert batch.target is not None
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
        hard = self._cross_entropy(logits_BC, batch.labels, here.hard)
        if mixup is not None:
            share, other_B = mixup
            hard = share * hard + (1 - share) * self._cross_entropy(logits_BC, batch.labels[other_B], here.hard)
        return LossComponents(hard_weight * hard, torch.zeros_like(hard), hard.detach())

    def mixup(self, epoch: int, step: int, part: slice, device: torch.device) -> tuple[float, Tensor] | None:
        """Mixup's share of the image itself, and which other one each is mixed with (int64 (B,)): from the seed and the
        place alone. None without mixup."""
        alpha, seed = self.config.shared.mixup, self.config.shared.seed
        if not alpha:
            return None
        numbers = np.random.default_rng(int(stream_key(seed, epoch, step, self.rank, part.start)))
        share = float(numbers.beta(alpha, alpha))
        return share, torch.from_numpy(numbers.permutation(part.stop - part.start)).to(device)

    def _cross_entropy(self, logits_BC: Tensor, labels_B: Tensor, labelled: int) -> Tensor:
        # As in the distillation loss, the mean is over labelled rows, and 0 where there is none.
        smoothing = self.config.label_smoothing
        if labels_B.dim() == 2:
            return binary_cross_entropy(logits_BC, labels_B, smoothing).sum() / max(labelled, 1)
        total = F.cross_entropy(logits_BC, labels_B, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
        return total / max(labelled, 1)
