"""The distillation loss: targets, one float64 reference, fast paths that equal it, and the other losses."""

from softlabel.loss.functional import DistillationLoss, LossComponents, distillation_loss, distillation_loss_components
from softlabel.loss.linear import linear_distillation_loss, linear_distillation_loss_components
from softlabel.loss.others import (
    decoupled_kd,
    dist_loss,
    jensen_shannon,
    mse_logits,
    reverse_kl,
    soft_cross_entropy,
    standardize_logits,
    standardized_kl,
)
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, SigmoidTarget, Target, TopKTarget

__all__ = [
    "DenseTarget",
    "DistillationLoss",
    "HeadTarget",
    "Int8Target",
    "LossComponents",
    "SampledTarget",
    "SigmoidTarget",
    "Target",
    "TopKTarget",
    "decoupled_kd",
    "dist_loss",
    "distillation_loss",
    "distillation_loss_components",
    "jensen_shannon",
    "linear_distillation_loss",
    "linear_distillation_loss_components",
    "mse_logits",
    "reverse_kl",
    "soft_cross_entropy",
    "standardize_logits",
    "standardized_kl",
]
