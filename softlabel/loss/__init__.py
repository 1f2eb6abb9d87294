"""The distillation loss: targets, one float64 reference, fast paths that equal it, and the other losses."""

from softlabel.loss.differences import difference_loss
from softlabel.loss.embeddings import attention_transfer, cosine_distance, embedding_mse, simple_recipe
from softlabel.loss.functional import DistillationLoss, LossComponents, distillation_loss, distillation_loss_components
from softlabel.loss.linear import linear_distillation_loss, linear_distillation_loss_components
from softlabel.loss.multi_level import multi_level_kd
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
from softlabel.loss.relations import (
    contrast,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    relational_kd,
    similarity_preserving,
)
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, SigmoidTarget, Target, TopKTarget
from softlabel.loss.transformed import weighted_ttm

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
    "attention_transfer",
    "contrast",
    "cosine_distance",
    "decoupled_kd",
    "difference_loss",
    "dist_loss",
    "distillation_loss",
    "distillation_loss_components",
    "embedding_mse",
    "jensen_shannon",
    "linear_distillation_loss",
    "linear_distillation_loss_components",
    "mse_logits",
    "multi_level_kd",
    "probabilistic_transfer",
    "relational_angle",
    "relational_distance",
    "relational_kd",
    "reverse_kl",
    "similarity_preserving",
    "simple_recipe",
    "soft_cross_entropy",
    "standardize_logits",
    "standardized_kl",
    "weighted_ttm",
]
