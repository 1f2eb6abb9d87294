"""Soft labels that a student is not to follow: those of an unsure or too sure teacher, and those that contradict the
hard label.

Legend: B batch.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.loader import Batch
from softlabel.loss.signals import swap_to_labels, top_class, top_probability
from softlabel.loss.targets import SampledTarget, SigmoidTarget, TopKTarget


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Filtered:
    """What a filter found in a batch, bool (B,) each: rows with a soft label before it, those of them with a hard
    label, and those where the two differed."""

    stored: Tensor
    comparable: Tensor
    differ: Tensor

    def count(self, part: slice) -> dict[str, int]:
        """How many there are among some rows, as `Counts` names them."""
        return {name: int(getattr(self, name)[part].sum()) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelFilter:
    """Changes the soft labels of batches.

    Attributes:
        fix: what happens where the teacher's most probable class is not the hard label: swap exchanges the two classes'
            logits, mask leaves the row without a soft label.
        confidence: rows whose highest probability at temperature 1 is outside of it have no soft label.
    """

    fix: Literal["swap", "mask"] | None
    confidence: tuple[float, float] | None

    def apply(self, batch: Batch) -> tuple[Batch, Filtered]:
        """Change the soft labels of a batch on the CPU that has a target and no filler."""
        target, labels_B = batch.target, batch.labels
        assert target is not None
        assert not isinstance(target, SampledTarget | SigmoidTarget)
        stored_B = torch.ones(len(batch), dtype=torch.bool) if batch.has_target is None else batch.has_target
        both_B = stored_B & (labels_B >= 0)
        kept_B, differ_B = stored_B, torch.zeros_like(both_B)
        if self.confidence is not None:
            low, high = self.confidence
            sure_B = top_probability(target)
            kept_B = kept_B & (sure_B >= low) & (sure_B <= high)
        if self.fix is not None:
            top_B = top_class(target)
            assert top_B is not None
            differ_B = both_B & (top_B != labels_B)
        if self.fix == "mask":
            kept_B = kept_B & ~differ_B
        elif self.fix == "swap" and bool(differ_B.any()):
            assert not isinstance(target, TopKTarget)
            target = swap_to_labels(target, labels_B.where(differ_B, -1))
        found = Filtered(stored=stored_B, comparable=both_B, differ=differ_B)
        return replace(batch, target=target, has_target=kept_B), found


def parse_confidence(text: str) -> tuple[float, float]:
    """LO:HI as two probabilities.

    Raises:
        UsageError: it is something else.
    """
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UsageError(
            f"confidence: expected two probabilities LO:HI, the lower one first, such as 0.1:0.95, found {text!r}"
        )
    return low, high
