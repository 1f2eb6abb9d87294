"""The losses of `train --embedding-loss`: what each compares, and the published numbers that it is used with.

Legend: B batch, D width of an embedding.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

from torch import Tensor

from softlabel.loss import (
    cosine_distance,
    embedding_mse,
    probabilistic_transfer,
    relational_kd,
    similarity_preserving,
    simple_recipe,
)

EmbeddingLossName = Literal["none", "cosine", "mse", "simkd", "srd", "rkd", "pkt", "sp", "crd", "at"]
ProjectorName = Literal["linear", "mlp"]

# RKD's angles are those of every so many rows of a batch: the batch of the published runs. All B^3 triplets of a batch
# of 256 take as long as several steps of a small network.
TRIPLET_ROWS = 64


class Compare(Protocol):
    """A loss of a student's (B, D) and a teacher's (B, D'), over the rows of a mask bool (B,): a scalar."""

    def __call__(self, student: Tensor, teacher: Tensor, /, *, mask: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingLoss:
    """A loss between a student's embedding and the teacher's.

    Attributes:
        compare: what it computes; None: crd's and at's, see `EmbeddingObjective`.
        of: whether it is a mean over rows, or about a batch as a whole.
        projects: whether a projector brings the student's embedding to the teacher's width.
        weight: where none is given.
        soft_weight, hard_weight: where none is given; None: as without an embedding loss.
        source: where the numbers are from.
    """

    compare: Compare | None
    of: Literal["rows", "batch"]
    projects: bool = False
    weight: float
    soft_weight: float | None = None
    hard_weight: float | None = None
    source: str


EMBEDDING_LOSSES: dict[EmbeddingLossName, EmbeddingLoss] = {
    "cosine": EmbeddingLoss(
        compare=cosine_distance,
        of="rows",
        projects=True,
        weight=1.0,
        source="Sanh et al. 2019, DistilBERT: weight 1 of the cosine term",
    ),
    "mse": EmbeddingLoss(
        compare=embedding_mse,
        of="rows",
        projects=True,
        weight=1.0,
        source="SimKD's code, srrl: weight 1 of the feature term",
    ),
    "simkd": EmbeddingLoss(
        compare=embedding_mse,
        of="rows",
        projects=True,
        weight=1.0,
        soft_weight=0.0,
        hard_weight=0.0,
        source="Chen et al. 2022, SimKD: -c 0 -d 0 -b 1",
    ),
    "srd": EmbeddingLoss(
        compare=simple_recipe,
        of="batch",
        projects=True,
        weight=2.0,
        source="torchdistill, SRD: CE 1, weight 2, exponent 4, eps 1e-4",
    ),
    "rkd": EmbeddingLoss(
        compare=partial(relational_kd, triplet_rows=TRIPLET_ROWS),
        of="batch",
        weight=1.0,
        source="RepDistiller: -b 1, distance 25, angle 50",
    ),
    "pkt": EmbeddingLoss(
        compare=probabilistic_transfer,
        of="batch",
        weight=30_000.0,
        source="RepDistiller: -b 30000",
    ),
    "sp": EmbeddingLoss(
        compare=similarity_preserving,
        of="batch",
        weight=3_000.0,
        source="RepDistiller: -b 3000",
    ),
    "crd": EmbeddingLoss(
        compare=None,
        of="batch",
        weight=0.8,
        source="RepDistiller: -b 0.8, temperature 0.07, width 128, momentum 0.5",
    ),
    "at": EmbeddingLoss(
        compare=None,
        of="rows",
        weight=1_000.0,
        source="RepDistiller: -b 1000",
    ),
}
assert {"none", *EMBEDDING_LOSSES} == set(get_args(EmbeddingLossName))
