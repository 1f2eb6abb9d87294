"""The distillation loss: targets, one float64 reference, and fast paths that equal it."""

from softlabel.loss.functional import DistillationLoss, LossComponents, distillation_loss
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, Target, TopKTarget

__all__ = [
    "DenseTarget",
    "DistillationLoss",
    "HeadTarget",
    "Int8Target",
    "LossComponents",
    "SampledTarget",
    "Target",
    "TopKTarget",
    "distillation_loss",
]
