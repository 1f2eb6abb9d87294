"""A loss of a batch as a whole, over all of its parts and all processes.

Legend: B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchTerm:
    """What such a loss is, found once for all parts.

    Attributes:
        value: a scalar.
        gradients: of the value, in each tensor that it is of, in the rows of this process (B, ...).
    """

    value: Tensor
    gradients: tuple[Tensor, ...]

    def take(self, part: slice) -> "BatchTerm":
        """The same for a part of the rows."""
        return BatchTerm(value=self.value, gradients=tuple(one[part] for one in self.gradients))

    def attach(self, outputs: Sequence[Tensor], *, scale: float, share: float) -> Tensor:
        """The term as a part of a loss: its gradient in the outputs is that of the whole, its value the part's share.

        Args:
            outputs: of the rows of this term, what it was found of.
            scale: of the gradient and of the value.
            share: of the value.
        """
        pairs = zip(outputs, self.gradients, strict=True)
        along = scale * torch.stack([(output * gradient).sum() for output, gradient in pairs]).sum()
        return along - along.detach() + scale * share * self.value
